"""What a training step does on the device, on the host, in memory and between ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

COUNTED = ("peak_bytes", "kernels", "collectives", "synchronisations")
_SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_WAITS = (*_SYNCHRONISATIONS, "cudaMemcpy")
"""Calls in which the host may wait for the device. A copy waits if the memory is not pinned."""
_READS = "aten::_local_scalar_dense"
_NO_KERNELS = ("Memcpy", "Memset")
_MEMORY = "[memory]"


def busy(step: Callable[[], Any]) -> dict[str, float]:
    """Run a step under torch's profiler, which records the device and only the host's calls to it.

    Returns:
        Seconds. ``whole``: until the device has finished the step; the profiler makes the host slower.
        ``device``: the device was busy, or NCCL waited for other ranks. ``host``: the host did not wait for
        the device.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        whole = time.perf_counter() - began
    events = _events(profiler)
    waits = _covered(event for event in events if event.name().startswith(_WAITS))
    return {"whole": whole, "device": _covered(filter(_is_on_device, events)), "host": whole - waits}


def count(step: Callable[[], Any]) -> dict[str, int]:
    """Run a step under torch's profiler and count.

    Returns:
        By :data:`COUNTED`: the peak memory of tensors, minus the memory before the step; on a GPU its kernels
        without copies, on a CPU torch's operations that call no other one; calls of torch.distributed with
        sends and receives; waits of the host for the device, on a CPU reads of a tensor's value.
    """
    on_gpu = dist.get_backend() == "nccl"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=not on_gpu) as profiler:
        step()
        # Read before the profiler itself waits.
        peak = torch.cuda.max_memory_allocated() - held
    events = _events(profiler)
    if on_gpu:
        kernels = sum(_is_on_device(event) and not event.name().startswith(_NO_KERNELS) for event in events)
        synchronisations = sum(event.name() in _SYNCHRONISATIONS for event in events)
    else:
        kernels = _leaves(events)
        synchronisations = sum(event.name() == _READS for event in events)
        peak = _peak(events)
    collectives = sum(_is_on_host(event) and event.name().startswith("c10d::") for event in events)
    return dict(zip(COUNTED, (peak, kernels, collectives, synchronisations), strict=True))


def _events(profiler: Any) -> list[Any]:
    """The recorded events, by start. Torch's own list of them takes seconds to make."""
    return sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())


def _is_on_host(event: Any) -> bool:
    return bool(event.device_type().name == "CPU")


def _is_on_device(event: Any) -> bool:
    # "nccl:" is a span around NCCL's kernels. The kernels are events too.
    is_work = not event.is_user_annotation() and not event.name().startswith("nccl:")
    return is_work and bool(event.device_type().name == "CUDA")


def _covered(events: Iterable[Any]) -> float:
    """Seconds in which at least one of the events runs. They are sorted by start."""
    covered = until = 0
    for event in events:
        start, end = event.start_ns(), event.start_ns() + event.duration_ns()
        covered += max(0, end - max(start, until))
        until = max(until, end)
    return covered / 1e9


def _leaves(events: Iterable[Any]) -> int:
    """The number of torch's operations that call no other one."""
    on_host = (event for event in events if _is_on_host(event) and event.name() != _MEMORY)
    spans = sorted(
        (event.start_thread_id(), event.start_ns(), -event.duration_ns(), event.name()) for event in on_host
    )
    is_last = (None, 0, 0, "")
    return sum(
        name.startswith("aten::") and not (thread == next_thread and next_start < start - minus_duration)
        for (thread, start, minus_duration, name), (next_thread, next_start, *_) in pairwise(
            [*spans, is_last]
        )
    )


def _peak(events: Iterable[Any]) -> int:
    """The highest sum of allocations minus frees, in the order of the events."""
    held = peak = 0
    for event in events:
        held += event.nbytes() if event.name() == _MEMORY else 0
        peak = max(peak, held)
    return peak
