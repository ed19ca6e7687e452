"""The cost of a training step: Megatron's own, run in turn without JREG, with it, and in the naive way.

Megatron sets everything up as for a training run. All ways share one model. Every second step is
unmodified. Each other step is compared with the two around it, because other work on the machine lasts longer
than a step and slows all three.
"""

from __future__ import annotations

import gc
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from jreg_megatron.bench import megatron, options
from jreg_megatron.bench.counting import COUNTED, busy, count
from jreg_megatron.bench.options import ATTACHED, INTERVAL, KINDS, UNMODIFIED, WAYS
from jreg_megatron.bench.rounds import median_ratio, rounds
from jreg_megatron.bench.variants import make_variants
from jreg_megatron.runtime.errors import UserError, one_line, quiet_interrupt, user_errors_exit
from jreg_megatron.runtime.fork import fork_ranks, world_size_of
from jreg_megatron.runtime.ranks import of_every_rank

FEWEST_ROUNDS = 2
"""In the first one the ways that measure do so, in the second one only those that always measure."""
SHARES = dict(zip(KINDS, (1 - 1 / INTERVAL, 1 / INTERVAL), strict=True))
"""Each kind's share of the steps of a training. A way that never logs has only ordinary steps."""
BUSY = 0.9
"""If the device is busy for at least this share of a step, the step waits for the device."""
ENOUGH = 0.0025
"""If half the width of every interval is at most this, no more rounds are needed."""

_LOOKS = 2
"""Steps of each way in which the profiler records device and host."""
_SLOWER = 3
"""With the profiler a step is up to this many times as long. The deadline includes that."""
_STEPS_TO_SETTLE = 64
"""At most this many are skipped until fp16's loss scale fits."""


def run(args: Namespace, more: list[str], finish: Callable[[dict[str, Any]], None]) -> int:
    """``bench step``: start the ranks, train, gather their results; ``finish`` gets these on the first rank.

    Returns:
        The exit status.

    Raises:
        UserError: for a mistake in the options.
    """
    deadline = time.monotonic() + args.seconds
    on_cpu = bool(args.cpu or args.nproc) or not torch.cuda.is_available()
    options.complete(args, more, world_size_of(args.nproc), on_cpu)
    megatron.make_ready(on_cpu)
    if args.nproc in (None, 1):
        _measure(args, deadline, finish)
        return 0

    def rank() -> None:
        with quiet_interrupt(), user_errors_exit():
            _measure(args, deadline, finish)

    return fork_ranks(args.nproc, rank)


def _measure(args: Namespace, deadline: float, finish: Callable[[dict[str, Any]], None]) -> None:
    is_first = os.environ.get("RANK", "0") == "0"
    with megatron.quiet() as terminal:
        hidden = args.quiet or not is_first
        with tqdm(desc="steps", unit="", file=terminal, disable=hidden or None, dynamic_ncols=True) as bar:

            def work(*given: Any, **named: Any) -> Measured:
                return measure(args, deadline, bar.update, *given, **named)

            try:
                measured = megatron.train(megatron.arguments_of(args, most_steps(args.rounds)), args, work)
            except torch.OutOfMemoryError as error:
                what = one_line(error).partition(". ")[0]
                raise UserError(
                    f"the model does not fit ({what}); give less --layers or --micro-batch"
                ) from None
        of_ranks = of_every_rank(measured)
        dist.destroy_process_group()
    if is_first:
        about = {
            "model": asdict(args.model),
            **{"dtype": args.dtype, "layout": args.layout},
            "tokens": args.model.micro_batch * args.model.sequence,
            "jreg": asdict(args.config),
            "weighted_layers": int((args.config.gradient_weights(args.model.num_layers) > 0).sum()),
            "notes": [*args.notes, *megatron.notes(args.on_cpu)],
        }
        finish(summarize(of_ranks, _by_processor_time(args)) | about)


def _by_processor_time(args: Namespace) -> bool:
    return bool(args.on_cpu and args.layout["ranks"] == 1)


def most_steps(rounds: int) -> int:
    """The largest number of training steps that ``rounds`` rounds need."""
    return _STEPS_TO_SETTLE + len(WAYS) * (2 + _LOOKS + 1 + len(KINDS) + 2 * rounds)


def kind_of_step(way: str, iteration: int) -> str:
    """The kind of a step, one of :data:`.options.KINDS`."""
    return KINDS[way in ATTACHED and iteration % INTERVAL == 0]


@dataclass
class Measured:
    """What a rank has measured. The timed steps are in the order in which they ran."""

    names: list[str] = field(default_factory=list)
    """The way of each timed step."""
    kinds: list[str] = field(default_factory=list)
    """Its kind."""
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds of this process's threads in each."""
    busy: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By way, :func:`.counting.busy` of a few ordinary steps; empty on a CPU."""
    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Of each way's ordinary and logging step; empty without ``--count``."""


def measure(
    args: Namespace,
    deadline: float,
    on_step: Callable[[], object],
    train_step: Any,
    forward_step: Any,
    data: Any,
    model: Any,
    *rest: Any,
    **named: Any,
) -> Measured:
    """Run the ways in turn.

    Args:
        args: as :func:`.options.complete` has made them.
        deadline: on the monotonic clock; after it no round begins, except the first :data:`FEWEST_ROUNDS`.
        on_step: called after each step, for a progress bar.
        train_step: Megatron's; the arguments after it are its arguments.
    """
    variants = make_variants(model, args.config, args.ways)

    def run[T](name: str, iteration: int, around: Callable[[Callable[[], None]], T]) -> T:
        """Put a way on, let ``around`` run a training step, and remove the way."""
        variant = variants[name]
        of_variant = variant.forward_step(forward_step)

        def step() -> None:
            train_step(of_variant, data, model, *rest, **named)
            variant.after_step(iteration)

        with variant.on(iteration):
            found = around(step)
        on_step()
        return found

    for iteration in (INTERVAL, 1):  # work that is done once per run
        began = time.monotonic()
        for name in variants:
            run(name, iteration, lambda step: step())
    a_step = (time.monotonic() - began) / len(variants)
    # The profiler comes last: it may leave the host slower than it was.
    looks = 0 if args.on_cpu else 1 + _LOOKS * len(variants)
    counts = 1 + len(KINDS) * len(variants) if args.count else 0
    measured = time_rounds(args, run, deadline - _SLOWER * a_step * (looks + counts))
    if looks:
        run(UNMODIFIED, 1, busy)  # the profiler's warm-up
        for name in [*variants] * _LOOKS:
            measured.busy.setdefault(name, []).append(run(name, 1, busy))
    if counts:
        run(UNMODIFIED, 1, count)
        for kind, iteration in zip(KINDS, (1, INTERVAL), strict=True):
            for name in variants:
                measured.counts.setdefault(name, {})[kind] = run(name, iteration, count)
    return measured


def time_rounds(args: Namespace, run: Callable[..., Any], deadline: float) -> Measured:
    """Rounds of all ways, with an unmodified step before and after each; ``run`` runs one."""
    measured = Measured()

    def timed(name: str, iteration: int) -> None:
        if len(measured.names) % 100 == 0:
            gc.collect()  # between steps, as Megatron does
        wall, processor = run(name, iteration, seconds_of)
        measured.wall.append(wall)
        measured.processor.append(processor)
        measured.names.append(name)
        measured.kinds.append(kind_of_step(name, iteration))

    def is_over() -> bool:
        seconds = measured.processor if _by_processor_time(args) else measured.wall
        found = _of_ways(measured, np.array(seconds)).values()
        is_sharp = all(half_width(of_way["confidence_95"]) <= ENOUGH for of_way in found)
        return of_every_rank(time.monotonic() > deadline or is_sharp)[0]

    timed(UNMODIFIED, 1)
    for number, name in rounds(args.ways, args.rounds, FEWEST_ROUNDS, is_over):
        timed(name, number or INTERVAL)
        timed(UNMODIFIED, 1)
    return measured


def half_width(limits: Sequence[float] | None) -> float:
    """Half the width of an interval; infinite if there is none."""
    return math.inf if limits is None else (limits[1] - limits[0]) / 2


def seconds_of(step: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock seconds of a step, and processor seconds of this process in it. Collective."""
    dist.barrier()
    torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    step()
    torch.cuda.synchronize()
    processor = time.process_time() - processor
    return time.perf_counter() - wall, processor


def summarize(measured: Sequence[Measured], by_processor_time: bool) -> dict[str, Any]:
    """The result of all ranks together.

    Args:
        measured: of each rank, in order.
        by_processor_time: for one rank on a CPU: the figures are its processor time, on which other work has
            less effect. Else they are wall-clock times of the slowest rank.

    Returns:
        ``ratio`` and ``spread`` by way; ``median_seconds``; ``busy``, by way the seconds of
        :func:`.counting.busy` on the rank with the most; ``waits_for``: "device", "host", "unknown", or "one"
        on a CPU, where both are one; counts by way, kind of step and rank, if ``--count`` is given; all
        ``steps``, with seconds by rank.
    """
    first = measured[0]
    wall = np.array([each.wall for each in measured])
    processor = np.array([each.processor for each in measured])
    seconds = (processor if by_processor_time else wall).max(axis=0)
    found = _of_ways(first, seconds)
    names = np.array(first.names)
    medians = {name: float(np.median(seconds[names == name])) for name in WAYS if name in names}
    looks = {
        name: {
            what: max(float(np.median([look[what] for look in each.busy[name]])) for each in measured)
            for what in ("whole", "device", "host")
        }
        for name in first.busy
    }
    waits_for = "one"
    if looks:
        device = looks[UNMODIFIED]["device"]
        waits_for = "host" if device < BUSY * medians[UNMODIFIED] else "device"
        waits_for = waits_for if device else "unknown"  # the profiler saw nothing
    return {
        "ratio": {name: of_way["ratio"] for name, of_way in found.items()},
        "spread": {
            name: {what: value for what, value in of_way.items() if what != "ratio"}
            for name, of_way in found.items()
        },
        "clock": "processor" if by_processor_time else "wall",
        "median_seconds": medians,
        "busy": looks,
        "waits_for": waits_for,
        **{
            what: {
                name: {kind: [each.counts[name][kind][what] for each in measured] for kind in kinds}
                for name, kinds in first.counts.items()
            }
            for what in (COUNTED if first.counts else ())
        },
        "steps": {"variant": first.names, "wall": wall.tolist(), "processor": processor.tolist()},
    }


def _of_ways(measured: Measured, seconds: NDArray[np.float64]) -> dict[str, dict[str, Any]]:
    """By way, the ratios of the seconds ``[n]`` of steps to the mean of the steps before and after."""
    ratios = 2 * seconds[1:-1] / (seconds[:-2] + seconds[2:])
    names, kinds = np.array(measured.names[1:-1]), np.array(measured.kinds[1:-1])
    ways = [name for name in WAYS if name != UNMODIFIED and name in names]
    return {name: median_ratio(ratios[names == name], kinds[names == name], SHARES) for name in ways}
