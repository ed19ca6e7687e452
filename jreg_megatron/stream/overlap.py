"""Megatron's schedule for experts, ``overlap_moe_expert_parallel_comm``: neither model nor layer is called.

Of each micro-batch a model chunk makes a plan. In it a layer is a few nodes. Each node has a graph of its
own, which begins at leaves with the memory of what the nodes before returned. Nodes of one micro-batch's
forward pass and of another's backward pass take turns, on two CUDA streams. So a chunk still has at most one
micro-batch that goes forward, and the taps work as usual once they know of a plan's passes.

Why gradients are exact: a layer's first node begins at a leaf, the layer's input, and its last node returns
the layer's output. The backward pass of the last node runs first, and leaves what a method adds for the input
in the leaf's ``grad``. There the first node's backward pass adds its own, and the sum is what goes to the
layer below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

SETTING = "overlap_moe_expert_parallel_comm"


def on_passes(
    chunk: nn.Module,
    before: Callable[..., None],
    after: Callable[..., None],
    on_plan: Callable[[Any], None] | None = None,
) -> Callable[[], None]:
    """Call functions around each forward pass of a chunk, whether the model is called or makes a plan.

    Args:
        chunk: unwrapped.
        before: as a forward pre-hook with named arguments.
        after: as a forward hook. If a pass of the model itself breaks off, its output is None.
        on_plan: is given each plan, behind ``before``.

    Returns:
        What takes them off again.
    """
    hooks = [
        chunk.register_forward_pre_hook(before, with_kwargs=True),
        chunk.register_forward_hook(after, always_call=True),
    ]
    whole: Any = chunk
    build = whole.build_schedule_plan if getattr(whole.config, SETTING, False) else None
    is_over = False

    def planned(*given: Any, **named: Any) -> Any:
        assert build is not None
        plan = build(*given, **named)
        if not is_over:
            before(chunk, given, named)
            if on_plan is not None:
                on_plan(plan)
            wrap(_last_node(plan), lambda _, output: after(chunk, given, output))
        return plan

    def end() -> None:
        nonlocal is_over
        is_over = True
        for hook in hooks:
            hook.remove()
        if build is not None and whole.build_schedule_plan is planned:
            del whole.build_schedule_plan
            if whole.build_schedule_plan != build:  # somebody else's, which was there before
                whole.build_schedule_plan = build

    if build is not None:
        whole.build_schedule_plan = planned
    return end


def layers_of(plan: Any) -> Iterator[tuple[Any, Any]]:
    """The first and the last node of each layer of a plan; behind the decoder's come those of multi-token
    prediction."""
    for number in range(plan.num_layers()):
        layer = plan.get_layer(number)
        yield layer.pre_dispatch_computation, _last_of(layer.mlp, layer.moe_combine, layer.mtp_post_process)


def wrap(node: Any, after: Callable[[Any, Any], None], before: Callable[[Any], None] | None = None) -> None:
    """Call functions around a node's forward pass, in its stream: with its first input, a leaf, and its
    output. No node is kept: Megatron frees its memory as soon as the last reference is gone."""
    forward = node.forward_func

    def around(*inputs: Any) -> Any:
        state = inputs[0] if inputs else None
        if before is not None:
            before(state)
        output = forward(*inputs)
        after(state, output)
        return output

    node.forward_func = around


def _last_node(plan: Any) -> Any:
    nodes = [plan.pre_process, *(last for _, last in layers_of(plan))]
    return _last_of(*nodes, plan.post_process)


def _last_of(*nodes: Any) -> Any:
    """The last one that does something; what a dense layer lacks of an expert layer is a node without
    function."""
    return [node for node in nodes if hasattr(node, "forward_func")][-1]
