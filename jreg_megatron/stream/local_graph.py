"""Megatron's own CUDA graphs of layers, ``--cuda-graph-impl local``.

The first training step runs without graphs. Megatron records which modules ran forward and backward, and in
which order; at the step's end it captures a graph of each, in that order. All graphs share one pool of
memory. What no later capture needs is free for the next, so a replay overwrites it. Replays come in the
recorded order too, so a tensor is intact as long as Megatron held it among the captures.

A method's node is between the graphs. It needs the layer's output until that layer's own backward pass, and
the layer's input, which is the output of the layer before. Megatron holds an output so long if a node saved
it in the recorded step. A method may begin later, so each layer's output is marked as saved (:func:`keep`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from jreg_megatron.runtime.errors import UserError


def are_captured() -> bool:
    """Whether the graphs are there, so that no module's own code runs in training any more."""
    from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

    return bool(_CudagraphGlobalRecord.cudagraph_created)


def refuse_recorded() -> None:
    """Refuse a model of which Megatron has recorded passes that did not keep the layers' states.

    Raises:
        UserError: if a step has run.
    """
    from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

    if are_captured() or _CudagraphGlobalRecord.cudagraph_record:
        raise UserError(
            "attach was called after a training step with cuda_graph_impl local, whose graphs do not keep "
            "the layers' states; call attach before the first step"
        )


def go_around(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Go around all of a layer or sub-layer, if it has, or will have, a graph of its own.

    Args:
        module: the layer or sub-layer.
        around: is called in the place of what may be replayed, with that and its arguments.

    Returns:
        What takes it off again.
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

    # A call looks for __call__ in the class alone. The manager stays the same, since Megatron takes it from
    # the layer and gives it back.
    manager.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    return undo


def go_around_experts(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Go around router, experts and the last bias-dropout-add, if the first and the last have graphs."""
    if not getattr(module, "use_partial_cudagraphs", False):
        return _nothing

    def undo() -> None:
        del module._forward_mlp

    module._forward_mlp = functools.partial(around, module._forward_mlp)
    return undo


def _nothing() -> None:
    pass


def keep(output: Tensor, shown: Tensor) -> None:
    """Have the graphs that are being recorded leave a layer's output alone until its backward pass.

    Args:
        output: what the layer returned.
        shown: what the model goes on with. If it is the same memory, the next graph may read it there.
    """
    from megatron.core.transformer import cuda_graphs

    cuda_graphs._tag_cudagraph_buffer_saved_for_backward(output)
    if shown.data_ptr() == output.data_ptr():
        shown.cg_buffer_metadata = output.cg_buffer_metadata  # type: ignore[attr-defined]
