"""A stand-in for a CUDA graph of a layer and for its capture, in a process without a GPU.

Megatron's own code decides what is captured, what is replayed and what runs without a graph. This file has
the graph and its memory. As with Transformer Engine's graphs, a layer has one graph for each micro-batch in
flight. A replay reads and writes the same memory each time. After the layer's backward pass the memory
belongs to the next graph; NaN is written into it to show this.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from megatron.core.transformer import cuda_graphs, transformer_layer
from torch import Tensor

from jreg_megatron.selftest.layouts import Layout
from jreg_megatron.stream.anatomy import unwrap

REPLAYS: list[int] = []
"""The number of each layer that was replayed."""

_RELEASED: list[Tensor] = []
"""Memory that the next graph may write into."""

_UNUSED = ("attention_mask", "is_first_microbatch")


def capture(models: list[Any], config: Any, layout: Layout) -> None:
    """Replaces ``selftest.step.capture_graphs``."""
    package: Any = ModuleType("transformer_engine")  # a replay only looks whether it is there
    package.pytorch = ModuleType("transformer_engine.pytorch")
    sys.modules |= {module.__name__: module for module in (package, package.pytorch)}
    transformer_layer.is_te_min_version = lambda *_: True
    count = layout.num_microbatches if layout.pipeline > 1 or layout.overlap else 1
    for model in models:
        for layer in unwrap(model).decoder.layers:
            if cuda_graphs._layer_is_graphable(layer, config):
                layer.cuda_graphs = [Graph(layer) for _ in range(count)]
                if model.ddp_config.overlap_param_gather:
                    layer.setup_manual_hooks(model._make_forward_pre_hook)
        model.zero_grad_buffer()


class Graph:
    """A graph of a layer, or of a part of it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._given: Tensor | None = None
        self._returned: tuple[Tensor, ...] = ()
        self._gradient: Tensor | None = None
        self._graph: tuple[Tensor, ...] = ()
        self._returns_tuple = True

    def __call__(self, state: Tensor, **named: Any) -> Any:
        # A mask of zeros means no mask. Only to Transformer Engine it is causal.
        self._named = {name: value for name, value in named.items() if name not in _UNUSED}
        REPLAYS.append(self._layer.layer_number)
        outputs: tuple[Tensor, ...] = _Replay.apply(self, state, *self._layer.parameters())
        return outputs if self._returns_tuple else outputs[0]

    def run(self, state: Tensor) -> tuple[Tensor, ...]:
        _take_released()
        if self._given is None:
            self._given = torch.empty_like(state).requires_grad_()
            self._gradient = torch.empty_like(state)
        with torch.no_grad():
            self._given.copy_(state)
        # Code in here is captured. Megatron must see it as a capture, and nothing else.
        cuda_graphs._set_capture_start()  # type: ignore[no-untyped-call]
        try:
            with torch.enable_grad():
                captured = self._layer._te_cuda_graph_capture(self._given, attention_mask=None, **self._named)
                self._returns_tuple = isinstance(captured, tuple)
                self._graph = captured if self._returns_tuple else (captured,)
        finally:
            cuda_graphs._set_capture_end()  # type: ignore[no-untyped-call]
        if not self._returned:
            self._returned = tuple(torch.empty_like(output) for output in self._graph)
        for memory, output in zip(self._returned, self._graph, strict=True):
            memory.copy_(output.detach())
        return tuple(memory.detach() for memory in self._returned)

    def run_back(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        _take_released()
        parameters = tuple(self._layer.parameters())
        assert self._given is not None and self._gradient is not None
        ends = [pair for pair in zip(self._graph, gradients, strict=True) if pair[0].requires_grad]
        of_state, *of_parameters = torch.autograd.grad(
            [output for output, _ in ends],
            [self._given, *parameters],
            [gradient for _, gradient in ends],
            allow_unused=True,
        )
        self._gradient.copy_(of_state)
        _RELEASED.extend(memory for memory in self._returned if memory.is_floating_point())
        return self._gradient.detach(), *of_parameters


def _take_released() -> None:
    while _RELEASED:
        _RELEASED.pop().fill_(float("nan"))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, state: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        outputs = graph.run(state)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.graph.run_back(gradients)
