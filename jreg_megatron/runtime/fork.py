"""One import of Megatron for all ranks: import, then fork."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from jreg_megatron.runtime.errors import UserError, print_error

_GRACE_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1
_NOT_EPHEMERAL = range(20000, 32768)  # Linux takes higher ports for outgoing connections by default


def world_size_of(nproc: int | None) -> int:
    """The number of ranks, by ``--nproc`` or else by torchrun's environment variables.

    Raises:
        UserError: for ``--nproc`` under torchrun or below 1; if only some of torchrun's variables are set; or
            if they are not set, and srun or mpirun has started several processes.
    """
    if nproc is not None:
        check_nproc(nproc)
        return nproc
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if (rank, size) == (None, None):
        if name := started_by_others():
            raise UserError(
                f"{name} is {os.environ[name]}, but RANK and WORLD_SIZE are not set, so each process would "
                "run alone; start the ranks with torchrun; or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR "
                f"and MASTER_PORT; or unset {name} for one process"
            )
        return 1
    if not ((rank or "").isdecimal() and (size or "").isdecimal()):
        raise UserError(
            f"the environment has RANK={rank} and WORLD_SIZE={size}; start the ranks with torchrun, or "
            "unset both"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if int(size or 1) > 1 and name not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {size}, but {name} is not set; start the ranks with torchrun, or set it to "
                "the same value on every rank"
            )
    return int(size or 1)


def started_by_others() -> str:
    """The variable by which srun or mpirun says that it has started several processes; empty if none does."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") != "1":
            return name
    return ""


def check_nproc(nproc: int) -> None:
    """Refuse ``--nproc`` under torchrun, or below 1.

    Raises:
        UserError: for both.
    """
    if "RANK" in os.environ:
        raise UserError("--nproc is for a run without torchrun; leave it out under torchrun")
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}; it must be >= 1")


def be_alone_unless_started() -> None:
    """Set the variables of a single rank, unless torchrun or :func:`fork_ranks` has started this process.

    If another program has, and has not set ``LOCAL_RANK``, it is taken from srun's or mpirun's variable.

    Raises:
        UserError: as :func:`world_size_of`.
    """
    world_size_of(None)
    local = os.environ.get("SLURM_LOCALID") or os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or "0"
    alone = {"MASTER_ADDR": "localhost", "RANK": "0", "LOCAL_RANK": local, "WORLD_SIZE": "1"}
    for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
        os.environ.setdefault(name, value)


def take_one_thread() -> None:
    """Limit torch to one thread in this process, as torchrun does, unless ``OMP_NUM_THREADS`` is set.

    More threads than free cores make a step many times slower, and the number of threads changes the last
    bits of the losses.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def fork_ranks(count: int, work: Callable[[], None]) -> int:
    """Run ``work`` in ``count`` forked ranks of one job on this machine.

    A short run spends most of its time on the import of Megatron. Forked ranks share one import. Each rank's
    environment has its number, as under torchrun. If a rank fails, the others are terminated.

    Returns:
        0, or the exit status of the first rank that failed (128 + N after signal N).
    """
    # Every rank needs these by its first step: tokenizers import transformers, optimizers import dynamo.
    import megatron.core.tokenizers.text  # noqa: F401
    import torch._dynamo  # noqa: F401

    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(free_port()),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
    )
    # A garbage collection in a rank would touch all imported objects, and so copy their memory.
    gc.freeze()
    take_one_thread()
    # A scheduler ends a job by SIGTERM. The ranks must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_run_rank, args=(rank, work)) for rank in range(count)]
    try:
        for rank in ranks:
            rank.start()
        return _first_failure(ranks)
    finally:
        _end(ranks)
        gc.unfreeze()


def _run_rank(rank: int, work: Callable[[], None]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_the_parent()
    # A killed rank may have forked, as Megatron does to save checkpoints. The child must die too: it keeps
    # the rank's sockets and pipes open, so neither the other ranks nor the launcher would see the death.
    os.register_at_fork(after_in_child=end_with_the_parent)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    work()


def end_with_the_parent() -> None:
    """Have this process killed when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_failure(ranks: list[multiprocessing.context.ForkProcess]) -> int:
    """Wait until all ranks have ended, or one has failed. Returns its exit status, or 0."""
    running: dict[Any, Any] = {rank.sentinel: (number, rank) for number, rank in enumerate(ranks)}
    while running:
        ended = []
        for sentinel in multiprocessing.connection.wait(list(running)):
            number, rank = running.pop(sentinel)
            rank.join()  # the sentinel is ready a moment before the process has ended
            ended.append((rank.exitcode or 0, number))
        # A killed rank comes first: it printed nothing, and the others fail because of it.
        status, number = min(ended)
        if status < 0:
            what = f"rank {number} was killed by signal {-status} ({signal.strsignal(-status)})"
            print_error(f"{what}; the other ranks are terminated")
            return 128 - status
        if status := max(ended)[0]:
            return status
    return 0


def _end(ranks: list[multiprocessing.context.ForkProcess]) -> None:
    """Terminate the running ranks. As under torchrun, a rank that ignores SIGTERM is killed after a while."""
    running = [rank for rank in ranks if rank.is_alive()]
    for rank in running:
        rank.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in running:
        rank.join(max(0.0, deadline - time.monotonic()))
        rank.kill()


def free_port() -> int:
    """A TCP port that nothing listens on, and that no outgoing connection can take."""
    for port in random.SystemRandom().sample(_NOT_EPHEMERAL, 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise UserError(
        f"no free TCP port among 100 tried in {_NOT_EPHEMERAL.start}..{_NOT_EPHEMERAL.stop - 1}; end some "
        "programs on this machine"
    )
