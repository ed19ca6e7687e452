"""The regularizer's gradient as an autograd node on the residual stream, with no loss tensor to carry.

The forward value of the model is untouched, and the forward pass does nothing at all. When the ordinary
backward pass reaches a layer's output, the node computes displacement and gradients in one go and adds the
gradient of ``coefficient * sum over tokens of Psi`` to what flows by. No second forward or backward pass, no
extra output of the model, nothing for a pipeline stage to send, nothing kept but the two states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.methods.jreg.kernels import Kernels
from jreg_megatron.runtime.errors import UserError


@dataclass(frozen=True)
class Strength:
    """How strongly a layer is regularized, and by what."""

    kernels: Kernels
    coefficient: Tensor
    """Float32 tensor of one element. It is read when the backward pass gets there, so a fixed buffer may be
    refilled between steps."""
    factor: float
    """Constant part of the coefficient."""
    token_weights: Tensor | None = None
    """``[...]``, what each token counts for; by default each counts 1."""


def add_displacement_gradient(
    h_in: Tensor, h_out: Tensor, strength: Strength, on_psi: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Let the backward pass add ``coefficient * factor * d(sum of weight * Psi)`` to both states' gradients.

    Args:
        h_in: the layer's input, ``[..., h]``.
        h_out: the layer's output, ``[..., h]``; it must require a gradient, or nothing will happen.
        strength: what is added.
        on_psi: is given Psi ``[...]`` (float32, no graph) in the backward pass.

    Returns:
        ``h_out`` with the same value, to be used in its place.
    """
    out: Tensor = _AddDisplacementGradient.apply(h_in, h_out, strength, on_psi)
    return out


def add_input_gradient(carrier: Tensor, h_in: Tensor, h_out: Tensor, strength: Strength) -> Tensor:
    """As :func:`add_displacement_gradient`, for ``h_in`` alone, when the backward pass reaches ``carrier``.

    For a layer that is recomputed after the backward pass has been through ``h_out``.

    Returns:
        ``carrier`` with the same value, to be used in its place.
    """
    carried: Tensor = _AddInputGradient.apply(carrier, h_in, h_out.detach(), strength)
    return carried


def _refuse_second_derivatives() -> None:
    # torch's once_differentiable would not do: autograd.grad stays silent about it.
    if torch.is_grad_enabled():
        raise UserError(
            "a backward pass with create_graph=True goes through a regularized layer, whose gradient has no "
            "derivative here; leave it out, or detach JREG for that pass"
        )


class _AddDisplacementGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_in: Tensor, h_out: Tensor, strength: Strength, on_psi: Callable[[Tensor], None] | None
    ) -> Tensor:
        ctx.save_for_backward(h_in, h_out, strength.token_weights)
        # The coefficient is not saved: refilling it between steps must not trip autograd's version check.
        ctx.strength, ctx.on_psi = strength, on_psi
        return h_out.detach()  # returned as it is, it would be a view, which the pipeline refuses to free

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        h_in, h_out, token_weights = ctx.saved_tensors
        strength: Strength = ctx.strength
        grad_in, grad_total, psi = strength.kernels.gradients(
            h_in,
            h_out,
            grad_out,
            strength.coefficient,
            strength.factor,
            token_weights,
            needs_grad_in=ctx.needs_input_grad[0],
            needs_psi=ctx.on_psi is not None,
        )
        if ctx.on_psi is not None:
            ctx.on_psi(psi)
        return grad_in, grad_total, None, None


class _AddInputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, h_in: Tensor, h_out: Tensor, strength: Strength) -> Tensor:
        ctx.save_for_backward(h_in, h_out, strength.token_weights)
        ctx.strength = strength
        return carrier.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        h_in, h_out, token_weights = ctx.saved_tensors
        strength: Strength = ctx.strength
        grad_in, _, _ = strength.kernels.gradients(
            h_in, h_out, grad, strength.coefficient, strength.factor, token_weights, needs_psi=False
        )
        return grad, grad_in, None, None
