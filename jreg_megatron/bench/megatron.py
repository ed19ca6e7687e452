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

# On a GPU without Transformer Engine, torch has kernels for the same work, except for attention.
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
    """Megatron's command line for at most ``steps`` steps; ``args`` are from :func:`.options.complete`."""
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
        # So small that the model hardly changes.
        "--lr": 1e-6,
        "--lr-decay-style": "constant",
        # The norm is computed, but none is above this. Else only some steps would scale their gradients.
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
    """Let Megatron set up a training and run its first steps, then call ``work`` in place of the others.

    The first steps are one after which Megatron finishes its set-up, and those that fp16's loss scale skips.

    Args:
        argv: Megatron's command line.
        args: has the ``config`` that ``work`` attaches.
        work: called once, with Megatron's ``train_step`` and its arguments. Its result is returned.

    Raises:
        UserError: for invalid arguments, or if Megatron ends before ``work`` is called.
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
    """Hide what Megatron and its libraries print; yields the terminal's standard error.

    Raises:
        UserError: if the code inside exits; it quotes the last line that was printed.
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
                f"Megatron ended the run with status {ended.code or 0} before all was measured; its last "
                f"line: {last or 'none'}"
            ) from None
        finally:
            point(own)
            for descriptor in own:
                os.close(descriptor)


def notes(on_cpu: bool) -> list[str]:
    """How the steps differ from those of a cluster with NVIDIA's packages."""
    if on_cpu:
        return []
    found = []
    if not has_transformer_engine():
        found.append(
            "Without Transformer Engine attention writes its scores to memory, so the unmodified step is "
            "slower and the ratios are nearer to 1."
        )
    if not has_apex():
        found.append(f"Without Apex the steps run with {NO_FUSION}.")
    return found
