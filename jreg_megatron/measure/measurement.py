"""Measure a model: figures of each layer over tokens and texts. Memory does not grow with the texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import Batch, Window, batches
from jreg_megatron.decoder.decoder import Decoder, refuse_dependence
from jreg_megatron.measure.depth import DepthSums, depth_figures, find_parts, finite
from jreg_megatron.methods.jreg.formulas import displacement, jump_rate
from jreg_megatron.methods.norms.formulas import norms, update_ratios
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import note

FINAL_STATES = ("pre_norm", "post_norm")
"""The last layer's output before and after the final norm."""
BLOCKS = {"kept": "with_first_token", "dropped": "without_first_token"}
"""The figures with each sequence's first token, and without it."""

_PSI, _PSI_SQUARED, _ANGLE, _NORM, _NORM_SQUARED, _UPDATE, _LARGEST = range(7)
"""Rows of :meth:`BatchSums.table`; the last row is for the largest norms."""


def measure(
    decoder: Decoder,
    texts: Iterable[Text],
    *,
    max_tokens: int | None = None,
    batch_size: int = 8,
    on_tokens: Callable[[int], None] | None = None,
    depth: bool = False,
) -> dict[str, Any]:
    """Run texts through a model and measure each layer.

    Texts longer than the model's context are cut into independent sequences. If the model has no final norm,
    a note on standard error tells this.

    Args:
        decoder: the model.
        texts: read once, in order.
        max_tokens: number of tokens to read from the start of each text; None for all.
        batch_size: sequences per batch.
        on_tokens: gets the number of tokens of each finished batch.
        depth: add the metrics of :func:`jreg_megatron.measure.depth.depth_figures`. If the contributions of
            attention and MLP cannot be measured, a note tells this.

    Returns:
        The figures of each of :data:`BLOCKS`. Those without first token are None if no text has a second one.

    Raises:
        UserError: if there is no token, an id is outside the vocabulary, a state is NaN or infinite, or the
            states of a text depend on anything else.
    """
    if decoder.final_norm is None:
        note(
            f"no final norm runs on the last layer's output of {decoder.name}; its figures are pre_norm, and "
            "there is no post_norm"
        )
    means = {name: _Means() for name in BLOCKS.values()}
    largest: Tensor | float = 0.0
    parts = None
    for number, batch in enumerate(batches(decoder.windows(texts, max_tokens), batch_size)):
        if number == 0:
            refuse_dependence(decoder, batch.windows[0].ids, batch_size)
            parts = find_parts(decoder, batch.windows[0].ids) if depth else None
        sums = BatchSums(batch)
        depth_sums = DepthSums(batch, decoder, parts) if depth else None
        with decoder.observed(sums), depth_sums.observing() if depth_sums else nullcontext():
            decoder.run(batch.tokens)
        table, tops = sums.table()
        _refuse_non_finite(table[_NORM, :, 0], decoder)
        largest = torch.maximum(tops, torch.as_tensor(largest))
        of_windows = torch.cat((table.flatten(0, 1), *([depth_sums.table()] if depth_sums else [])))
        for place, window in enumerate(batch.windows):
            for skipped, mean in enumerate(means.values()):
                mean.add(window, of_windows[:, skipped, place], len(window.ids) - skipped)
        if on_tokens is not None:
            on_tokens(int(batch.lengths.sum()))
    if isinstance(largest, float):
        raise UserError("the texts have no token; give others with --text")
    tops_of = zip(means.items(), largest.T, strict=True)
    return {
        name: _figures(mean, top, decoder.num_layers) if mean.texts else None for (name, mean), top in tops_of
    }


def entry(decoder: Decoder, measured: dict[str, Any], drop_first: bool) -> dict[str, Any]:
    """A model's entry in the JSON.

    Raises:
        UserError: if ``drop_first`` is set and no text has a second token.
    """
    first_token = "dropped" if drop_first else "kept"
    chosen = measured[BLOCKS[first_token]]
    if chosen is None:
        raise UserError("--drop-first-token leaves no token: no text has a second one; give longer texts")
    about = {"hidden_size": decoder.hidden_size, "first_token": first_token}
    return {**decoder.described(), **about, "settings": dict(decoder.settings), **chosen, **measured}


class BatchSums:
    """Sums over the tokens of one batch, as an observer of a decoder's forward pass.

    The P places are the states h_0 .. h_L and, if there is a final norm, its output instead of h_L.
    """

    def __init__(self, batch: Batch) -> None:
        self._lengths = batch.lengths
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []

    def __call__(self, number: int, before: Tensor, after: Tensor) -> None:
        """Add layer ``number``; states are ``[b, s, h]``."""
        before = before.to(after.device)
        if number == 1:
            norm = norms(before)
            self._add(torch.zeros_like(norm), norm, torch.zeros_like(norm))
        self._add(displacement(before, after), norms(after), update_ratios(before, after))

    def table(self) -> tuple[Tensor, Tensor]:
        """The means over tokens and the largest norms.

        Returns:
            For each sequence, with and without its first token, the means ``[6, P, 2, b]`` float64 of
            displacement, its square, ``arccos(cos) / pi``, the state's norm, its square and the update ratio
            ``|h_l - h_{l-1}| / |h_{l-1}|``; NaN without tokens. And the batch's largest norms ``[P, 2]``.
        """
        counts = torch.stack((self._lengths, self._lengths - 1))
        sums = torch.stack([each.cpu() for each in self._sums], dim=1)
        return sums / counts, torch.stack([each.cpu() for each in self._largest])

    def _add(self, psi: Tensor, norm: Tensor, update: Tensor) -> None:
        mask = torch.arange(psi.shape[1], device=psi.device) < self._lengths.to(psi.device)[:, None]
        psi = psi.clamp(0, 1)  # rounding may exceed the range
        # arccos(1 - 2 psi), in a form that is exact for small angles.
        angle = psi.sqrt().asin() * (2 / math.pi)
        update = torch.where(update.isnan(), torch.inf, update)  # 0 / 0 is no number, but it is known
        values = torch.stack((psi, psi.square(), angle, norm, norm.square(), update)).double()
        values = torch.where(mask, values, 0.0)  # padding may have any value
        self._sums.append(torch.stack([values[..., skipped:].sum(dim=-1) for skipped in (0, 1)], dim=1))
        self._largest.append(
            torch.stack([values[_NORM].amax(), pad(values[_NORM, :, 1:], (0, 1)).amax()])  # 0 without tokens
        )


class _Means:
    """The mean over texts of their means over tokens. A text's windows are added in order.

    NaN means that a sequence does not have this number. It is left out of the means.
    """

    def __init__(self) -> None:
        self.texts = self.tokens = 0
        self._total: Tensor | float = 0.0
        self._counts: Tensor | float = 0.0
        self._of_text: tuple[Tensor | float, Tensor | float] = 0.0, 0.0

    def add(self, window: Window, means: Tensor, tokens: int) -> None:
        """Add a sequence's means over a number of tokens."""
        weight = tokens * (~means.isnan()).double()
        sums, weights = self._of_text
        sums, weights = sums + torch.where(weight > 0, means, 0.0) * weight, weights + weight
        self._of_text = sums, weights
        self.tokens += tokens
        if window.is_last:
            self._total = self._total + torch.where(weights > 0, sums / weights, 0.0)
            self._counts = self._counts + (weights > 0).double()
            self.texts += bool((weights > 0).any())
            self._of_text = 0.0, 0.0

    def mean(self) -> Tensor:
        """The mean; NaN for a number that no text has."""
        return torch.as_tensor(self._total) / torch.as_tensor(self._counts)


def _figures(means: _Means, largest: Tensor, last: int) -> dict[str, Any]:
    """The figures for JSON of a model of ``last`` layers, with its largest norms ``[P]``.

    A dict has an entry for each of :data:`FINAL_STATES`. The two differ only in the last layer. A model
    without a final norm has no ``post_norm``.

    - Displacement Psi_l is in [0, 1]. Its deviation is over tokens, with the same weight for each text.
    - The jump rate zeta is that of the mean displacement, times 100. It is None for a model of one layer.
    - Block influence is ``1 - mean cos`` in [0, 2] (ShortGPT, arXiv 2403.03853).
    - The angular distance is in [0, 1] (arXiv 2403.17887, which takes only a text's last token).
    - The update ratio is None for a layer whose input had norm 0.

    Norms are of h_0 .. h_L, the other figures of layers 1..L.
    """
    own, of_depth = means.mean().tensor_split([_LARGEST * len(largest)])
    mean = torch.cat((own.view(_LARGEST, -1), largest[None]))
    by_state = {
        state: torch.cat((mean[:, :last], mean[:, at : at + 1]), 1)
        for state, at in zip(FINAL_STATES, range(last, mean.shape[1]), strict=False)
    }
    rates: dict[str, list[float | None]] = {
        state: [None, *(float(jump_rate(table[_PSI, 1:], layer)) for layer in range(2, last + 1))]
        for state, table in by_state.items()
    }

    def by_final_state(figure: Callable[[Tensor], Tensor]) -> dict[str, list[float | None]]:
        return {state: finite(figure(table)) for state, table in by_state.items()}

    return {
        "texts": means.texts,
        "tokens": means.tokens,
        "displacement": by_final_state(lambda m: m[_PSI, 1:]),
        "displacement_std": by_final_state(
            lambda m: (m[_PSI_SQUARED, 1:] - m[_PSI, 1:].square()).clamp(min=0).sqrt()
        ),
        "jump_rate": {state: of_layers[-1] for state, of_layers in rates.items()},
        "jump_rate_from": rates,
        "block_influence": by_final_state(lambda m: 2 * m[_PSI, 1:]),
        "angular_distance": by_final_state(lambda m: m[_ANGLE, 1:]),
        "norm": by_final_state(lambda m: m[_NORM]),
        "norm_rms": by_final_state(lambda m: m[_NORM_SQUARED].sqrt()),
        "norm_largest": by_final_state(lambda m: m[_LARGEST]),
        "update_ratio": by_final_state(lambda m: m[_UPDATE, 1:]),
        **(depth_figures(of_depth, last) if len(of_depth) else {}),
    }


def _refuse_non_finite(norm: Tensor, decoder: Decoder) -> None:
    is_wrong = ~norm.isfinite().all(dim=-1)
    if is_wrong.any():
        place = int(is_wrong.nonzero()[0])
        where = f"layer {place}" if place <= decoder.num_layers else "the final norm"
        raise UserError(
            f"{decoder.name}: the states after {'the embedding' if place == 0 else where} hold NaN or Inf; "
            "the weights are damaged, or too large for this --dtype"
        )
