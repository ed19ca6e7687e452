"""A stand-in for CUDA and its memory pool under Megatron's own graphs of layers, without a GPU.

Megatron's own managers, runners and record decide what is recorded, captured and replayed, and how long
memory is held. This file has the graph, as in ``full_graph_stand_in``, and the pool that all graphs share.

A real pool may give a graph any memory that nobody holds. So a replay writes NaN into all memory of the pool
that was not held during its whole capture, except its own output. Autograd holds tensors that it saves within
a capture: Transformer Engine's modules save them with Python, which Megatron sees; torch's modules do not.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import full_graph_stand_in as full
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import cuda_graphs
from megatron.core.utils import MakeViewlessTensor
from torch import Tensor
from torch.utils._pytree import tree_map

REPLAYS = full.REPLAYS
"""How many operations each replay had."""

_POOL: dict[int, torch.UntypedStorage] = {}
"""Memory of the pool, by its address. It is never given back."""


def install() -> None:
    """Have Megatron's managers capture in graphs of this module."""
    full.install()
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = _Graph, _Capture
    cuda.default_generators = (None,)
    cuda.memory_stats = lambda *_: dict.fromkeys(
        ("allocated_bytes.all.current", "reserved_bytes.all.current"), 0
    )
    torch._C._cuda_beginAllocateCurrentThreadToPool = lambda *_: None  # type: ignore[attr-defined]
    torch._C._cuda_endAllocateToPool = lambda *_: None  # type: ignore[attr-defined]
    megatrons: Any = cuda_graphs
    allocate = megatrons.alloc_tensor_from_graph_mempool

    def allocate_in_pool(meta: Any) -> Tensor:
        allocated: Tensor = allocate(meta)
        _add(allocated.untyped_storage())
        return allocated

    megatrons.alloc_tensor_from_graph_mempool = allocate_in_pool
    end = megatrons._set_capture_end

    def end_captures() -> None:
        end()
        for storage in _POOL.values():
            full._bytes(storage).fill_(255)  # nothing has been computed

    megatrons._set_capture_end = end_captures
    megatrons._ensure_generator_state_is_cudagraph_safe = lambda generator: generator
    # Values of Transformer Engine.
    megatrons.HAVE_TE_GRAPHS = True
    megatrons.make_weak_ref = _weak
    megatrons.is_fp8_activation_recompute_enabled = lambda: False
    megatrons.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    megatrons.TransformerEngineBaseModule = transformer_engine.TECudaRNGStatesTracker = _Nothing
    _mend_pipelines()


def train(argv: list[str]) -> None:
    """``jreg_megatron.pretrain`` with such graphs. The last line has the number of replays of each size."""
    full.train(argv, install)


def _mend_pipelines() -> None:
    """Megatron-Core 0.19.2 runs no such graphs in a pipeline, for two reasons that are not ours.

    The output of a stage's last graph is freed when it is sent. A view cannot be freed, and the graph's own
    memory would be lost. The main branch has fixed this as here (pull request 6168). And micro-batches share
    one rotary embedding, which a stage must not do between a backward pass and the next forward pass.
    """
    runner: Any = cuda_graphs._CudaGraphRunner

    def viewless(run: Callable[..., Any]) -> Callable[..., Any]:
        def around(self: Any, *given: Any) -> Any:
            outputs = run(self, *given)
            if not (self.is_last_layer and self.deallocate_pipeline_outputs):
                return outputs
            return tree_map(
                lambda of: MakeViewlessTensor.apply(of, of.requires_grad) if torch.is_tensor(of) else of,
                outputs,
            )

        return around

    runner.record_graph_capture = viewless(runner.record_graph_capture)
    runner.replay_graph_capture = viewless(runner.replay_graph_capture)
    rotary: Any = RotaryEmbedding
    rotary.forward = rotary.forward.__wrapped__


class _Nothing:
    """No module is of this class."""


def _add(storage: torch.UntypedStorage) -> None:
    if storage.nbytes():
        _POOL[storage.data_ptr()] = storage


def _weak(tensor: Tensor) -> Tensor:
    """A tensor on the same memory that does not hold it."""
    storage = tensor.untyped_storage()
    weak = torch._C._construct_storage_from_data_pointer(  # type: ignore[attr-defined]
        storage.data_ptr(), tensor.device, storage.nbytes()
    )
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    of_it: Tensor = torch.empty(0, dtype=tensor.dtype).set_(weak, *place)
    return of_it


def _held() -> set[int]:
    """The memory that somebody holds beside the pool."""
    return {
        address
        for address, storage in _POOL.items()
        if torch._C._storage_Use_Count(storage._cdata) > 1  # type: ignore[attr-defined]
    }


class _Graph(full.Graph):
    def __init__(self) -> None:
        super().__init__()
        self.held_first: set[int] = set()
        self.held_last: set[int] = set()

    def replay(self) -> None:
        self._overwrite(self.held_first | self.held_last)
        super().replay()
        self._overwrite(self.held_last)

    def _overwrite(self, held: set[int]) -> None:
        for address in _POOL.keys() - held:
            full._bytes(_POOL[address]).fill_(255)


class _Capture(full._Capture):
    """Replaces ``torch.cuda.graph``."""

    def __enter__(self) -> Any:
        self._graph.held_first = _held()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        alive = [key for key, (ref, _) in self._own.items() if not full._is_gone(ref)]
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        for key in alive:
            _add(self._graph._own[key])
        self._graph.held_last = _held()

    def _forget(self, storage: torch.UntypedStorage) -> None:
        """Only after all captures: that of a backward pass uses tensors that the forward pass saved."""

    def _view_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        pooled = _POOL.get(value.untyped_storage().data_ptr())
        if pooled is None:
            return super()._view_of(value)
        self._graph._own[pooled._cdata] = pooled
        place = value.storage_offset(), tuple(value.size()), tuple(value.stride())
        return full._View(pooled._cdata, value.dtype, *place)
