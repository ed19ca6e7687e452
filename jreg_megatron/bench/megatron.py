"""Megatron's training loop around the steps that are measured."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from jreg_megatron.mcore.installed import NO_FUSION, has_apex, has_transformer_engine, need_training_loop
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.fork import be_alone_unless_started, take_one_thread
from jreg_megatron.runtime.imports import silence_megatron

_NEVER = 10**9

# On a GPU without Transformer Engine torch's own kernels do what its would, attention excepted.
_LOCAL = """
    --transformer-impl local --attention-backend unfused
    --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion
"""


def make_ready(on_cpu: bool) -> None:
    """Import Megatron, for the CPU or for GPUs, without its warnings."""
    silence_megatron()
    from jreg_megatron import cpu
    from jreg_megatron.mcore.dataset_helper import use_built_helper

    if on_cpu:
        cpu.enable()
        take_one_thread()
    else:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it before Blackwell
        if not has_transformer_engine():
            from jreg_megatron.mcore import local_layers

            local_layers.install()
    need_training_loop("bench step")
    use_built_helper()


def arguments_of(args: Namespace, steps: int) -> list[str]:
    """Megatron's command line for at most so many steps; ``args`` are from :func:`.options.complete`."""
    shape = args.model
    sizes = {
        "--seq-length": shape.sequence,
        "--max-position-embeddings": shape.sequence,
        "--micro-batch-size": shape.micro_batch,
        "--global-batch-size": shape.micro_batch * shape.micro_batches * args.data_parallel,
        "--tensor-model-parallel-size": args.tp,
        "--pipeline-model-parallel-size": args.pp,
        "--context-parallel-size": args.cp,
        "--vocab-size": shape.vocab_size - 1,  # and one for the end of a document
        "--train-iters": steps,
        "--log-interval": _NEVER,
        "--eval-interval": _NEVER,
        "--eval-iters": 0,
        "--manual-gc-interval": 100,
        # So slow that the model stays what it is.
        "--lr": 1e-6,
        "--lr-decay-style": "constant",
        # The norm is taken as ever, but none is above this: else some steps would scale their gradients.
        "--clip-grad": 1e6,
        "--tokenizer-type": "NullTokenizer",
    }
    argv = shape.megatron_arguments() + ([] if args.dtype == "fp32" else [f"--{args.dtype}"])
    argv += [str(word) for flag_and_size in sizes.items() for word in flag_and_size]
    argv += ["--mock-data", "--manual-gc"]
    if shape.recipe and args.tp > 1:
        argv.append("--sequence-parallel")
    if args.on_cpu:
        from jreg_megatron import cpu

        return cpu.with_cpu_flags([*argv, *args.more])
    argv += ["--transformer-impl", "transformer_engine"] if has_transformer_engine() else _LOCAL.split()
    return [*argv, *([] if has_apex() else [NO_FUSION]), *args.more]


def train[T](argv: list[str], args: Namespace, work: Callable[..., T]) -> T:
    """Have Megatron set up a training; ``work`` stands for all of its steps but the first ones.

    The first one is Megatron's own, which finishes its set-up after it; so are those that fp16's loss scale
    skips.

    Args:
        argv: its command line.
        args: with the ``config`` of what ``work`` attaches.
        work: called once, with Megatron's ``train_step`` and what that gets. Its result is returned.

    Raises:
        UserError: for arguments that cannot be, or if Megatron ends before ``work`` is called.
    """
    from megatron.training import get_args, training

    from jreg_megatron import gpt_pretraining

    be_alone_unless_started()
    sys.argv = [sys.argv[0], *argv]
    config = gpt_pretraining.read_arguments(args.config)
    train_step, is_set_up = training.train_step, False
    found: list[T] = []

    def steps(*given: Any, **named: Any) -> Any:
        nonlocal is_set_up
        if is_set_up:
            found.append(work(train_step, *given, **named))
            get_args().train_iters = get_args().curr_iteration + 1
        result = train_step(*given, **named)
        is_set_up = not result[1]  # whether it was skipped
        return result

    training.train_step = steps
    gpt_pretraining.train(config)
    if not found:
        raise UserError(
            "Megatron ended the training before anything was measured; leave out the flags after -- that "
            "end it, or use bf16 instead of fp16"
        )
    return found[0]


@contextlib.contextmanager
def quiet() -> Iterator[TextIO]:
    """Keep what Megatron prints out of sight, also what its libraries print; gives the standard error.

    Raises:
        UserError: where something in it exits, with what was printed last.
    """

    def point(to: tuple[int, int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in zip((1, 2), to, strict=True):
            os.dup2(target, descriptor)

    own = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+b") as log, os.fdopen(os.dup(2), "w") as terminal:
        point((log.fileno(), log.fileno()))
        try:
            yield terminal
        except SystemExit as ended:
            point(own)
            log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2].strip()
            raise UserError(
                f"Megatron ended the run with status {ended.code or 0} before all was measured; the last "
                f"that it printed: {last or 'nothing'}"
            ) from None
        finally:
            point(own)
            for descriptor in own:
                os.close(descriptor)


def notes(on_cpu: bool) -> list[str]:
    """What makes the steps others than those of a cluster where NVIDIA's packages are installed."""
    if on_cpu:
        return []
    found = []
    if not has_transformer_engine():
        found.append(
            "Without Transformer Engine attention writes its scores to memory: the unmodified step is slower "
            "than with it, and the ratios to it are nearer to 1."
        )
    if not has_apex():
        found.append(f"Without Apex the steps run with {NO_FUSION}.")
    return found
