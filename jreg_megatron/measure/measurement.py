"""Measure a model: figures of each layer over tokens and texts. Memory does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jreg_megatron.data.texts import Text
from jreg_megatron.data.windows import Batch, Window, batches
from jreg_megatron.decoder.decoder import Decoder, refuse_dependence
from jreg_megatron.measure.depth import DepthMeans, DepthSums, find_middles
from jreg_megatron.methods.jreg.formulas import displacement_of_units, jump_rate, unit_rows
from jreg_megatron.methods.norms.formulas import update_ratios
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import note

FINAL_STATES = ("pre_norm", "post_norm")
"""The last layer's output before and after the final norm."""
BLOCKS = {"kept": "with_first_token", "dropped": "without_first_token"}
"""The figures with each sequence's first token, and without it."""

_PSI, _PSI_SQUARED, _ANGLE, _NORM, _NORM_SQUARED, _UPDATE, _LARGEST = range(7)


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

    Texts longer than the model's context are cut into independent sequences. A note on standard error tells
    if the model has no final norm.

    Args:
        decoder: the model.
        texts: read once, in order.
        max_tokens: first tokens of each text; None for all.
        batch_size: sequences in a batch.
        on_tokens: gets the number of tokens of each finished batch.
        depth: add the metrics of depth, see :meth:`DepthMeans.figures`. A note tells if the contributions of
            attention and MLP cannot be known.

    Returns:
        The figures of each of :data:`BLOCKS`; None if no text has a second token.

    Raises:
        UserError: if there is no token, an id is not the model's, a state is NaN or infinite, or the states
            of a text depend on anything else.
    """
    if decoder.final_norm is None:
        note(
            f"no final norm runs on the last layer's output of {decoder.name}; its figures are pre_norm, and "
            "there is no post_norm"
        )
    means = _Means(), _Means()
    of_depth = DepthMeans(decoder.num_layers), DepthMeans(decoder.num_layers)
    middles = None
    for number, batch in enumerate(batches(decoder.windows(texts, max_tokens), batch_size)):
        if number == 0:
            refuse_dependence(decoder, batch.windows[0].ids, batch_size)
            middles = find_middles(decoder, batch.windows[0].ids) if depth else None
        sums = BatchSums(batch)
        depth_sums = DepthSums(batch, decoder, middles) if depth else None
        with decoder.observed(sums), depth_sums.observing() if depth_sums else nullcontext():
            decoder.run(batch.tokens)
        first, rest = sums.table()
        _refuse_non_finite(first + rest, decoder)
        for place, window in enumerate(batch.windows):
            of_first, others = first[..., place], rest[..., place]
            largest = torch.maximum(of_first[_LARGEST], others[_LARGEST])
            means[0].add(window, of_first + others, len(window.ids), largest)
            means[1].add(window, others, len(window.ids) - 1, others[_LARGEST])
        for window, figures in depth_sums.of_windows() if depth_sums else ():
            for first, (mean, of_sequence) in enumerate(zip(of_depth, figures, strict=True)):
                mean.add(window, of_sequence, len(window.ids) - first)
        if on_tokens is not None:
            on_tokens(int(batch.lengths.sum()))
    found = {
        name: mean.figures(decoder.num_layers) for name, mean in zip(BLOCKS.values(), means, strict=True)
    }
    for block, of_block in zip(found.values(), of_depth, strict=True) if depth else ():
        if block is not None:
            block.update(of_block.figures())
    if found["with_first_token"] is None:
        raise UserError("--text holds no token; give other files")
    return found


def entry(decoder: Decoder, measured: dict[str, Any], drop_first: bool) -> dict[str, Any]:
    """A model's entry in the JSON.

    Raises:
        UserError: if the first token is to be dropped and no text has a second one.
    """
    first_token = "dropped" if drop_first else "kept"
    chosen = measured[BLOCKS[first_token]]
    if chosen is None:
        raise UserError("--drop-first-token leaves no token: no text has a second one; give longer texts")
    about = {"hidden_size": decoder.hidden_size, "first_token": first_token}
    return {**decoder.described(), **about, "settings": dict(decoder.settings), **chosen, **measured}


class _Directions(NamedTuple):
    state: Tensor
    unit: Tensor
    norm: Tensor

    @classmethod
    def of(cls, state: Tensor) -> _Directions:
        unit, inverse = unit_rows(state)
        return cls(state, unit, torch.where(inverse == 0, 0.0, 1 / inverse).squeeze(-1))


class BatchSums:
    """Sums over the tokens of one batch. Sees a decoder's forward pass.

    The P places are the states h_0 .. h_L and, if there is a final norm, its output in the place of h_L.
    """

    def __init__(self, batch: Batch) -> None:
        self._lengths = batch.lengths
        self._places: list[Tensor] = []
        self._known: list[_Directions] = []

    def __call__(self, number: int, before: Tensor, after: Tensor) -> None:
        """Add layer ``number``; states are ``[b, s, h]``."""
        before = before.to(after.device)
        # A known state is held, so its memory belongs to no other tensor.
        known = (each for each in self._known if _is_same(each.state, before))
        start = next(known, None) or _Directions.of(before)
        if number == 1:
            nothing = torch.zeros_like(start.norm)
            self._add(nothing, start.norm, nothing)
        end = _Directions.of(after)
        psi = displacement_of_units(start.unit, end.unit)
        self._add(psi, end.norm, update_ratios(start.state, end.state, start.norm))
        self._known = [start, end]

    def table(self) -> Tensor:
        """Of the first token, and of the other tokens, of each sequence, ``[2, 7, P, b]`` float64: the sums
        of displacement, its square, ``arccos(cos) / pi``, the state's norm, its square and the update ratio
        ``|h_l - h_{l-1}| / |h_{l-1}|``; and the largest norm."""
        return torch.stack([place.cpu() for place in self._places], dim=2)

    def _add(self, psi: Tensor, norm: Tensor, update: Tensor) -> None:
        mask = torch.arange(psi.shape[1], device=psi.device) < self._lengths.to(psi.device)[:, None]
        # arccos(cos) of cos = 1 - 2 psi, in the form that is exact for small angles.
        angle = psi.clamp(0, 1).sqrt().asin() * (2 / math.pi)
        values = torch.stack((psi, psi.square(), angle, norm, norm.square(), update)).double()
        values = torch.where(mask, values, 0.0)  # padding may be anything
        first, rest = values[..., :1], values[..., 1:]
        rest_largest = torch.nn.functional.pad(rest[_NORM], (0, 1)).amax(dim=-1)  # 0 for no token
        tops = first[_NORM, :, 0], rest_largest
        sums = [
            torch.cat((part.sum(dim=-1), top[None])) for part, top in zip((first, rest), tops, strict=True)
        ]
        self._places.append(torch.stack(sums))


class _Means:
    """The mean over texts of their means over tokens. A text's windows are added in order."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._largest: Tensor | float = 0.0
        self._texts = self._tokens = 0
        self._of_text: tuple[Tensor | float, int] = 0.0, 0

    def add(self, window: Window, sums: Tensor, tokens: int, largest: Tensor) -> None:
        """Add a sequence's sums ``[7, P]`` over a number of tokens, and their largest norms ``[P]``."""
        self._largest = torch.maximum(largest, torch.as_tensor(self._largest, dtype=largest.dtype))
        of_text, count = self._of_text[0] + sums, self._of_text[1] + tokens
        self._of_text = (0.0, 0) if window.is_last else (of_text, count)
        if window.is_last and count:
            self._total = self._total + of_text / count
            self._texts, self._tokens = self._texts + 1, self._tokens + count

    def figures(self, last: int) -> dict[str, Any] | None:
        """For JSON, of a model of ``last`` layers; None without a text.

        A dict has an entry for each of :data:`FINAL_STATES`, which differ only in the last layer; a model
        without a final norm has no ``post_norm``. Displacement Psi_l is in [0, 1], its deviation over tokens
        (texts have the same weight); the jump rate zeta is of the mean displacement, times 100, and None for
        a model of one layer; block influence is ``1 - mean cos`` in [0, 2] (ShortGPT, arXiv 2403.03853); the
        angular distance is in [0, 1] (arXiv 2403.17887, which takes only a text's last token). Norms are of
        h_0 .. h_L, the other figures of layers 1..L.
        """
        if not (isinstance(self._total, Tensor) and isinstance(self._largest, Tensor)):
            return None
        mean = self._total / self._texts
        mean[_LARGEST] = self._largest
        by_state = {
            state: torch.cat((mean[:, :last], mean[:, at : at + 1]), 1)
            for state, at in zip(FINAL_STATES, range(last, mean.shape[1]), strict=False)
        }
        psi = {state: each[_PSI, 1:] for state, each in by_state.items()}
        rates: dict[str, list[float | None]] = {
            state: [None, *(float(jump_rate(each, layer)) for layer in range(2, last + 1))]
            for state, each in psi.items()
        }

        def each(figure: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
            return {state: figure(means).tolist() for state, means in by_state.items()}

        return {
            "texts": self._texts,
            "tokens": self._tokens,
            "displacement": each(lambda m: m[_PSI, 1:]),
            "displacement_std": each(
                lambda m: (m[_PSI_SQUARED, 1:] - m[_PSI, 1:].square()).clamp(min=0).sqrt()
            ),
            "jump_rate": {state: each[-1] for state, each in rates.items()},
            "jump_rate_from": rates,
            "block_influence": each(lambda m: 2 * m[_PSI, 1:]),
            "angular_distance": each(lambda m: m[_ANGLE, 1:]),
            "norm": each(lambda m: m[_NORM]),
            "norm_rms": each(lambda m: m[_NORM_SQUARED].sqrt()),
            "norm_largest": each(lambda m: m[_LARGEST]),
            "update_ratio": each(lambda m: m[_UPDATE, 1:]),
        }


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _refuse_non_finite(sums: Tensor, decoder: Decoder) -> None:
    finite = sums.isfinite().all(dim=0).all(dim=-1)
    if not finite.all():
        place = int((~finite).nonzero()[0])
        where = f"layer {place}" if place <= decoder.num_layers else "the final norm"
        raise UserError(
            f"{decoder.name}: the states after {'the embedding' if place == 0 else where} hold NaN or Inf; "
            "the weights are damaged, or too large for this --dtype"
        )
