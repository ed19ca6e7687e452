"""``bench step``: start the ranks, train, gather what they measured."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jreg_megatron.bench import megatron
from jreg_megatron.bench.options import Setup, has_cuda, setup_of, world_size_of


def run(args: Namespace, more: list[str], finish: Callable[[dict[str, Any]], None]) -> int:
    """Measure; ``finish`` gets the figures on the first rank. Returns the exit status.

    Raises:
        UserError: for a mistake in the options.
    """
    deadline = time.monotonic() + args.seconds
    world_size = world_size_of(args)
    on_cpu = bool(args.cpu or args.nproc) or not has_cuda()
    setup = setup_of(args, more, world_size, on_cpu)
    megatron.make_ready(on_cpu)

    def work() -> None:
        figures = _measure(setup, deadline, on_cpu, args.quiet, args.verbose)
        if figures is not None:
            finish(figures)

    if args.nproc is None or args.nproc == 1:
        work()
        return 0
    from jreg_megatron.runtime.errors import quiet_interrupt, user_errors_exit
    from jreg_megatron.runtime.fork import fork_ranks

    def rank() -> None:
        with quiet_interrupt(), user_errors_exit():
            work()

    return fork_ranks(args.nproc, rank)


def _measure(
    setup: Setup, deadline: float, on_cpu: bool, is_quiet: bool, is_verbose: bool
) -> dict[str, Any] | None:
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from jreg_megatron.bench.step import Task, most_steps, summarize
    from jreg_megatron.runtime.errors import UserError

    is_first = os.environ.get("RANK", "0") == "0"
    with megatron.quiet(is_verbose) as terminal:
        hidden = is_quiet or not is_first or is_verbose
        bar = tqdm(desc="steps", unit="", file=terminal, disable=hidden or None, dynamic_ncols=True)
        task = Task(
            setup.config,
            ways=setup.ways,
            rounds=setup.rounds,
            deadline=deadline,
            counts=setup.counts,
            by_processor_time=on_cpu,
            on_step=lambda: bar.update() and None,
        )
        try:
            argv = megatron.arguments_of(setup, most_steps(setup.rounds), on_cpu)
            measured = megatron.train(argv, setup.config, task.run)
        except torch.OutOfMemoryError as error:
            what = " ".join(str(error).split()).partition(". ")[0]
            raise UserError(f"the model does not fit ({what}); give less --layers or --micro-batch") from None
        bar.close()
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, measured)
        dist.destroy_process_group()
    if not is_first:
        return None
    return {**summarize(of_ranks, by_processor_time=on_cpu), **_about(setup, on_cpu)}


def _about(setup: Setup, on_cpu: bool) -> dict[str, Any]:
    return {
        "model": asdict(setup.shape),
        "dtype": setup.dtype,
        "layout": setup.layout,
        "tokens": setup.shape.micro_batch * setup.shape.sequence,
        "jreg": asdict(setup.config),
        "weighted_layers": int((setup.config.gradient_weights(setup.shape.num_layers) > 0).sum()),
        "notes": [*setup.notes, *megatron.notes(on_cpu)],
    }
