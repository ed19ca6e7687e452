"""Displacement and its gradients in plain torch, on any device and in any floating type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LONGEST_SUM, _SHORTEST_PIECE = 1024, 64


@dataclass(frozen=True)
class TorchKernels:
    """See ``Kernels``. In place where it can be: memory is what takes the time."""

    why: str = ""
    """The reason for which they stand in for others, if they do."""

    @property
    def kind(self) -> str:
        return "torch"

    @property
    def name(self) -> str:
        return f"{self.kind}, as {self.why}" if self.why else self.kind

    @torch.no_grad()
    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        """Psi of every token, as ``|u - v|^2 / 4``; see ``formulas.displacement``."""
        a, b = _widened(h_in, h_out)
        return _displacement(a, b, _divisors(a), _divisors(b))

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
        needs_psi: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The gradients for both states, and Psi.

        The brackets times the unit vectors' norms, ``b - (a.b / |a|^2) a`` and ``a - (a.b / |b|^2) b``: fewer
        passes over memory, and the same digits, as a state is rounded like its unit vector.
        """
        a, b = _widened(h_in, h_out)
        of_a, of_b = _divisors(a), _divisors(b)
        psi = _displacement(a, b, of_a, of_b) if needs_psi else None
        norm_in, norm_out = of_a[0], of_b[0]
        strength = coefficient.to(a.dtype) * (-0.5 * factor)
        if token_weights is not None:
            strength = strength * token_weights.unsqueeze(-1)
        across = strength / (norm_in * norm_out)
        # Fresh memory costs more than arithmetic: the product's is used once more, for the result.
        product = a * b
        along = product.sum(dim=-1, keepdim=True).mul_(across)
        grad_in = None
        if needs_grad_in:
            grad_in = (b * across).addcmul_(a, along / (norm_in * norm_in), value=-1).to(h_in.dtype)
        total = torch.addcmul(grad_out.to(a.dtype), a, across, out=product)
        total = total.addcmul_(b, along / (norm_out * norm_out), value=-1).to(h_out.dtype)
        return grad_in, total, psi


KERNELS = TorchKernels()


def computed_in(h_in: Tensor, h_out: Tensor) -> torch.dtype:
    """The type that is computed in: float32, or float64 if a state has it."""
    return torch.float64 if torch.float64 in (h_in.dtype, h_out.dtype) else torch.float32


def _widened(h_in: Tensor, h_out: Tensor) -> tuple[Tensor, Tensor]:
    dtype = computed_in(h_in, h_out)
    return h_in.to(dtype), h_out.to(dtype)


def _divisors(h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows' norms ``[..., 1]``, infinite where they are 0, for what is divided by them to be 0; and where."""
    norm = _norms(h)
    is_zero = norm == 0
    return norm.masked_fill_(is_zero, math.inf), is_zero


def _displacement(a: Tensor, b: Tensor, of_a: tuple[Tensor, Tensor], of_b: tuple[Tensor, Tensor]) -> Tensor:
    (norm_in, is_zero), (norm_out, is_zero_too) = of_a, of_b
    difference = (a * norm_in.reciprocal()).addcmul_(b, norm_out.reciprocal(), value=-1)
    has_no_direction = is_zero.logical_or(is_zero_too)
    return _norms(difference).square_().mul_(0.25).masked_fill_(has_no_direction, 0.5).squeeze(-1)


def _norms(h: Tensor) -> Tensor:
    width = h.shape[-1]
    if width > _LONGEST_SUM:
        # A CPU adds up a row nearly one by one; in two steps or in float64 a wide one keeps its last digits.
        piece = math.gcd(width, _LONGEST_SUM)
        if piece < _SHORTEST_PIECE:
            return _norm(h.double()).to(h.dtype)
        h = torch.linalg.vector_norm(h.reshape(*h.shape[:-1], -1, piece), dim=-1)
    return _norm(h)


def _norm(h: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return norm
