"""The regularizer's gradient as an autograd node on the residual stream, with no loss tensor to carry.

The forward value of the model is untouched. When the ordinary backward pass reaches a layer's output,
the node adds the gradient of ``coefficient * sum over tokens of Psi`` to what flows by. No second
forward or backward pass, no extra output of the model, nothing for a pipeline stage to send.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jreg_megatron.formulas import displacement, displacement_of_units, unit_rows


def measure_displacement(h_in: Tensor, h_out: Tensor) -> Tensor:
    """Displacement of every token, without a gradient.

    Args:
        h_in: ``[..., h]``.
        h_out: ``[..., h]``.

    Returns:
        Psi ``[...]``, float32, in [0, 1].
    """
    with torch.no_grad():
        return displacement(h_in, h_out)


def add_displacement_gradient(
    h_in: Tensor, h_out: Tensor, coefficient: Tensor, factor: float, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let the backward pass add ``coefficient * factor * d(sum of weight * Psi)`` to both states' gradients.

    Args:
        h_in: the layer's input, ``[..., h]``.
        h_out: the layer's output, ``[..., h]``.
        coefficient: float32 tensor of one element. It is read when the backward pass gets here, so a
            fixed buffer may be refilled between steps (which a captured CUDA graph needs).
        factor: constant part of the coefficient.
        token_weights: ``[...]``, what each token counts for; by default each counts 1.

    Returns:
        ``h_out`` with the same value, to be used in its place, and Psi ``[...]`` (float32, no gradient).
    """
    out: tuple[Tensor, Tensor] = _AddDisplacementGradient.apply(
        h_in, h_out, coefficient, factor, token_weights
    )
    return out


def add_input_gradient(
    carrier: Tensor,
    h_in: Tensor,
    h_out: Tensor,
    coefficient: Tensor,
    factor: float,
    token_weights: Tensor | None = None,
) -> Tensor:
    """As :func:`add_displacement_gradient`, for ``h_in`` alone, when the backward pass reaches ``carrier``.

    For a layer that is recomputed after the backward pass has been through ``h_out``.

    Returns:
        ``carrier`` with the same value, to be used in its place.
    """
    turned, _ = add_displacement_gradient(h_in, h_out.detach(), coefficient, factor, token_weights)
    carried: Tensor = _CarryNode.apply(carrier, turned)
    return carried


class _CarryNode(torch.autograd.Function):
    """Puts the node of ``passenger`` on the way of ``carrier``, without a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, passenger: Tensor) -> Tensor:
        return carrier

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


class _AddDisplacementGradient(torch.autograd.Function):
    """``Psi = (1 - u.v) / 2`` with ``u = a / |a|``, ``v = b / |b|`` has the gradients

    ``dPsi/da = -(v - (u.v) u) / (2 |a|)`` and ``dPsi/db = -(u - (u.v) v) / (2 |b|)``.

    With ``u.v = 1 - 2 Psi`` the brackets are ``(v - u) + 2 Psi u`` and ``(u - v) + 2 Psi v``, which
    keeps their digits where the two states nearly agree. Rows of norm zero get zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_in: Tensor,
        h_out: Tensor,
        coefficient: Tensor,
        factor: float,
        token_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u, inverse_norm_in = unit_rows(h_in)
        v, inverse_norm_out = unit_rows(h_out)
        psi = displacement_of_units(u, v)
        ctx.save_for_backward(h_in, h_out, inverse_norm_in, inverse_norm_out, psi, token_weights)
        # Not a saved tensor: refilling the buffer between steps must not trip autograd's version check.
        ctx.coefficient = coefficient
        ctx.factor = factor
        ctx.mark_non_differentiable(psi)
        return h_out, psi

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        h_in, h_out, inverse_norm_in, inverse_norm_out, psi, token_weights = ctx.saved_tensors
        psi = psi.unsqueeze(-1)
        u = h_in * inverse_norm_in
        v = h_out * inverse_norm_out
        both_have_direction = (inverse_norm_in != 0) & (inverse_norm_out != 0)
        scale = torch.where(both_have_direction, -0.5 * ctx.factor * ctx.coefficient.to(psi.dtype), 0.0)
        if token_weights is not None:
            scale = scale * token_weights.unsqueeze(-1)
        grad_in = None
        if ctx.needs_input_grad[0]:
            grad_in = ((v - u + 2 * psi * u) * (scale * inverse_norm_in)).to(h_in.dtype)
        grad = (u - v + 2 * psi * v) * (scale * inverse_norm_out)
        return grad_in, (grad_out + grad).to(h_out.dtype), None, None, None
