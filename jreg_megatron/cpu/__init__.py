"""Megatron's own training loop on a CPU: gloo for NCCL, torch-only layers for fused kernels.

Megatron-Core names CUDA by hand in a few hundred places. :func:`enable` redirects those names to the
CPU for the life of the process; :data:`FLAGS` choose the code paths that need no CUDA kernel. A run on
GPUs redirects nothing.
"""

from __future__ import annotations

from functools import cache

from jreg_megatron.cpu.flags import FLAGS, announcement, with_cpu_flags

__all__ = ["FLAGS", "announcement", "enable", "with_cpu_flags"]


@cache
def enable() -> None:
    """Import Megatron and redirect all its uses of CUDA to the CPU.

    Call it before anything else imports Megatron. Calling it again does nothing.
    """
    from jreg_megatron.cpu import megatron, redirect

    megatron.import_for_the_cpu()
    redirect.install()
    megatron.install()
