"""CUDA's streams and events, and what they put in order, in a process without a GPU.

Everything still runs at once and in the order of the program. For each stream this file records how much of
every other stream it has waited for. It finds an operation that reads data for which its stream has not
waited, or that writes where another stream may still read. It also finds memory that is freed for the next
user in its own stream while another stream may still use it. A backward pass is in the stream in which it is
started; torch itself orders its work in other streams.

While a CUDA graph is captured, its first stream and those that waited for it belong to the capture. The file
finds a stream of the capture that waits for work outside of it, an operation in another stream, and a stream
for which the first one has not waited at the end.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._C import ScriptObject
from torch.distributed import Work
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOUND: dict[str, int] = {}
"""Each unordered use, and how often."""

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
"""Work for which the host waits. Later work runs after it."""

Clock = dict["Stream", int]


def _join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


class Stream:
    """Replaces ``torch.cuda.Stream``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {self: 0}
        _every.add(self)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -1

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        if event.capture is _captures[-1]:
            _captures[-1].add(self)
        elif self in _captures[-1]:
            _report("a captured stream waits for work outside of the capture")
        _join(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _join(_host, self.clock)


class Event:
    """Replaces ``torch.cuda.Event``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}
        self.capture: set[Stream] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _stack[-1]
        self.clock = dict(stream.clock)
        self.capture = _captures[-1] if stream in _captures[-1] else None

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _stack[-1]).wait_event(self)

    def synchronize(self) -> None:
        _join(_host, self.clock)


_host: Clock = {}
_every: WeakSet[Stream] = WeakSet()
_captures: list[set[Stream]] = [set()]
"""At the end the streams of the capture under way."""
_stack = [Stream()]


@contextmanager
def _in(stream: Stream | None) -> Iterator[None]:
    _stack.append(stream or _stack[-1])
    try:
        yield
    finally:
        _stack.pop()


@contextmanager
def captured(stream: Stream) -> Iterator[None]:
    """A CUDA graph is captured, which begins in a stream."""
    _synchronize()
    _captures.append({stream})
    with _in(stream):
        yield
    if any(stream.clock.get(each, 0) < each.clock[each] for each in _captures.pop()):
        _report("a captured stream is not joined at the end of the capture")
    _synchronize()


def _synchronize(*_: Any) -> None:
    for stream in _every:
        stream.synchronize()


@dataclass
class _Memory:
    ref: StorageWeakRef
    of: Stream
    written: tuple[Stream, int]
    used: Clock = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)


class Order(TorchDispatchMode):
    """Sees every operation."""

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[int, _Memory] = {}
        self._abroad: dict[int, _Memory] = {}  # used in another stream than its own
        self._works: dict[Work, Clock] = {}  # what has been sent, and who waits for it comes behind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        stream = _stack[-1]
        _join(stream.clock, _host)
        self._find_freed(stream)
        if func.is_view:
            return result
        if _captures[-1] and stream not in _captures[-1]:
            _report(f"{func} is in no captured stream")
        stream.clock[stream] += 1
        written = {id(x) for x in (given if space == "c10d" else _written(func, args, kwargs or {}))}
        for tensor in given:
            self._use(tensor, stream, id(tensor) in written, str(func))
        if space == "c10d":
            works = (Work.unbox(x) for x in tree_leaves(result) if isinstance(x, ScriptObject))
            self._works |= {work: dict(stream.clock) for work in works}
        old = {x.untyped_storage()._cdata for x in given}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in old:
                self._is_new(x, stream)
        if name in _WAITS:
            stream.synchronize()
        return result

    def _is_new(self, tensor: Tensor, stream: Stream) -> None:
        ref = StorageWeakRef(tensor.untyped_storage())
        self._abroad.pop(ref.cdata, None)
        self._memory[ref.cdata] = _Memory(ref, stream, (stream, stream.clock[stream]))

    def _use(self, tensor: Tensor, stream: Stream, is_written: bool, what: str) -> None:
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        if memory is None or memory.ref.expired():
            return  # from before
        before = dict([memory.written]) if not is_written else {**memory.used, **dict([memory.written])}
        if any(stream.clock.get(other, 0) < tick for other, tick in before.items()):
            _report(f"{what} does not wait for the memory's last use")
        tick = stream.clock[stream]
        memory.used[stream] = tick
        if is_written:
            memory.written = (stream, tick)
        if stream is not memory.of:
            self._abroad[memory.ref.cdata] = memory

    def _find_freed(self, stream: Stream) -> None:
        """Freed memory is for the next allocation in its stream, unless a use in another one was recorded."""
        for key, memory in list(self._abroad.items()):
            if memory.of is stream and memory.ref.expired():
                del self._abroad[key]
                late = [s for s, t in memory.used.items() if stream.clock.get(s, 0) < t]
                if {*late} - memory.recorded:
                    _report("memory is freed while another stream uses it")

    def has_waited(self, work: Work) -> None:
        _join(_stack[-1].clock, self._works.pop(work, {}))

    def record(self, tensor: Tensor, stream: Stream) -> None:
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        if memory is not None:
            memory.recorded.add(stream)


def _report(what: str) -> None:
    frames = [f for f in traceback.extract_stack()[:-2] if "jreg_megatron" in f.filename]
    where = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.name}" for f in frames[:-5:-1])
    FOUND[f"{what}, {where}"] = FOUND.get(f"{what}, {where}", 0) + 1


def _written(func: Any, args: Any, named: Any) -> list[Tensor]:
    of_all = {of.name: x for of, x in zip(func._schema.arguments, args, strict=False)} | named
    is_written = {
        of.name for of in func._schema.arguments if of.alias_info is not None and of.alias_info.is_write
    }
    return [x for name in is_written for x in tree_leaves(of_all.get(name)) if isinstance(x, Tensor)]


def _record(tensor: Tensor, order: Order, stream: Stream) -> None:
    order.record(tensor, stream)


def install() -> Order:
    """Make ``torch.cuda`` use these. Operations in the returned mode are checked."""
    cuda: Any = torch.cuda
    order = Order()
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream = _in
    cuda.current_stream = cuda.default_stream = lambda *_: _stack[-1]
    cuda.default_stream = lambda *_: _stack[0]
    cuda.synchronize = _synchronize
    plain: Any = torch.Tensor
    plain.record_stream = functools.partialmethod(_record, order)
    of_work: Any = Work
    wait = of_work.wait

    def seen(work: Work, *given: Any) -> Any:
        order.has_waited(work)
        return wait(work, *given)

    of_work.wait = seen
    return order
