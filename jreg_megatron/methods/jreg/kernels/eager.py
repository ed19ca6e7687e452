"""Displacement and its gradients in plain torch, on any device and in any floating type."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jreg_megatron.methods.jreg.kernels.handed import Above, Gradients, Rows

_LONGEST_SUM, _SHORTEST_PIECE = 1024, 64


@dataclass(frozen=True)
class TorchKernels:
    """See ``Kernels``. Works in place where possible, because memory traffic takes the time."""

    why: str = ""
    """Why they are used instead of Triton's, if that is so."""

    @property
    def kind(self) -> str:
        return "torch"

    @property
    def name(self) -> str:
        return f"{self.kind}, as {self.why}" if self.why else self.kind

    @torch.no_grad()
    def displacement(self, h_in: Tensor, h_out: Tensor) -> Tensor:
        """Psi of every token, as ``|u - v|^2 / 4``; see ``formulas.displacement``."""
        dtype = computed_in(h_in, h_out)
        a, b = _as(h_in, dtype), _as(h_out, dtype)
        return _displacement(a, b, _inverse_norms(a), _inverse_norms(b))

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
        above: Above | None = None,
        hands_down: bool = False,
        rows: Rows | None = None,
    ) -> Gradients:
        """The gradients for both states, Psi, and what is handed down.

        With ``a = h_in``, ``b = h_out``, ``scale = -coefficient * factor * weight / 2`` and
        ``along = scale * a.b / (|a| |b|)`` the gradients are

            for ``a``:  ``scale / (|a| |b|) * b - along / |a|^2 * a``
            for ``b``:  ``scale / (|a| |b|) * a - along / |b|^2 * b``

        These are the brackets of ``Kernels.gradients`` times the unit vectors' norms: fewer passes over
        memory, and the same digits, as a state is rounded like its unit vector. What is handed down is
        ``scale / (|a| |b|)``, ``along`` and ``1 / |a|``, ``[..., 1]`` each.

        Autograd must be off, as it is in a backward pass. A context to switch it off would cost a tenth.
        """
        if rows is not None:
            at = slice(rows.first, None, rows.stride)
            weights = None if token_weights is None else token_weights[at]
            of_rows = (h_in[at], h_out[at], grad_out[at], coefficient, factor, weights)
            found = self.gradients(*of_rows, needs_grad_in, False, above, hands_down)
            total = grad_out.to(h_out.dtype, copy=True)
            total[at] = found.total
            whole = None
            if found.grad_in is not None:
                whole = torch.zeros_like(h_in)
                whole[at] = found.grad_in
            return found._replace(total=total, grad_in=whole)
        dtype = computed_in(h_in, h_out)
        a, b, grad_out = _as(h_in, dtype), _as(h_out, dtype), _as(grad_out, dtype)
        inverse_in = _inverse_norms(a)
        if above is None:
            inverse_out = _inverse_norms(b)
        else:
            across_above, along_above, inverse_out = (_as(x, dtype) for x in above.numbers)
        psi = _displacement(a, b, inverse_in, inverse_out) if needs_psi else None
        scale = _as(coefficient, dtype) * (-0.5 * factor)
        if token_weights is not None:
            scale = scale * token_weights.unsqueeze(-1)
        across = (inverse_in * inverse_out).mul_(scale)
        # Fresh memory costs more than arithmetic: the product's is used once more, for the result.
        product = a * b
        along = along_both = product.sum(dim=-1, keepdim=True).mul_(across)
        total = torch.addcmul(grad_out, a, across, out=product)
        if above is not None:
            total.addcmul_(_as(above.h_out, dtype), across_above)
            along_both = along + along_above
        total.addcmul_(b, (along_both * inverse_out).mul_(inverse_out), value=-1)
        grad_in = handed = None
        if hands_down:
            handed = Above(h_out, (across, along, inverse_in))
        elif needs_grad_in:
            grad_in = (b * across).addcmul_(a, (along * inverse_in).mul_(inverse_in), value=-1)
            grad_in = _as(grad_in, h_in.dtype)
        return Gradients(grad_in, _as(total, h_out.dtype), psi, handed)


KERNELS = TorchKernels()


def computed_in(h_in: Tensor, h_out: Tensor) -> torch.dtype:
    """The type to compute in: float32, or float64 if a state has it."""
    return torch.float64 if torch.float64 in (h_in.dtype, h_out.dtype) else torch.float32


def _as(h: Tensor, dtype: torch.dtype) -> Tensor:
    return h if h.dtype is dtype else h.to(dtype)


def _inverse_norms(h: Tensor) -> Tensor:
    """The inverse norms of rows, ``[..., 1]``; 0 for a row of norm zero, so that products with it are 0."""
    return _norms(h).reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0)


def _displacement(a: Tensor, b: Tensor, inverse_in: Tensor, inverse_out: Tensor) -> Tensor:
    difference = (a * inverse_in).addcmul_(b, inverse_out, value=-1)
    psi = _norms(difference).square_().mul_(0.25)
    # A row that holds Inf has an inverse norm of 0 too; there Psi is NaN, which is not to be hidden.
    has_no_direction = (torch.minimum(inverse_in, inverse_out) == 0).logical_and_(psi.isfinite())
    return psi.masked_fill_(has_no_direction, 0.5).squeeze(-1)


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
