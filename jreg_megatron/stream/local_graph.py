"""Megatron's own CUDA graphs of layers, ``--cuda-graph-impl local``.

The first training step runs without graphs. Megatron records the order in which modules run forward and
backward. At the step's end it captures a graph of each, in that order. All graphs share one memory pool.
Memory that no later capture needs is reused, so a replay overwrites it. Replays follow the recorded order, so
a tensor stays intact for as long as Megatron held it during the captures.

A method's autograd node is between the graphs. It needs the layer's output and input until the layer's
backward pass; the input is the previous layer's output. Megatron holds an output that long if a node saved it
in the recorded step. A method may start later, so :func:`keep` marks each layer's output as saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jreg_megatron.runtime.errors import UserError


def are_captured() -> bool:
    """Whether the graphs exist. From then on no module's own code runs in training."""
    from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

    return bool(_CudagraphGlobalRecord.cudagraph_created)


def refuse_recorded() -> None:
    """Refuse a model whose passes Megatron has recorded or captured without the methods.

    Raises:
        UserError: if a training step has run, or graphs have generated text.
    """
    from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

    record = _CudagraphGlobalRecord
    if are_captured() or record.cudagraph_record or record.cudagraph_inference_record:
        raise UserError(
            "attach was called after a training step or text generation with cuda_graph_impl local; these "
            "graphs do not keep the layers' states and lack a method's changes; call attach before the first "
            "step, and before text is generated"
        )


def is_held(in_layers: bool) -> bool:
    """Whether graphs still contain the changes of a detached method.

    Args:
        in_layers: whether a layer's graph would contain them. A graph of text generation may always do.
    """
    from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

    return (in_layers and are_captured()) or bool(_CudagraphGlobalRecord.cudagraph_inference_record)


def go_around(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Call ``around`` instead of a layer or sub-layer, if it has, or will have, its own graph.

    Args:
        module: the layer or sub-layer.
        around: gets the function that may be replayed, and its arguments.

    Returns:
        A function that undoes this.
    """
    manager = getattr(module, "cudagraph_manager", None)
    if manager is None:
        return _nothing
    plain = type(manager)

    def call(self: Any, layer: Any, given: Any, named: Any, **options: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            return plain.__call__(self, layer, given, named, **options)

        return around(run, *given, **named)

    def undo() -> None:
        manager.__class__ = plain

    # Python looks up __call__ only in the class. The manager must stay the same object, because Megatron
    # takes it from the layer and puts it back.
    manager.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    return undo


def go_around_experts(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """As :func:`go_around`, for router, experts and the last bias-dropout-add, if the experts alone have no
    graph."""
    if not getattr(module, "use_partial_cudagraphs", False):
        return _nothing

    def undo() -> None:
        del module._forward_mlp

    module._forward_mlp = functools.partial(around, module._forward_mlp)
    return undo


def _nothing() -> None:
    pass


def apart(output: Tensor) -> Tensor:
    """A new tensor on the memory of a layer's output.

    Each replay returns the same tensor object. A method's hook on it would belong to the first replay only.
    """
    state: Tensor = _Apart.apply(output)
    return state


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.detach()  # else the result would be a view, which the pipeline refuses to free

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def keep(output: Tensor, shown: Tensor) -> None:
    """Make the graphs that are being recorded keep a layer's output until its backward pass.

    Args:
        output: the layer's return value.
        shown: the tensor with which the model continues. If it has the same memory, the next graph may read
            it there.
    """
    from megatron.core.transformer import cuda_graphs

    cuda_graphs._tag_cudagraph_buffer_saved_for_backward(output)
    if shown.data_ptr() == output.data_ptr():
        shown.cg_buffer_metadata = output.cg_buffer_metadata  # type: ignore[attr-defined]
