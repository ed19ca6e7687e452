"""Megatron's own training loop on a CPU: gloo for NCCL, torch-only layers for fused kernels.

Megatron-Core names CUDA explicitly in a few hundred places. :func:`enable` redirects these names to the CPU
until the process ends. :data:`FLAGS` select code paths that need no CUDA kernel. A run on GPUs redirects
nothing.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from jreg_megatron.cpu.flags import FLAGS, announcement, with_cpu_flags

if TYPE_CHECKING:
    import torch

__all__ = ["FLAGS", "announcement", "enable", "enable_for", "with_cpu_flags"]


@cache
def enable() -> None:
    """Import Megatron and redirect all its uses of CUDA to the CPU.

    Call it before anything else imports Megatron. A second call is a no-op.
    """
    from jreg_megatron.cpu import megatron, redirect

    megatron.import_for_the_cpu()
    redirect.install()
    megatron.install()


def enable_for(device: torch.device) -> None:
    """Import Megatron, and make its local layers run in pure torch, on a CPU or a GPU. On a CPU this is
    :func:`enable`."""
    if device.type == "cpu":
        enable()
    else:
        from jreg_megatron.mcore import local_layers

        local_layers.install()
