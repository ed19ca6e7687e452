"""Displacement and its gradients in plain torch, on any device and in any floating type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return _psi(difference, has_no_direction).squeeze(-1)

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
        psi = _psi(difference, has_no_direction)
        strength = coefficient.to(a.dtype) * (-0.5 * factor)
        if token_weights is not None:
            strength = strength * token_weights.unsqueeze(-1)
        twice = 2 * psi
        grad_in = None
        if needs_grad_in:
            grad_in = u.mul_(twice).sub_(difference).mul_(inverse_in.mul_(strength)).to(h_in.dtype)
        total = v.mul_(twice).add_(difference).mul_(inverse_out.mul_(strength)).add_(grad_out)
        return grad_in, total.to(h_out.dtype), psi.squeeze(-1)


KERNELS = TorchKernels()


def computed_in(h_in: Tensor, h_out: Tensor) -> torch.dtype:
    """The type that is computed in: float32, or float64 if a state has it."""
    return torch.promote_types(torch.promote_types(h_in.dtype, h_out.dtype), torch.float32)


def _widened(h_in: Tensor, h_out: Tensor) -> tuple[Tensor, Tensor]:
    dtype = computed_in(h_in, h_out)
    return h_in.to(dtype), h_out.to(dtype)


def _norms(h: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return norms


def _psi(difference: Tensor, has_no_direction: Tensor) -> Tensor:
    """``|u - v|^2 / 4`` of unit rows, ``[..., 1]``; see :func:`jreg_megatron.formulas.displacement`."""
    psi: Tensor = _norms(difference).square_().mul_(0.25).masked_fill_(has_no_direction, 0.5)
    return psi
