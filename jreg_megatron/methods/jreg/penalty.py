"""The regularizer's gradient as an autograd node on the residual stream, with no loss tensor to carry.

The model's forward values do not change, and the forward pass does nothing. When the ordinary backward pass
reaches a layer's output, the node computes displacement and gradients in one go and adds the gradient of
``coefficient * sum over tokens of Psi`` to the incoming gradient. So there is no second forward or backward
pass, no extra output of the model, and nothing for a pipeline stage to send; only the two states are kept.

A state between two regularized layers gets a gradient from both. The upper layer's node does not compute its
part, but hands the lower layer's node what that one needs to add both parts at once. This saves a gradient
that autograd would have to add. If the layer below has no node, or another operation lies between, the upper
layer's node computes that gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.methods.jreg.kernels import Above, Kernels, Rows
from jreg_megatron.runtime.errors import UserError


@dataclass(slots=True)
class Strength:
    """How strongly a layer is regularized, and by what."""

    kernels: Kernels
    coefficient: Tensor
    """Float32 tensor of one element. The backward pass reads it, so it can be a fixed buffer that is refilled
    between steps."""
    factor: float
    """Constant part of the coefficient."""
    token_weights: Tensor | None = None
    """``[...]``, the weight of each token; 1 by default."""
    rows: Rows | None = None
    """The tokens that have a gradient, along the states' first axis; by default all have."""


def add_displacement_gradient(
    h_in: Tensor, h_out: Tensor, strength: Strength, on_psi: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Let the backward pass add ``coefficient * factor * d(sum of weight * Psi)`` to both states' gradients.

    Args:
        h_in: the layer's input, ``[..., h]``.
        h_out: the layer's output, ``[..., h]``; it must require a gradient, or nothing will happen.
        strength: what is added.
        on_psi: is given Psi ``[...]`` (float32, no graph) in the backward pass; not where only some rows
            have a gradient.

    Returns:
        ``h_out`` with the same value, to be used in its place.
    """
    witness = _WITNESS if isinstance(h_in.grad_fn, _Node) else None
    out: Tensor = _AddDisplacementGradient.apply(h_in, h_out, strength, on_psi, witness)
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
        ctx: Any,
        h_in: Tensor,
        h_out: Tensor,
        strength: Strength,
        on_psi: Callable[[Tensor], None] | None,
        witness: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(h_in, h_out, strength.token_weights)
        # The coefficient is not saved: refilling it between steps must not trip autograd's version check.
        ctx.strength, ctx.on_psi = strength, on_psi
        ctx.handed = None
        return h_out.detach()  # returned as it is, it would be a view, which the pipeline refuses to free

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        h_in, h_out, token_weights = ctx.saved_tensors
        strength: Strength = ctx.strength
        above, ctx.handed = _handed_to(ctx), None  # not kept: it holds a state
        below = _node_below(ctx, h_in)
        grad_in, grad_total, psi, handed = strength.kernels.gradients(
            h_in,
            h_out,
            grad_out,
            strength.coefficient,
            strength.factor,
            token_weights,
            needs_grad_in=ctx.needs_input_grad[0],
            needs_psi=ctx.on_psi is not None,
            above=above,
            hands_down=below is not None,
            rows=strength.rows,
        )
        if below is not None:
            below.handed = torch._C._current_graph_task_id(), handed
        if ctx.on_psi is not None:
            ctx.on_psi(psi)
        return grad_in, grad_total, None, None, None


_Node: Any = _AddDisplacementGradient._backward_cls
"""Autograd's node of the function above: a ``ctx`` is one, and is the ``grad_fn`` of what was returned."""

_WITNESS = torch.empty(0, device="cpu", requires_grad=True)
"""An input of linked nodes that gets no gradient. It is in the graph to tell which kind of pass this is."""


def _node_below(ctx: Any, h_in: Tensor) -> Any:
    """The node to hand down to; None if autograd is to have the gradient for ``h_in``.

    The node below runs later in the same pass, as there is an edge to it. But the gradient of ``h_in`` must
    be whole if somebody looks at it. Of a pass that is asked for some gradients we cannot know whether this
    is one of them. And where two layers have one input, the second finds the place taken. A hook on a state
    that is offloaded in between is not seen: it gets the gradient without what is handed down.
    """
    if len(ctx.next_functions) < 3:
        return None
    (below, _), _, (witness, _) = ctx.next_functions
    goes_everywhere = torch._C._will_engine_execute_node(witness)
    is_watched = h_in._backward_hooks or h_in.retains_grad
    ours, theirs = ctx.strength, below.strength
    is_alike = theirs.kernels is ours.kernels and theirs.rows == ours.rows
    if not goes_everywhere or is_watched or not is_alike:
        return None
    return None if _handed_to(below) is not None else below


def _handed_to(ctx: Any) -> Above | None:
    """What a node was handed in this pass. A pass that broke off may have left something else there."""
    if ctx.handed is None or ctx.handed[0] != torch._C._current_graph_task_id():
        return None
    above: Above = ctx.handed[1]
    return above


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
        found = strength.kernels.gradients(
            h_in,
            h_out,
            grad,
            strength.coefficient,
            strength.factor,
            token_weights,
            needs_psi=False,
            rows=strength.rows,
        )
        return grad, found.grad_in, None, None
