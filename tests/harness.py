"""Real multi-process runs for the tests: ranks with gloo, forked from a server that imported Megatron once.

Importing Megatron takes ten seconds a process. The fork server pays that once per test session; each rank
is still a process of its own, with its own environment, as torchrun would start it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jreg_megatron.runtime import errors
from jreg_megatron.runtime.fork import free_port

TOY = """
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --make-vocab-size-divisible-by 8
    --normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant
    --log-interval 1 --eval-interval 100 --eval-iters 0 --seed 3
    --tokenizer-type NullTokenizer --vocab-size 256
""".split()
"""A Llama small enough for eight ranks on two cores; token 255 ends a document."""

MEGATRON_FSDP = """
    --use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --ckpt-format fsdp_dtensor
""".split()
"""Megatron-FSDP that shards all there is to shard."""

# The fork server is a fresh interpreter; before Python 3.13 it drops the path that pytest has set up.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["harness_preload"])


@dataclass
class Finished:
    """A run that has ended: exit status and output per rank."""

    status: list[int]
    output: list[str]


def run_ranks(
    argv: Sequence[object],
    world_size: int = 1,
    *,
    entry: str = "jreg_megatron.pretrain:main",
    timeout: float = 240,
    check: bool = True,
) -> Finished:
    """Run ``entry(argv)`` in ``world_size`` processes that form one gloo job.

    Args:
        argv: command line, without the program.
        world_size: number of ranks.
        entry: ``module:function``, or a path of a script to be run as ``__main__``.
        timeout: seconds after which hanging ranks are killed and the test fails.
        check: fail if a rank does not end with status 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        arguments = [str(argument) for argument in argv]
        ranks = [
            _context.Process(target=_rank_main, args=(entry, arguments, rank, world_size, port, log))
            for rank, log in enumerate(logs)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        hanging = [number for number, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
        output = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
        status = [rank.exitcode or 0 for rank in ranks]
    tail = "\n".join(
        f"--- rank {n} (status {s})\n{o[-3000:]}" for n, (s, o) in enumerate(zip(status, output, strict=True))
    )
    assert not hanging, f"ranks {hanging} still ran after {timeout} s\n{tail}"
    assert not check or not any(status), f"status {status}\n{tail}"
    return Finished(status, output)


def run_function(
    function: Callable[..., Any], world_size: int = 1, *args: Any, timeout: float = 240
) -> list[Any]:
    """Run an importable ``function(*args)`` on every rank of a gloo job; returns each rank's result."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"{function.__module__}:{function.__qualname__}"
        task = Path(folder) / "task.pickle"
        task.write_bytes(pickle.dumps((name, args)))
        run_ranks([task, folder], world_size, entry="harness:_call_pickled", timeout=timeout)
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def read_scalars(folder: Path) -> dict[str, list[float]]:
    """All TensorBoard scalars under ``folder``, by tag, in order of the iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _rank_main(entry: str, argv: list[str], rank: int, world_size: int, port: int, log: Path) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    errors._MOST_SECONDS_TO_WAIT = 0.0  # nothing here ends a rank when another has failed
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [entry, *argv]
    if entry.endswith(".py"):
        runpy.run_path(entry, run_name="__main__")
        return
    module, function = entry.split(":")
    getattr(__import__(module, fromlist=["_"]), function)(argv)


def _call_pickled(argv: list[str]) -> None:
    import torch.distributed as dist

    task, folder = argv
    name, args = pickle.loads(Path(task).read_bytes())
    module, function = name.split(":")
    dist.init_process_group("gloo")
    result = getattr(__import__(module, fromlist=["_"]), function)(*args)
    (Path(folder) / f"result{dist.get_rank()}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
