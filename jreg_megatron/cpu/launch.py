"""One import of Megatron for all ranks: import, then fork."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
from collections.abc import Callable


def fork_ranks(count: int, work: Callable[[], None]) -> int:
    """Run ``work`` in ``count`` forked ranks of one job on this machine.

    Importing Megatron is most of a short run's time. Ranks that are forked after the import share one,
    where a launcher that starts processes pays for each of them.

    Args:
        count: number of ranks.
        work: what every rank runs; it finds its rank where torchrun would put it, in the environment.

    Returns:
        0, or the exit status of the first rank that failed; the others are ended then.
    """
    # What every rank would import by its first step: tokenizers bring transformers, optimizers bring dynamo.
    import megatron.core.tokenizers.text  # noqa: F401
    import torch
    import torch._dynamo

    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(_free_port()),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
    )
    # A collection in a rank would touch, and so copy, all that the import made.
    gc.freeze()
    if "OMP_NUM_THREADS" not in os.environ:
        # As under torchrun. More threads than free cores make a step many times slower, and their
        # number would show in the last bits of the losses.
        torch.set_num_threads(1)
    # A scheduler ends a job by SIGTERM; the ranks must not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_run_rank, args=(rank, work)) for rank in range(count)]
    try:
        for rank in ranks:
            rank.start()
        return _first_failure(ranks)
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.terminate()


def _run_rank(rank: int, work: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    work()


def _first_failure(ranks: list[multiprocessing.context.ForkProcess]) -> int:
    """Wait until all ranks have ended, or one has failed; its exit status, or 0."""
    running = list(ranks)
    while running:
        multiprocessing.connection.wait([rank.sentinel for rank in running])
        for rank in [rank for rank in running if not rank.is_alive()]:
            running.remove(rank)
            if rank.exitcode:
                return rank.exitcode if rank.exitcode > 0 else 128 - rank.exitcode
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
