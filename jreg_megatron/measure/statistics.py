"""Statistics of every layer over tokens and texts. Memory does not grow with their number."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jreg_megatron.data.windows import Batch, Window
from jreg_megatron.methods.jreg.formulas import displacement_of_units, unit_rows
from jreg_megatron.methods.norms.formulas import update_ratios

PSI, PSI_SQUARED, ANGLE, NORM, NORM_SQUARED, UPDATE = range(6)
"""Averaged over tokens: displacement, its square, ``arccos(cos) / pi``, the state's norm, its square, and the
update ratio ``|h_l - h_{l-1}| / |h_{l-1}|``."""


@dataclass(frozen=True)
class _Directions:
    state: Tensor
    unit: Tensor
    norm: Tensor

    @classmethod
    def of(cls, state: Tensor) -> _Directions:
        unit, inverse = unit_rows(state)
        norm = torch.where(inverse == 0, 0.0, 1 / inverse)
        return cls(state, unit, norm.squeeze(-1))

    def to(self, device: torch.device) -> _Directions:
        return _Directions(self.state.to(device), self.unit.to(device), self.norm.to(device))


@dataclass
class BatchStatistics:
    """Sums over the tokens of one batch. Observes a decoder's forward pass.

    The P places are the states h_0 .. h_L and, if there is a final norm, its output in the place of h_L.
    """

    batch: Batch
    num_layers: int
    has_final_norm: bool = True
    _sums: list[Tensor] = field(default_factory=list)
    _largest: list[Tensor] = field(default_factory=list)
    _mask: Tensor | None = None
    _before: _Directions | None = None

    def layer(self, number: int, layer_input: Tensor, layer_output: Tensor) -> None:
        """Add layer ``number``; states are ``[b, s, h]``."""
        before = self._before
        if before is None or not _is_same(before.state, layer_input):
            before = _Directions.of(layer_input.to(layer_output.device))
        if number == 1:
            nothing = torch.zeros_like(before.norm)
            self._add(nothing, before.norm, nothing)
        after = _Directions.of(layer_output)
        self._add_turn(before, after)
        # The final norm's output is compared with the same input as the last layer's.
        self._before = before if number == self.num_layers else after

    def final_norm(self, normed: Tensor) -> None:
        """Add the final norm's output as if it were the last layer's."""
        assert self._before is not None
        self._add_turn(self._before.to(normed.device), _Directions.of(normed))
        self._before = None

    def largest(self) -> Tensor:
        """The largest norm of the first token, and of the other tokens, of each sequence, ``[2, P, b]``."""
        return torch.stack([both.cpu() for both in self._largest], dim=1)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Over the first token and over the other tokens of each sequence, ``[6, P, b]`` float64 each."""
        places = self.num_layers + 1 + self.has_final_norm
        assert len(self._sums) == places, "a layer ran twice, or not at all"
        first, rest = torch.stack([both.cpu() for both in self._sums], dim=2).unbind(0)
        return first, rest

    def _add_turn(self, before: _Directions, after: _Directions) -> None:
        psi = displacement_of_units(before.unit, after.unit)
        self._add(psi, after.norm, update_ratios(before.state, after.state, before.norm))

    def _add(self, psi: Tensor, norm: Tensor, update: Tensor) -> None:
        if self._mask is None or self._mask.device != psi.device:
            places = torch.arange(psi.shape[1], device=psi.device)
            self._mask = places < self.batch.lengths.to(psi.device)[:, None]
        # arccos(cos) of cos = 1 - 2 psi, in the form that is exact for small angles.
        angle = psi.clamp(0, 1).sqrt().asin() * (2 / math.pi)
        values = torch.stack((psi, psi.square(), angle, norm, norm.square(), update)).double()
        values = torch.where(self._mask, values, 0.0)  # padding may be anything
        self._sums.append(torch.stack((values[..., 0], values[..., 1:].sum(dim=-1))))
        others = values[NORM].clone()
        others[..., 0] = 0.0
        self._largest.append(torch.stack((values[NORM, ..., 0], others.amax(dim=-1))))


@dataclass
class Mean:
    """The mean over texts of their means over tokens, ``total / texts``."""

    total: Tensor | float = 0.0
    """``[6, P]``; a plain 0 while there is no text."""
    largest: Tensor | float = 0.0
    """The largest norm of a token, ``[P]``."""
    texts: int = 0
    tokens: int = 0


class TextStatistics:
    """Means over texts, with each sequence's first token and without it.

    A text's windows are added in order. It counts when its last window is added.
    """

    def __init__(self) -> None:
        self.means = (Mean(), Mean())
        self._sums: Tensor | float = 0.0
        self._tokens = [0, 0]

    def add(self, window: Window, first: Tensor, rest: Tensor, largest: Tensor) -> None:
        """Add a sequence's sums over its first token and over the others, ``[6, P]`` each, and the largest
        norms of both, ``[2, P]``."""
        for mean, norms in zip(self.means, (largest.amax(dim=0), largest[1]), strict=True):
            mean.largest = torch.maximum(norms, torch.as_tensor(mean.largest, dtype=norms.dtype))
        self._sums = self._sums + torch.stack((first + rest, rest))
        for which, tokens in enumerate((len(window.ids), len(window.ids) - 1)):
            self._tokens[which] += tokens
        if not window.is_last:
            return
        for mean, sums, tokens in zip(self.means, self._sums, self._tokens, strict=True):
            if tokens:
                mean.total = mean.total + sums / tokens
                mean.texts += 1
                mean.tokens += tokens
        self._sums, self._tokens = 0.0, [0, 0]


def _is_same(a: Tensor, b: Tensor) -> bool:
    # `a` is held, so its memory belongs to no other tensor.
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
