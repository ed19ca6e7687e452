"""The paper's displacement per layer as thin grey lines under measured ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """Of one of the paper's models, without JREG and at its setting across sizes, alpha 1."""

    size: str
    """One of :data:`jreg_megatron.paper.SIZES`."""

    @property
    def looks(self) -> dict[str, Style]:
        """The look of each line, by its label."""
        return {f"the paper's {self._name}, {words}": style for words, style in _SETTINGS.values()}

    @property
    def displacement(self) -> dict[str, tuple[float, ...]]:
        """Psi of layers 1..L by label, each in [0, 1]; of layer L before the final norm."""
        return dict(zip(self.looks, (profile(self.size, setting) for setting in _SETTINGS), strict=True))

    def rows(self, num_layers: int, **fields: str | None) -> list[Row]:
        """The values for a chart whose last layer is ``num_layers``; first and last layers fall together."""
        return [
            {"model": label, "x": 1 + at * (num_layers - 1) / (len(values) - 1), "y": psi, **fields}
            for label, values in self.displacement.items()
            for at, psi in enumerate(values)
        ]

    def columns(self, of_last: str = "") -> dict[str, dict[Any, float | str | None]]:
        """The values for a table of layers, by their numbers in the paper's model; the last with a remark."""
        return {
            label: {
                f"{layer}{of_last}" if of_last and layer == len(values) else layer: psi
                for layer, psi in enumerate(values, start=1)
            }
            for label, values in self.displacement.items()
        }

    def origin(self, num_layers: int) -> str:
        """Whose lines these are and where they stand, for a chart whose last layer is ``num_layers``."""
        own = self._num_layers
        where = "" if own == num_layers else f", stretched so that layer {own} lies at {num_layers}"
        return (
            f"Grey: the paper's {self._name} ({own} layers; arXiv 2601.18302v1, Tables 5 and 16), "
            f"{STATE_WORDS[STATES[0]]}{where}."
        )

    def words(self, num_layers: int, has_after: bool = False) -> str:
        """What a caption says of the lines, with ``has_after`` in a chart after the final norm too."""
        base, jreg = (f"{numbers()['zeta'][self.size][setting][0]:g}" for setting in _SETTINGS)
        return (
            f" {self.origin(num_layers)} Its ζ is {base} in the baseline and {jreg} with JREG; its text and "
            "training are its own." + (" It has no numbers after the final norm." if has_after else "")
        )

    @property
    def _name(self) -> str:
        return self.size.upper()

    @property
    def _num_layers(self) -> int:
        return len(profile(self.size, "base"))
