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
        return _displacement(a, b, *_norms_of_both(a, b))

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
        norm_in, norm_out, has_no_direction = _norms_of_both(a, b)
        psi = _displacement(a, b, norm_in, norm_out, has_no_direction) if needs_psi else None
        strength = coefficient.to(a.dtype) * (-0.5 * factor)
        if token_weights is not None:
            strength = strength * token_weights.unsqueeze(-1)
        across = strength / (norm_in * norm_out)
        along = (a * b).sum(dim=-1, keepdim=True).mul_(across)
        grad_in = None
        if needs_grad_in:
            grad_in = (b * across).addcmul_(a, along / norm_in.square_(), value=-1).to(h_in.dtype)
        total = torch.addcmul(grad_out.to(a.dtype), a, across)
        total = total.addcmul_(b, along / norm_out.square_(), value=-1).to(h_out.dtype)
        return grad_in, total, psi


KERNELS = TorchKernels()


def computed_in(h_in: Tensor, h_out: Tensor) -> torch.dtype:
    """The type that is computed in: float32, or float64 if a state has it."""
    return torch.float64 if torch.float64 in (h_in.dtype, h_out.dtype) else torch.float32


def _widened(h_in: Tensor, h_out: Tensor) -> tuple[Tensor, Tensor]:
    dtype = computed_in(h_in, h_out)
    return h_in.to(dtype), h_out.to(dtype)


def _norms_of_both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norms ``[..., 1]``, infinite for rows of norm zero, and which tokens have such a row."""
    norms = _norms(a), _norms(b)
    zero = [norm == 0 for norm in norms]
    for norm, is_zero in zip(norms, zero, strict=True):
        norm.masked_fill_(is_zero, math.inf)  # then all that is divided by it is 0
    return *norms, zero[0].logical_or_(zero[1])


def _displacement(
    a: Tensor, b: Tensor, norm_in: Tensor, norm_out: Tensor, has_no_direction: Tensor
) -> Tensor:
    difference = (a * norm_in.reciprocal()).addcmul_(b, norm_out.reciprocal(), value=-1)
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
