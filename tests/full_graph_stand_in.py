"""A stand-in for the CUDA graph of an iteration, in a process without a GPU.

Megatron's own ``FullCudaGraphWrapper`` decides what runs, what is captured and when it is replayed. This file
has the graph. It records every operation of torch and of ``torch.distributed`` with the memory that it reads
and writes. A replay runs exactly these operations on the same memory, without any other Python.

It keeps the rules of a real graph. A capture computes nothing: older memory does not change, and memory that
is allocated in the capture holds NaN until the first replay. Operations that would wait for the device, or
that read a value from the host's memory, are refused. Memory from before the capture is not kept for replays:
a replay that finds it freed fails. Memory that is freed in the capture belongs to the graph. Kernels that are
not torch operations (Triton's) would not be seen; on a CPU none runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import stream_stand_in
import torch
from megatron.core.tensor_parallel import random
from torch import Tensor
from torch._C import ScriptObject
from torch.distributed import Work
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

REPLAYS: list[int] = []
"""How many operations each replay had."""

_SYNCHRONISE = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
_TO_THE_HOST = ("tolist", "cpu", "numpy")
_LATE = ("send", "recv_", "recv_any_source_")


def install(sees_streams: bool = False) -> None:
    """Have ``torch.cuda`` capture in a graph of this module, in streams of ``stream_stand_in`` if wanted."""
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = Graph, _InStreams if sees_streams else _Capture
    cuda.graph_pool_handle = lambda: None
    cuda.is_current_stream_capturing = lambda: _Capture.is_under_way
    # Nothing is drawn in what is compared, and Megatron asks the host's generator, which here is the graph's.
    random._get_cuda_rng_state = lambda *_, **__: torch.Generator()
    random._set_cuda_rng_state = lambda *_, **__: None
    random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()


def train(argv: list[str], install: Callable[[], None] = install) -> None:
    """``jreg_megatron.pretrain`` with such graphs. The last line has the number of replays of each."""
    from jreg_megatron import pretrain
    from jreg_megatron.cpu import flags

    flags.FLAGS = tuple(word for word in flags.FLAGS if word not in ("--cuda-graph-impl", "none"))
    install()
    pretrain.main(argv)
    counts = [REPLAYS.count(size) for size in dict.fromkeys(REPLAYS)]
    print("replays:", *counts, flush=True)


@dataclass(frozen=True)
class _View:
    """Which part of which memory a tensor is."""

    memory: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        view = torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)
        assert isinstance(view, Tensor)
        return view


@dataclass(frozen=True)
class _Operation:
    function: Any
    args: Any
    named: Any
    fresh: tuple[tuple[int, _View], ...]
    """Of its results, by their place, those with memory of their own."""


class Graph:
    """Replaces ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        self._from_before: dict[int, StorageWeakRef] = {}
        self._own: dict[int, torch.UntypedStorage] = {}

    def register_generator_state(self, _: Any) -> None:
        pass

    @torch.no_grad()
    def replay(self) -> None:
        assert not _Capture.is_under_way
        storages = {**self._own, **{key: _alive(ref) for key, ref in self._from_before.items()}}
        pending: dict[int, list[Work]] = {}

        def wait_for(key: int) -> None:
            for work in pending.pop(key, ()):
                work.wait()

        def tensor_of(view: Any) -> Any:
            if not isinstance(view, _View):
                return view
            wait_for(view.memory)
            return view.on(storages[view.memory])

        for one in self._operations:
            is_late = one.function._schema.name.removeprefix("c10d::") in _LATE
            args, named = tree_map(tensor_of, (one.args, one.named))
            results = tree_leaves(one.function(*args, **named))
            for work in (Work.unbox(result) for result in results if _is_work(result)):
                if is_late:
                    for view in _views((one.args, one.named)):
                        pending.setdefault(view.memory, []).append(work)
                else:
                    work.wait()
            for place, view in one.fresh:
                view.on(storages[view.memory]).copy_(results[place])
        for key in list(pending):
            wait_for(key)
        REPLAYS.append(len(self._operations))


class _Capture(TorchDispatchMode):
    """Replaces ``torch.cuda.graph``."""

    is_under_way = False
    is_making = False
    """Whether a tensor of the host is being made."""

    def __init__(self, graph: Graph, **_: Any) -> None:
        super().__init__()
        self._graph = graph
        self._own: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, Tensor] = {}
        self._hosts: dict[int, StorageWeakRef] = {}
        self._watch = _NoCopies(self)

    def __enter__(self) -> Any:
        _Capture.is_under_way = True
        self._watch.__enter__()
        of_work: Any = Work
        wait = self._wait = of_work.wait

        def wait_unseen(work: Work, *args: Any) -> Any:
            """Gloo's wait has operations of its own, which are part of the collective."""
            with _disable_current_modes():
                return wait(work, *args)

        of_work.wait = wait_unseen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Work.wait = self._wait
        self._watch.__exit__(*error)
        _Capture.is_under_way = False
        for key, values in self._before.items():
            _bytes(_alive(self._graph._from_before[key])).copy_(values)
        for key, (ref, size) in self._own.items():
            storage = torch.UntypedStorage(size) if _is_gone(ref) else _alive(ref)
            self._graph._own[key] = storage
            self._forget(storage)

    def _forget(self, storage: torch.UntypedStorage) -> None:
        """Nothing has been computed into memory that was allocated in the capture."""
        _bytes(storage).fill_(255)  # NaN in every floating type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if self._is_on_the_host(name, (args, named)):
            result = func(*args, **named)
            refs = [
                StorageWeakRef(of.untyped_storage()) for of in tree_leaves(result) if isinstance(of, Tensor)
            ]
            self._hosts |= {ref.cdata: ref for ref in refs}
            return result
        if name in _SYNCHRONISE or _is_by_mask(name, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        recorded = tree_map(self._view_of, (args, named))
        given = {view.memory: view for view in _views(recorded)}
        written = given if space == "c10d" else {view.memory for view in _views(_written(func, recorded))}
        for key in written:
            if key in self._graph._from_before and key not in self._before:
                self._before[key] = _bytes(_alive(self._graph._from_before[key])).clone()
        result = func(*args, **named)
        fresh = []
        for place, tensor in enumerate(tree_leaves(result)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._own[ref.cdata] = ref, storage.nbytes()
                fresh.append((place, self._view_of(tensor)))
        if fresh or written or space == "c10d":
            self._graph._operations.append(_Operation(func, *recorded, tuple(fresh)))
        return result

    def is_hosts(self, value: Any) -> bool:
        """Whether it is a tensor of the host, although here there is no other memory."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._hosts

    def _is_on_the_host(self, name: str, given: Any) -> bool:
        """Whether all tensors are the host's, which are made in the capture without a device.

        Besides tensors of the device, a tensor of a single number is allowed, with its current value.
        """
        tensors = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
        of_host = [value for value in tensors if self.is_hosts(value)]
        is_mixed = 0 < len(of_host) < len(tensors)
        if is_mixed and any(value.dim() for value in of_host):
            raise RuntimeError(
                f"operation not permitted when stream is capturing: copy from the host ({name})"
            )
        return self.is_making or name == "lift_fresh" or (bool(of_host) and not is_mixed)

    def _view_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._hosts:
            return value.clone()
        if key not in self._own and key not in self._graph._from_before:
            self._graph._from_before[key] = StorageWeakRef(storage)
        return _View(key, value.dtype, value.storage_offset(), tuple(value.size()), tuple(value.stride()))


class _InStreams(_Capture):
    """One in which the order of streams is seen too."""

    def __init__(self, graph: Graph, stream: Any, **_: Any) -> None:
        super().__init__(graph)
        self._streams = stream_stand_in.captured(stream)

    def __enter__(self) -> Any:
        self._streams.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._streams.__exit__(*error)
        super().__exit__(*error)


class _NoCopies(TorchFunctionMode):
    """Refuses copies of numbers between Python and the device that are not operations here."""

    def __init__(self, capture: _Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        is_device_given = (kwargs or {}).get("device") is not None
        if name in _TO_THE_HOST and not self._capture.is_hosts(args[0]):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        is_there = name == "as_tensor" and isinstance(args[0], Tensor)
        if name in ("tensor", "as_tensor") and is_device_given and not is_there:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if is_device_given or any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))
        self._capture.is_making = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._capture.is_making = False


def _written(func: Any, recorded: tuple[Any, Any]) -> list[Any]:
    """The arguments that an operation writes into."""
    args, named = recorded
    of_all = {of.name: value for of, value in zip(func._schema.arguments, args, strict=False)} | named
    is_written = {
        of.name: of.alias_info is not None and of.alias_info.is_write for of in func._schema.arguments
    }
    return [value for name, value in of_all.items() if is_written[name]]


def _is_by_mask(name: str, args: Any) -> bool:
    """Whether the size of the result depends on values."""
    indices = args[1] if name == "index" else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _views(values: Any) -> Iterator[_View]:
    return (value for value in tree_leaves(values) if isinstance(value, _View))


def _is_work(value: Any) -> bool:
    return isinstance(value, ScriptObject) and "Work" in str(value._type())


def _is_gone(ref: StorageWeakRef) -> bool:
    return bool(ref.expired())


def _alive(ref: StorageWeakRef) -> torch.UntypedStorage:
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    assert storage is not None, "the graph uses memory that was freed since its capture"
    return storage


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
