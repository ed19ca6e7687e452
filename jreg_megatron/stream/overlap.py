"""Megatron's overlapped schedule for experts, ``overlap_moe_expert_parallel_comm``.

It calls neither the model nor its layers. For each micro-batch a model chunk makes a plan. In the plan a
layer is a few nodes. Each node has its own autograd graph. The graph's leaves share the memory of the
previous nodes' outputs. Forward nodes of one micro-batch and backward nodes of another alternate, on two CUDA
streams. So a chunk still has at most one micro-batch in its forward pass. The taps work as usual if they
observe the plans' passes.

Why gradients are exact: a layer's first node begins at a leaf, the layer's input, and its last node returns
the layer's output. The last node's backward pass runs first. It leaves a method's gradient for the input in
the leaf's ``grad``. The first node's backward pass adds its own gradient there. The sum goes to the previous
layer.
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
        after: as a forward hook. If a pass of the model itself is aborted, its output is None.
        on_plan: called with each plan, after ``before``.

    Returns:
        A function that removes them.
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
            if whole.build_schedule_plan != build:  # other code had replaced it before
                whole.build_schedule_plan = build

    if build is not None:
        whole.build_schedule_plan = planned
    return end


def layers_of(plan: Any) -> Iterator[tuple[Any, Any]]:
    """The first and the last node of each layer of a plan. The layers of multi-token prediction come last."""
    for number in range(plan.num_layers()):
        layer = plan.get_layer(number)
        yield layer.pre_dispatch_computation, _last_of(layer.mlp, layer.moe_combine, layer.mtp_post_process)


def wrap(node: Any, after: Callable[[Any, Any], None], before: Callable[[Any], None] | None = None) -> None:
    """Call functions around a node's forward pass, in its stream.

    ``before`` gets the first input, a leaf. ``after`` gets this input and the output. The node is not kept,
    because Megatron frees its memory as soon as the last reference is gone.
    """
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
    """The last node that does something. A dense layer has nodes without a function in the experts' place."""
    return [node for node in nodes if hasattr(node, "forward_func")][-1]
