"""The paper's displacement per layer, as thin grey lines under the measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jreg_megatron.paper import numbers, profile
from jreg_megatron.report.charts import Row, Style
from jreg_megatron.report.inputs import STATE_WORDS, STATES

_GREY = "#9AA0A6"
_SETTINGS = {
    "base": ("baseline", Style(_GREY, "circle", (1, 0), thin=True)),
    "alpha 1": ("λ 1, α 1", Style(_GREY, "diamond", (4, 3), thin=True)),
}


@dataclass(frozen=True)
class PaperProfiles:
    """The profiles of one of the paper's models: the baseline, and JREG at alpha 1."""

    size: str
    """One of :data:`jreg_megatron.paper.SIZES`."""

    @property
    def looks(self) -> dict[str, Style]:
        """The looks of the lines, by label."""
        return {f"the paper's {self.size.upper()}, {words}": style for words, style in _SETTINGS.values()}

    def rows(self, num_layers: int, of_last: str = "", **fields: str) -> Iterator[Row]:
        """The values for a chart, stretched to ``num_layers`` layers so that first and last layers match.

        In a table they are at the layers of the paper's model. ``of_last`` is a remark on the last layer,
        whose output is taken before the final norm.
        """
        for label, setting in zip(self.looks, _SETTINGS, strict=True):
            values = profile(self.size, setting)
            for at, psi in enumerate(values):
                place = f"{at + 1}{of_last}" if of_last and at + 1 == len(values) else at + 1
                x = 1 + at * (num_layers - 1) / (len(values) - 1)
                yield {"model": label, "x": x, "y": psi, "low": None, "high": None, "row": place, **fields}

    def origin(self, num_layers: int) -> str:
        """The sentence on the source of the lines, for a chart with ``num_layers`` layers."""
        own = len(profile(self.size, "base"))
        where = "" if own == num_layers else f", stretched so that layer {own} lies at {num_layers}"
        return (
            f"Grey: the paper's {self.size.upper()} ({own} layers; arXiv 2601.18302v1, Tables 5 and 16), "
            f"{STATE_WORDS[STATES[0]]}{where}."
        )

    def words(self, num_layers: int, has_after: bool = False) -> str:
        """The sentences for a caption. ``has_after``: the chart also has numbers after the final norm."""
        base, jreg = (f"{numbers()['zeta'][self.size][setting][0]:g}" for setting in _SETTINGS)
        return (
            f" {self.origin(num_layers)} Its ζ is {base} in the baseline and {jreg} with JREG. It was "
            "trained on another text." + (" It has no numbers after the final norm." if has_after else "")
        )
