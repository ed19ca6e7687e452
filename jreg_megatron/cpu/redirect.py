"""Redirect Megatron's calls of ``torch.cuda`` and of CUDA tensors to the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import distributed_c10d

_CPU = torch.device("cpu")


# Functions of ``torch`` and methods of its tensors with an argument ``device``.
_FACTORIES = """
    arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted empty_quantized
    empty_strided eye from_file full full_like hamming_window hann_window kaiser_window linspace logspace
    normal ones ones_like rand rand_like randint randint_like randn randn_like randperm range scalar_tensor
    sparse_bsc_tensor sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor
    sparse_csr_tensor tensor tril_indices triu_indices zeros zeros_like
""".split()
_METHODS = "new new_empty new_empty_strided new_full new_ones new_tensor new_zeros".split()


def _on_cpu(device: Any) -> Any:
    """``device``, or the CPU if it is a CUDA device, which may be given by its number."""
    if type(device) is int:
        return _CPU
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    return device


def _with_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, on the CPU if its ``device`` is a CUDA device."""

    @wraps(function)
    def on_cpu(*args: Any, **named: Any) -> Any:
        if "device" in named:
            named["device"] = _on_cpu(named["device"])
        if "pin_memory" in named:
            named["pin_memory"] = False
        return function(*args, **named)

    return on_cpu


def _itself(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no_op() -> Callable[..., None]:
    # A new function each time: torch._dynamo keeps one rule per function that it finds in torch.cuda.
    return lambda *_, **__: None


def _let_cuda_mean_the_cpu() -> None:
    """Make torch's functions with an argument ``device`` create CUDA tensors on the CPU.

    A torch function mode would do this too, but it runs Python for every operation: a fifth of a small step.
    """
    with torch.device(_CPU):  # its first use caches the functions that take a device: still torch's own
        torch.empty(0)
    plain: Any = torch.Tensor
    move, tell_type = plain.to, plain.type

    def to(tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
        return move(tensor, *map(_on_cpu, args), **named)

    def type_(tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
        # Megatron's optimizers sort parameters by strings such as 'torch.cuda.FloatTensor'.
        answer = tell_type(tensor, *args, **named)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    answers = {
        "to": _with_cpu(to),
        "type": type_,
        "cuda": _itself,
        "pin_memory": _itself,
        "record_stream": _nothing,
    }
    for name, answer in answers.items():
        setattr(plain, name, answer)
    others = (torch.fft, ("fftfreq", "rfftfreq")), (torch.nested, ("nested_tensor",))
    for owner, names in ((torch, _FACTORIES), *others, (plain, _METHODS)):
        for name in names:
            setattr(owner, name, _with_cpu(getattr(owner, name)))


class _Stream:
    """A stream or an event of a device that runs everything in order."""

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
    """Redirect CUDA to the CPU until the process ends."""
    cuda = torch.cuda
    nothing = ("set_device", "synchronize", "empty_cache", "set_stream", "check_error")
    memory = ("memory_allocated", "memory_reserved")
    answers: dict[str, Any] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        **{name: _no_op() for name in nothing},
        **dict.fromkeys(("Stream", "Event"), _Stream),
        **dict.fromkeys(("current_stream", "default_stream", "cudart"), lambda *_: _STREAM),
        "stream": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        # With compute capability 10 Megatron does not require a setting of CUDA's launch queue.
        "get_device_capability": lambda *_: (10, 0),
        "get_device_properties": lambda *_: SimpleNamespace(name="cpu", major=10, minor=0),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        # Not torch.manual_seed, which calls torch.cuda again.
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

    # A loader draws its workers' seed from the CPU's generator, which here is the GPU's too. After a resume
    # this would shift the dropout masks.
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

    # Two runs of the same command give the same bits. Filling new memory would cost time and change nothing.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _let_cuda_mean_the_cpu()


def _let_sends_hold_their_memory() -> None:
    """Keep a tensor until it is sent, even if the sender frees it earlier.

    Megatron before 0.18 frees a stage's output while its send is in flight. On a GPU the memory's next user
    waits in the same stream. Here it would overwrite data that the next stage has not received yet.
    """
    send = distributed_c10d.isend

    @wraps(send)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return send(tensor.detach(), *args, **kwargs)  # the same memory; the request keeps it alive

    distributed_c10d.isend = torch.distributed.isend = isend


def _let_all_gathers_be_uneven() -> None:
    """Gather pieces of different sizes, and finish one gather before the next. NCCL does both, gloo neither.

    Muon's distributed optimizer gathers weights of different sizes, and waits only for its last gather.
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
