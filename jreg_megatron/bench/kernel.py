"""Time and bytes of the kernels alone, and time of a layer's whole regularizer in several implementations."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from jreg_megatron.bench.options import DTYPES
from jreg_megatron.bench.rounds import rounds, times
from jreg_megatron.methods.jreg.kernels import Kernels, choose
from jreg_megatron.methods.jreg.penalty import Strength, add_displacement_gradient
from jreg_megatron.runtime.errors import UserError

JREG, AUTOGRAD, COMPILED = "jreg", "autograd", "compiled"
ABOUT = {
    JREG: "as in training: nothing in the forward pass, one kernel in the backward pass",
    AUTOGRAD: "the textbook formula, differentiated by torch",
    COMPILED: "the same by torch.compile",
}

COEFFICIENT, FACTOR = 0.1, 1e-4

SHORTEST_COPY = 50e-6
"""If a copy takes fewer seconds, launches and not only bytes determine the time."""

_FEWEST_ROUNDS = 3
_WARM_UP = 3
_FLUSHED = 8
"""Between two timed runs, this many times the size of the L2 cache is read."""
_CYCLES = 1_000_000
"""The device waits this many cycles of its clock at first, while the host launches the timed work."""
_MOST_CYCLES = 2**31 - 1


def run(args: Namespace, more: list[str], finish: Callable[[dict[str, Any]], None]) -> int:
    """Measure; ``finish`` gets times in seconds, by width.

    Raises:
        UserError: if the sizes do not fit into memory.
    """
    on_cpu = args.cpu or not torch.cuda.is_available()
    args.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    args.dtype = getattr(torch, DTYPES[args.dtype or ("fp32" if on_cpu else "bf16")])
    args.rounds = args.rounds or (20 if on_cpu else 200)
    too_many = f"--tokens is {args.tokens}, which needs more than"
    # Two states, a gradient that arrives at each, two results; autograd's float32 copies of the states.
    needs = args.tokens * max(args.widths) * (6 * args.dtype.itemsize + 2 * 4)
    has = psutil.virtual_memory().total
    if on_cpu and needs > has:  # a GPU says so itself
        raise UserError(f"{too_many} this machine's {has / 2**30:,.0f} GiB of memory; give less")
    try:
        finish(measure(args))
    except torch.OutOfMemoryError:
        raise UserError(f"{too_many} the memory that is free; give less") from None
    return 0


class Tensors:
    """A layer's states ``[tokens, h]``, and the gradient of each from the rest of the model."""

    def __init__(self, args: Namespace, width: int) -> None:
        generator = torch.Generator(args.device).manual_seed(0)

        def drawn() -> Tensor:
            shape = (args.tokens, width)
            return torch.randn(shape, generator=generator, device=args.device).to(args.dtype)

        self.h_in = drawn().requires_grad_()
        self.h_out = (self.h_in.detach() + 0.3 * drawn()).requires_grad_()
        self.grad_in, self.grad_out = drawn().mul_(0.01), drawn().mul_(0.01)
        self.coefficient = torch.full((1,), COEFFICIENT, device=args.device)


Way = Callable[[Tensors], tuple[Tensor, ...]]
"""Returns the gradients of ``h_in`` and ``h_out``: the sum of the model's and the regularizer's."""


def bytes_moved(tensors: Tensors) -> dict[str, int]:
    """The fewest bytes that each kernel must read and write."""
    state, tokens = tensors.h_in.numel() * tensors.h_in.element_size(), tensors.h_in.shape[0]
    psi = 4 * tokens
    return {"displacement": 2 * state + psi, "gradients": 5 * state + psi}


def textbook(h_in: Tensor, h_out: Tensor) -> Tensor:
    """The regularizer of a layer before its weight: the sum of Psi over tokens, in float32."""
    return ((1 - F.cosine_similarity(h_in.float(), h_out.float(), dim=-1)) / 2).sum()


def with_jreg(kernels: Kernels) -> Way:
    """This package's implementation."""

    def way(t: Tensors) -> tuple[Tensor, ...]:
        strength = Strength(kernels, t.coefficient, FACTOR)
        out = add_displacement_gradient(t.h_in, t.h_out, strength)
        return torch.autograd.grad((out, t.h_in), (t.h_in, t.h_out), (t.grad_out, t.grad_in))

    return way


def with_autograd(regularizer: Callable[[Tensor, Tensor], Tensor]) -> Way:
    """An implementation that computes the regularizer in the forward pass; autograd differentiates it."""

    def way(t: Tensors) -> tuple[Tensor, ...]:
        loss = (t.coefficient * FACTOR * regularizer(t.h_in, t.h_out)).sum()
        outputs = (loss, t.h_in, t.h_out)
        return torch.autograd.grad(outputs, (t.h_in, t.h_out), (None, t.grad_in, t.grad_out))

    return way


def measure(args: Namespace) -> dict[str, Any]:
    """By width: the kernels compared with a copy, and a layer's whole regularizer in each implementation."""
    names, by_width = [], {}
    notes = ["Device time, by CUDA events. The cache holds other data at the start."]
    if args.device.type == "cpu":
        notes = [
            "Wall-clock time. On a CPU a copy needs only memory bandwidth; the kernels also need arithmetic."
        ]
    for width in args.widths:
        kernels = choose("auto", args.device, width, args.dtype)
        names.append(kernels.name)
        tensors = Tensors(args, width)
        ways = {JREG: with_jreg(kernels), AUTOGRAD: with_autograd(textbook)}
        compiled, why_not = (None, "--no-compile") if args.no_compile else _compiled(tensors)
        if compiled is None:
            notes.append(f"{COMPILED} is left out: {why_not}.")
        else:
            ways[COMPILED] = compiled
        by_width[str(width)] = _of_width(args, tensors, kernels, ways)
    of_kernels = [found for of in by_width.values() for found in of["kernels"].values()]
    if any(found["copy_seconds"] < SHORTEST_COPY for found in of_kernels):
        notes.append(
            f"A copy of less than {1e6 * SHORTEST_COPY:g} us does not show the bandwidth: start and end take "
            "time too, and written data may stay in the cache. Give more --tokens."
        )
    used = {name for of in by_width.values() for name in of["ways"]}
    return {
        "kernels": "; ".join(dict.fromkeys(names)),
        "device": args.device.type,
        "dtype": str(args.dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "widths": by_width,
        "notes": list(dict.fromkeys(notes)),
        "about": {name: what for name, what in ABOUT.items() if name in used},
    }


def _of_width(args: Namespace, tensors: Tensors, kernels: Kernels, ways: dict[str, Way]) -> dict[str, Any]:
    moved = bytes_moved(tensors)
    runs = _kernel_runs(kernels, tensors)
    runs |= {f"copy {name}": _copy(number, args.device) for name, number in moved.items()}
    runs |= {name: partial(way, tensors) for name, way in ways.items()}
    seconds = interleaved(args, runs)

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    of_kernels = {}
    for name, number in moved.items():
        own, copy = times(seconds[name]), median(seconds[f"copy {name}"])
        is_short = args.device.type == "cpu" and copy < SHORTEST_COPY
        of_kernels[name] = own | {
            "bytes": number,
            "bytes_per_second": number / own["seconds"],
            "copy_seconds": copy,
            "share_of_copy": None if is_short else ratio(f"copy {name}", name),
        }
    of_ways = {name: times(seconds[name]) | {"ratio": ratio(name, JREG)} for name in ways}
    return {"rounds": len(seconds[JREG]), "kernels": of_kernels, "ways": of_ways}


def interleaved(args: Namespace, runs: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
    """Seconds of each run in each round, with all runs in turn."""
    on_gpu = args.device.type == "cuda"
    seconds_of = _CudaClock(args.device) if on_gpu else _cpu_clock
    for once in runs.values():
        once()  # what is compiled is compiled here
        for _ in range(_WARM_UP if on_gpu else 0):
            seconds_of(once)
    found: dict[Any, list[float]] = {name: [] for name in runs}
    deadline = time.monotonic() + args.seconds
    for _, name in rounds(
        list(runs), args.rounds, min(_FEWEST_ROUNDS, args.rounds), lambda: time.monotonic() > deadline
    ):
        found[name].append(seconds_of(runs[name]))
    return found


def _cpu_clock(once: Callable[[], Any]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


class _CudaClock:
    """Times work on the device with events, after the host has launched all of it.

    The device waits meanwhile. If it waits too short, the time contains the host's. Then the work is timed
    again with a longer wait.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.ones(max(_FLUSHED * cache, 2**28) // 4, device=device)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._cycles: dict[Callable[[], Any], int] = {}

    def __call__(self, once: Callable[[], Any]) -> float:
        started, ended = self._events
        while True:
            cycles = self._cycles.setdefault(once, _CYCLES)
            self._other.sum()  # reads: the cache has nothing to write back
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
            started.record()
            once()
            has_begun = started.query()  # type: ignore[no-untyped-call]
            ended.record()
            ended.synchronize()
            if not has_begun:
                return float(started.elapsed_time(ended)) / 1e3
            if cycles >= _MOST_CYCLES:
                raise UserError(
                    "the host launches kernels too slowly to time the device; try again on a quieter machine"
                )
            self._cycles[once] = min(2 * cycles, _MOST_CYCLES)


def _kernel_runs(kernels: Kernels, t: Tensors) -> dict[str, Callable[[], Any]]:
    h_in, h_out = t.h_in.detach(), t.h_out.detach()
    return {
        "displacement": lambda: kernels.displacement(h_in, h_out),
        "gradients": lambda: kernels.gradients(h_in, h_out, t.grad_out, t.coefficient, FACTOR),
    }


def _copy(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy whose reads and writes together are ``moved`` bytes."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _compiled(tensors: Tensors) -> tuple[Way | None, str]:
    """The textbook formula, compiled and run once; or None and the reason."""
    for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(variable, "0") == "1":
            return None, f"{variable}=1"
    torch._dynamo.reset()  # without it, the second width would be compiled for all widths
    way = with_autograd(torch.compile(textbook, dynamic=False))
    try:
        way(tensors)
    except Exception as error:  # no compiler, no Triton, ...: the other implementations run without it
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None, f"it does not run here ({type(error).__name__}: {str(error).strip().split(chr(10))[0]})"
    return way, ""
