"""Measure a model: figures of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import batches
from jreg_megatron.decoder.decoder import Decoder
from jreg_megatron.decoder.trial import refuse_dependence
from jreg_megatron.measure.statistics import (
    ANGLE,
    NORM,
    NORM_SQUARED,
    PSI,
    PSI_SQUARED,
    UPDATE,
    BatchStatistics,
    Mean,
    TextStatistics,
)
from jreg_megatron.methods.jreg.formulas import jump_rate
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import note

FINAL_STATES = ("pre_norm", "post_norm")
"""The last layer's output before and after the final norm."""


@dataclass(frozen=True)
class Figures:
    """Figures of each layer, with or without each sequence's first token.

    Each is the mean over texts of their means over tokens. A dict has an entry for each of
    :data:`FINAL_STATES`, which differ only in the last layer. A model without a final norm has no
    ``post_norm``.
    """

    texts: int
    tokens: int
    displacement: dict[str, list[float]]
    """Psi_l of layers 1..L, in [0, 1]."""
    displacement_std: dict[str, list[float]]
    """Standard deviation of Psi_l over tokens. All texts have the same weight."""
    jump_rate: dict[str, float | None]
    """zeta_L of the mean displacement, times 100; None for a model of one layer."""
    jump_rate_from: dict[str, list[float | None]]
    """zeta_l of layers 1..L. The first is None, because Psi_0 does not exist."""
    block_influence: dict[str, list[float]]
    """``1 - mean cos``, in [0, 2] (ShortGPT, arXiv 2403.03853)."""
    angular_distance: dict[str, list[float]]
    """Mean of ``arccos(cos) / pi``, in [0, 1] (arXiv 2403.17887, which takes only a text's last token)."""
    norm: dict[str, list[float]]
    """Mean norm of h_0 .. h_L."""
    norm_rms: dict[str, list[float]]
    """Root mean square of the norm of h_0 .. h_L."""
    norm_largest: dict[str, list[float]]
    """The largest norm of a token, of h_0 .. h_L."""
    update_ratio: dict[str, list[float]]
    """Mean of ``|h_l - h_{l-1}| / |h_{l-1}|`` of layers 1..L."""

    @classmethod
    def of(cls, means: Mean, last: int) -> Figures | None:
        """From :class:`~jreg_megatron.measure.statistics.TextStatistics` of ``last`` layers; None without
        text."""
        if not (isinstance(means.total, Tensor) and isinstance(means.largest, Tensor)):
            return None
        mean = torch.cat((means.total / means.texts, means.largest[None]))
        by_state = {
            state: torch.cat((mean[:, :last], mean[:, at : at + 1]), 1)
            for state, at in zip(FINAL_STATES, range(last, mean.shape[1]), strict=False)
        }
        psi = {state: each[PSI, 1:] for state, each in by_state.items()}
        rates: dict[str, list[float | None]] = {
            state: [None, *(float(jump_rate(each, layer)) for layer in range(2, last + 1))]
            for state, each in psi.items()
        }
        return cls(
            texts=means.texts,
            tokens=means.tokens,
            displacement={state: each.tolist() for state, each in psi.items()},
            displacement_std={
                state: (each[PSI_SQUARED, 1:] - each[PSI, 1:].square()).clamp(min=0).sqrt().tolist()
                for state, each in by_state.items()
            },
            jump_rate={state: each[-1] for state, each in rates.items()},
            jump_rate_from=rates,
            block_influence={state: (2 * each).tolist() for state, each in psi.items()},
            angular_distance={state: each[ANGLE, 1:].tolist() for state, each in by_state.items()},
            norm={state: each[NORM].tolist() for state, each in by_state.items()},
            norm_rms={state: each[NORM_SQUARED].sqrt().tolist() for state, each in by_state.items()},
            norm_largest={state: each[-1].tolist() for state, each in by_state.items()},
            update_ratio={state: each[UPDATE, 1:].tolist() for state, each in by_state.items()},
        )


@dataclass(frozen=True)
class Measurement:
    """A model's figures, with each sequence's first token and without it."""

    with_first_token: Figures
    without_first_token: Figures | None
    """None if no text has a second token."""


def measure(
    decoder: Decoder,
    texts: Iterable[Text],
    *,
    max_tokens: int | None = None,
    batch_size: int = 8,
    on_tokens: Callable[[int], None] | None = None,
) -> Measurement:
    """Run texts through a model and measure each layer.

    Texts longer than the model's context are cut into independent sequences. A note on standard error tells
    if the model has no final norm.

    Args:
        decoder: the model.
        texts: read once, in order; memory does not grow with their number.
        max_tokens: first tokens of each text; None for all.
        batch_size: sequences in a batch.
        on_tokens: gets the number of tokens of each finished batch.

    Raises:
        UserError: if there is no token, an id is not the model's, a state is NaN or infinite, or the states
        of
            a text depend on anything else.
    """
    has_final_norm = decoder.final_norm is not None
    if not has_final_norm:
        note(
            f"no final norm runs on the last layer's output of {decoder.name}; its figures are pre_norm, and "
            "there is no post_norm"
        )
    statistics = TextStatistics()
    for number, batch in enumerate(batches(decoder.windows(texts, max_tokens), batch_size)):
        if number == 0:
            refuse_dependence(decoder, batch.windows[0].ids, batch_size)
        of_batch = BatchStatistics(batch, decoder.num_layers, has_final_norm)
        with decoder.observed(of_batch):
            decoder.run(batch.tokens)
        (first, rest), largest = of_batch.sums(), of_batch.largest()
        _refuse_non_finite(first + rest, decoder)
        for place, window in enumerate(batch.windows):
            statistics.add(window, first[..., place], rest[..., place], largest[..., place])
        if on_tokens is not None:
            on_tokens(int(batch.lengths.sum()))
    with_first, without_first = (Figures.of(mean, decoder.num_layers) for mean in statistics.means)
    if with_first is None:
        raise UserError("--text holds no token; give other files")
    return Measurement(with_first, without_first)


def _refuse_non_finite(sums: Tensor, decoder: Decoder) -> None:
    finite = sums.isfinite().all(dim=0).all(dim=-1)
    if not finite.all():
        place = int((~finite).nonzero()[0])
        where = f"layer {place}" if place <= decoder.num_layers else "the final norm"
        raise UserError(
            f"{decoder.name}: the states after {'the embedding' if place == 0 else where} hold NaN or Inf; "
            "the weights are damaged, or too large for this --dtype"
        )


def entry(decoder: Decoder, measurement: Measurement, drop_first: bool) -> dict[str, Any]:
    """A model's entry in the JSON.

    Raises:
        UserError: if the first token is to be dropped and no text has a second one.
    """
    chosen = measurement.without_first_token if drop_first else measurement.with_first_token
    if chosen is None:
        raise UserError("--drop-first-token leaves no token: no text has a second one; give longer texts")
    return {
        **decoder.described(),
        "hidden_size": decoder.hidden_size,
        "first_token": "dropped" if drop_first else "kept",
        "settings": dict(decoder.settings),
        **asdict(chosen),
        **asdict(measurement),
    }
