"""Displacement and its gradients in plain torch, on any device and in any floating type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LONGEST_SUM, _SHORTEST_PIECE = 1024, 64


@dataclass(frozen=True)
class TorchKernels:
    """See :class:`jreg_megatron.kernels.Kernels`. In place where it can be: memory is what takes the time."""

    name: str = "torch"

    @torch.no_grad()
    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        """Psi of every token."""
        a, b = _widened(h_in, h_out)
        norm_in, norm_out = _norms(a), _norms(b)
        has_no_direction = torch.minimum(norm_in, norm_out) == 0
        # 0/0 where a row has no direction; _psi puts its own value there.
        difference = (a * norm_in.reciprocal_()).addcmul_(b, norm_out.reciprocal_(), value=-1)
        return _psi(_norms(difference).square_(), has_no_direction)

    @torch.no_grad()
    def gradients(
        self,
        h_in: Tensor,
        h_out: Tensor,
        grad_out: Tensor,
        coefficient: Tensor,
        factor: float,
        token_weights: Tensor | None = None,
        needs_grad_in: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradients for both states, and Psi."""
        a, b = _widened(h_in, h_out)
        inverse_in, inverse_out = _norms(a), _norms(b)
        has_no_direction = torch.minimum(inverse_in, inverse_out) == 0
        for inverse in (inverse_in, inverse_out):
            inverse.reciprocal_().masked_fill_(has_no_direction, 0.0)
        u, v = a * inverse_in, b * inverse_out
        difference = u - v
        square = _norms(difference).square_()
        twice_psi = square * 0.5
        strength = coefficient.to(a.dtype) * (0.5 * factor)
        if token_weights is not None:
            strength = strength * token_weights.unsqueeze(-1)
        grad_in = None
        if needs_grad_in:
            bracket = torch.addcmul(difference, u, twice_psi, value=-1)
            grad_in = bracket.mul_(inverse_in.mul_(strength)).to(h_in.dtype)
        bracket = difference.addcmul_(v, twice_psi)
        total = torch.addcmul(grad_out.to(a.dtype), bracket, inverse_out.mul_(strength), value=-1)
        return grad_in, total.to(h_out.dtype), _psi(square, has_no_direction)


KERNELS = TorchKernels()


def computed_in(h_in: Tensor, h_out: Tensor) -> torch.dtype:
    """The type that is computed in: float32, or float64 if a state has it."""
    return torch.float64 if torch.float64 in (h_in.dtype, h_out.dtype) else torch.float32


def _widened(h_in: Tensor, h_out: Tensor) -> tuple[Tensor, Tensor]:
    dtype = computed_in(h_in, h_out)
    return h_in.to(dtype), h_out.to(dtype)


def _norms(h: Tensor) -> Tensor:
    width = h.shape[-1]
    piece = math.gcd(width, _LONGEST_SUM)
    if width > _LONGEST_SUM and piece >= _SHORTEST_PIECE:
        # A CPU adds up a row nearly one by one; in two steps a wide one keeps its last digits.
        h = torch.linalg.vector_norm(h.reshape(*h.shape[:-1], -1, piece), dim=-1)
    norms: Tensor = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return norms


def _psi(square: Tensor, has_no_direction: Tensor) -> Tensor:
    """``|u - v|^2 / 4`` of unit rows; see :func:`jreg_megatron.formulas.displacement`."""
    return square.mul_(0.25).masked_fill_(has_no_direction, 0.5).squeeze(-1)
