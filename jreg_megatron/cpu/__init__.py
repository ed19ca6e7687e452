"""Megatron's own training loop on a CPU: gloo for NCCL, torch-only layers for fused kernels.

Megatron-Core names CUDA by hand in a few hundred places. :func:`enable` redirects those names to the
CPU for the life of the process; :data:`FLAGS` choose the code paths that need no CUDA kernel. A run on
GPUs redirects nothing.
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

    Call it before anything else imports Megatron. Calling it again does nothing.
    """
    from jreg_megatron.cpu import megatron, redirect

    megatron.import_for_the_cpu()
    redirect.install()
    megatron.install()


def enable_for(device: torch.device) -> None:
    """Import Megatron, and have its local layers run in torch alone on a device: a CPU, for which this is
    :func:`enable`, or a GPU."""
    if device.type == "cpu":
        enable()
    else:
        from jreg_megatron.mcore import local_layers

        local_layers.install()
