"""What Megatron asks of ``torch.cuda`` and of CUDA tensors, answered by the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _on_cpu(device: Any) -> Any:
    """``device``, or the CPU where it names a CUDA device."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    return device


def _itself(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no_op() -> Callable[..., None]:
    # A new function each time: torch._dynamo keeps one rule per function that it finds in torch.cuda.
    return lambda *_, **__: None


def _type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    # Megatron's optimizers sort parameters by the strings 'torch.cuda.FloatTensor' and the like.
    answer = tensor.type(*args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


_METHODS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.cuda: _itself,
    torch.Tensor.pin_memory: _itself,
    torch.Tensor.record_stream: _nothing,
    torch.Tensor.type: _type,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Every torch call that names a CUDA device runs on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        method = _METHODS.get(func)
        if method is not None:
            return method(*args, **(kwargs or {}))
        if func is torch.Tensor.to:
            args = tuple(map(_on_cpu, args))
        if not kwargs:
            return func(*args)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _Stream:
    """A stream or an event of a device that does everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 0.0

    def record_event(self, *_: Any) -> _Stream:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


_STREAM = _Stream()


def install() -> None:
    """Redirect CUDA to the CPU in this process, for good."""
    cuda = torch.cuda
    nothing = ("set_device", "synchronize", "empty_cache", "set_stream", "check_error")
    memory = ("memory_allocated", "memory_reserved")
    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: _CPU,
        **{name: _no_op() for name in nothing},
        **dict.fromkeys(("Stream", "Event"), _Stream),
        **dict.fromkeys(("current_stream", "default_stream", "cudart"), lambda *_: _STREAM),
        "stream": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        # Compute capability 10 frees Megatron of wishes about CUDA's launch queue.
        "get_device_capability": lambda *_: (10, 0),
        "get_device_properties": lambda *_: SimpleNamespace(name="cpu", major=10, minor=0),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        # Not torch.manual_seed: that one calls torch.cuda again.
        "manual_seed": torch.default_generator.manual_seed,
        **{name: lambda *_: 0 for most in memory for name in (most, f"max_{most}")},
        "device_memory_used": lambda *_: 0,
        "memory_stats": lambda *_: {},
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state = answers["get_rng_state"]
    cuda.nvtx.range_push = _no_op()
    cuda.nvtx.range_pop = _no_op()
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

    # A loader draws its workers' seed from what is here the GPU's generator too. After a resume that would
    # shift the dropout masks.
    loader = torch.utils.data.DataLoader
    build = loader.__init__

    @wraps(build)
    def with_own_generator(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(torch.initial_seed())

    loader.__init__ = with_own_generator  # type: ignore[method-assign]

    _let_sends_hold_their_memory()
    _let_all_gathers_be_uneven()

    # Two runs of the same command give the same bits; filling fresh memory would cost and change nothing.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    mode = _CudaMeansCpu()
    _let_backward_be_in(mode)
    mode.__enter__()  # type: ignore[no-untyped-call]


def _let_backward_be_in(mode: TorchFunctionMode) -> None:
    """Keep the mode, which torch leaves for ``backward``: a layer that is recomputed needs it."""
    autograd: Any = torch.autograd
    run = autograd._engine_run_backward

    @wraps(run)
    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch._C._len_torch_function_stack() else mode:
            return run(*args, **kwargs)

    autograd._engine_run_backward = run_backward


def _let_sends_hold_their_memory() -> None:
    """Keep what is being sent until it is, also where the sender lets go of it before.

    Megatron before 0.18 frees a stage's output while its send is under way. On a GPU the memory's next
    user waits in the same stream; here it would overwrite what the next stage has yet to receive.
    """
    send = distributed_c10d.isend

    @wraps(send)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return send(tensor.detach(), *args, **kwargs)  # the same memory, which the request now owns too

    distributed_c10d.isend = torch.distributed.isend = isend


def _let_all_gathers_be_uneven() -> None:
    """Gather pieces of different sizes, and end one gather before the next: NCCL does both, gloo neither.

    Muon's distributed optimizer gathers weights so, and waits for its last gather only.
    """
    gather = distributed_c10d.all_gather

    @wraps(gather)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        own = torch.distributed.get_rank(group)
        if own < 0 or len({piece.shape for piece in tensor_list}) == 1:
            works = [gather(tensor_list, tensor, group, async_op)]
        else:
            tensor_list[own].detach().copy_(tensor.detach().view_as(tensor_list[own]))
            ranks = torch.distributed.get_process_group_ranks(group)
            works = [
                distributed_c10d.broadcast(piece.detach(), rank, group, async_op)
                for rank, piece in zip(ranks, tensor_list, strict=True)
            ]
        for work in works:
            if work is not None:
                work.wait()
        return works[-1]

    distributed_c10d.all_gather = torch.distributed.all_gather = all_gather
