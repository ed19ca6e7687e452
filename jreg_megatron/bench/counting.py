"""What a training step does beside taking time: kernels, collectives, waits for the device, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_READS = "aten::_local_scalar_dense"
_NO_KERNELS = ("Memcpy", "Memset", "nccl:")  # the last is a name for a span, beside NCCL's kernels


@dataclass(frozen=True)
class Counts:
    """Of one step, on one rank."""

    kernels: int
    """On a GPU what ran on it, copies aside; on a CPU the operations of torch that call no other."""
    collectives: int
    """Calls of torch.distributed, sends and receives too."""
    synchronisations: int
    """Waits of the host for the device; on a CPU, where there are none, values read from a tensor."""
    peak_bytes: int
    """Memory of tensors at its highest, above what was held before the step."""


def count(step: Callable[[], Any]) -> tuple[Any, Counts]:
    """Run a step under torch's profiler; returns its result and what was counted."""
    on_gpu = dist.get_backend() == "nccl"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=not on_gpu) as profiler:
        result = step()
        # Before the profiler's own wait.
        peak = torch.cuda.max_memory_allocated() - held
    events = list(profiler.events())
    on_host = [event for event in events if event.device_type.name == "CPU"]
    if on_gpu:
        kernels = sum(
            event.device_type.name == "CUDA"
            and not event.is_user_annotation
            and not event.name.startswith(_NO_KERNELS)
            for event in events
        )
        synchronisations = sum(event.name in _WAITS for event in on_host)
    else:
        kernels = sum(event.name.startswith("aten::") and not event.cpu_children for event in on_host)
        synchronisations = sum(event.name == _READS for event in on_host)
        peak = _peak(profiler)
    collectives = sum(event.name.startswith("c10d::") for event in on_host)
    return result, Counts(kernels, collectives, synchronisations, peak)


def _peak(profiler: Any) -> int:
    """The highest sum of what was allocated less what was freed."""
    of_memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(of_memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
