"""The cost of a training step: Megatron's own, run in turn without JREG, with it, and in the naive way.

Megatron sets everything up as for a training run. All ways share one model. Every second step is
unmodified, and each other one is compared with the two around it: what else the machine does lasts longer
than a step and hits all three.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from jreg_megatron.bench.counting import Busy, Counts, busy, count
from jreg_megatron.bench.names import KINDS, UNMODIFIED, WAYS
from jreg_megatron.bench.ratios import median_ratio
from jreg_megatron.bench.variants import LOG_INTERVAL, Variant, make_variants
from jreg_megatron.methods.jreg.settings import JRegConfig

FEWEST_ROUNDS = 2
"""In the first one all ways that measure do, in the second one none has to."""
BUSY = 0.9
"""The share of a step in which the device does something, from which on the step waits for the device."""
ENOUGH = 0.0025
"""Half the width of an interval, from which on no more rounds are needed."""

_LOOKS = 2
"""Steps of each way of which is looked at what the device and the host do."""
_SLOWER = 3
"""So many times as long as another one a step may take with the profiler; for the deadline."""
_STEPS_TO_SETTLE = 64
"""At most so many are skipped until fp16's loss scale fits."""


def whole_rounds(config: JRegConfig) -> int:
    """Rounds after which steps that measure and steps that log have had their share."""
    return math.lcm(LOG_INTERVAL, config.measure_interval)


def shares_of_kinds(config: JRegConfig, kind: Callable[[int], str]) -> dict[str, float]:
    """What share of training's steps is of which kind; ``kind`` tells it of an iteration."""
    whole = whole_rounds(config)
    counts = Counter(kind(iteration) for iteration in range(1, whole + 1))
    return {name: number / whole for name, number in counts.items()}


def most_steps(rounds: int) -> int:
    """How many training steps so many rounds take at most."""
    return _STEPS_TO_SETTLE + len(WAYS) * (2 + _LOOKS + 1 + len(KINDS) + 2 * rounds)


@dataclass
class Measured:
    """What a rank has measured."""

    names: list[str] = field(default_factory=list)
    """The way of each timed step, in the order in which they ran."""
    kinds: list[str] = field(default_factory=list)
    """What sets it apart from others of its way."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """By way, what share of training's steps each kind has."""
    wall: list[float] = field(default_factory=list)
    """Seconds of each."""
    processor: list[float] = field(default_factory=list)
    """Seconds of this process's threads in each."""
    busy: dict[str, list[Busy]] = field(default_factory=dict)
    """By way, what device and host do in a few ordinary steps; empty on a CPU, where they are one."""
    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)
    """Of each way's ordinary and logging step; empty if that is not asked for."""


@dataclass(frozen=True)
class Task:
    """What to measure, and for how long."""

    config: JRegConfig
    ways: Sequence[str]
    """Beside the unmodified one."""
    rounds: int
    """At most."""
    deadline: float
    """On the monotonic clock; after it no round begins but the first :data:`FEWEST_ROUNDS`."""
    counts: bool
    by_processor_time: bool
    on_step: Callable[[], None]
    """Told of each step, for a progress bar."""

    def run(
        self, train_step: Any, forward_step: Any, data: Any, model: Any, *rest: Any, **named: Any
    ) -> Measured:
        """Run the ways in turn; the arguments are Megatron's ``train_step`` and those that it gets."""
        variants = make_variants(model, self.config, self.ways)
        whole = whole_rounds(self.config)

        def run(name: str, iteration: int, around: Callable[[Callable[[], Any]], Any]) -> Any:
            """A training step that way, which is put on before and taken off after ``around``."""
            variant = variants[name]
            of_variant = variant.forward_step(forward_step)

            def step() -> None:
                train_step(of_variant, data, model, *rest, **named)
                variant.after_step(iteration)

            with variant.on(iteration):
                found = around(step)
            self.on_step()
            return found

        measured = Measured()
        for name, variant in variants.items():
            measured.shares[name] = shares_of_kinds(self.config, variant.kind)
        for iteration in (whole, 1):  # what is done once in a run is done here
            began = time.monotonic()
            for name in variants:
                run(name, iteration, _plainly)
        a_step = (time.monotonic() - began) / len(variants)
        # The profiler comes last: it may leave the host slower than it was.
        looks = 0 if self.by_processor_time else 1 + _LOOKS * len(variants)
        counts = 1 + len(KINDS) * len(variants) if self.counts else 0
        self._time(measured, variants, run, self.deadline - _SLOWER * a_step * (looks + counts))
        if looks:
            run(UNMODIFIED, 1, busy)  # the profiler's own first time
            for name in [*variants] * _LOOKS:
                measured.busy.setdefault(name, []).append(run(name, 1, busy))
        if counts:
            run(UNMODIFIED, 1, count)
            for kind, iteration in zip(KINDS, (1, whole), strict=True):
                for name in variants:
                    measured.counts.setdefault(name, {})[kind] = run(name, iteration, count)
        return measured

    def _time(
        self, measured: Measured, variants: dict[str, Variant], run: Callable[..., Any], deadline: float
    ) -> None:
        """Rounds of all ways, with an unmodified step before and after each."""

        def timed(name: str, iteration: int) -> None:
            if len(measured.names) % 100 == 0:
                gc.collect()  # between steps, as Megatron does
            wall, processor = run(name, iteration, _seconds)
            measured.wall.append(wall)
            measured.processor.append(processor)
            measured.names.append(name)
            measured.kinds.append(variants[name].kind(iteration))

        shuffle = random.Random(0).shuffle  # the same on every rank
        order = list(self.ways)
        timed(UNMODIFIED, 1)
        for number in range(max(self.rounds, FEWEST_ROUNDS)):
            shuffle(order)
            for name in order:
                timed(name, number or whole_rounds(self.config))
                timed(UNMODIFIED, 1)
            is_enough = time.monotonic() > deadline or self._is_sharp(measured)
            if number + 1 >= FEWEST_ROUNDS and _first_ranks(is_enough):
                return

    def _is_sharp(self, measured: Measured) -> bool:
        """Whether more rounds would show no more."""
        seconds = measured.processor if self.by_processor_time else measured.wall
        found = _of_ways(measured, np.array([seconds])).values()
        return all(half_width(of_way["confidence_95"]) <= ENOUGH for of_way in found)


def half_width(limits: Sequence[float] | None) -> float:
    """Of an interval; infinite of too few steps to have one."""
    return math.inf if limits is None else (limits[1] - limits[0]) / 2


def _plainly(step: Callable[[], None]) -> None:
    step()


def _seconds(step: Callable[[], None]) -> tuple[float, float]:
    """What a step takes by the clock, and of this process's threads."""
    dist.barrier()
    torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    step()
    torch.cuda.synchronize()
    processor = time.process_time() - processor
    return time.perf_counter() - wall, processor


def _first_ranks(flag: bool) -> bool:
    told = torch.tensor(float(flag), device=torch.cuda.current_device())
    dist.broadcast(told, 0)
    return bool(told)


def summarize(measured: Sequence[Measured], by_processor_time: bool) -> dict[str, Any]:
    """What the ranks have measured together.

    A step takes as long as the last rank needs, so wall time is the longest of all ranks'. Processor time is
    compared rank by rank, since the largest of all would hide what is added on any other rank: the median of
    what a rank needs beyond its own steps before and after, over what the busiest rank needs there. The rank
    with the largest is taken, with an interval for the largest: the ranks' own hold together at 95%.
    Taking the largest of several adds some of the noise to it, as it does for ``unmodified_again``.

    Args:
        measured: of each rank, in order.
        by_processor_time: whether ``ratio`` and ``spread`` are of processor time; else of wall time.

    Returns:
        ``ratio`` and ``spread`` by way, the latter of processor time of several ranks with the ``rank``
        that needs most more; ``wall``, the same of wall time; ``median_seconds`` on the slowest rank;
        ``busy``, by way the seconds of :class:`Busy` on the rank that has most; ``waits_for``: "device" or
        "host", "one" on a CPU, where they are one, or "unknown"; counts by way, kind of step and rank, if
        there are any; all ``steps``, with seconds by rank.
    """
    first = measured[0]
    wall = np.array([each.wall for each in measured])
    processor = np.array([each.processor for each in measured])
    seconds = (processor if by_processor_time else wall).max(axis=0)
    by_wall = _of_ways(first, wall.max(axis=0, keepdims=True))
    found = _of_ways(first, processor) if by_processor_time else by_wall
    names = np.array(first.names)
    counted = ("peak_bytes", "kernels", "collectives", "synchronisations") if first.counts else ()
    medians = {name: float(np.median(seconds[names == name])) for name in first.shares}
    busy = {name: _busiest([each.busy[name] for each in measured]) for name in first.busy}
    return {
        "ratio": {name: of_name["ratio"] for name, of_name in found.items()},
        "spread": {name: _without_ratio(of_name) for name, of_name in found.items()},
        "wall": by_wall,
        "clock": "processor" if by_processor_time else "wall",
        "median_seconds": medians,
        "busy": busy,
        "waits_for": _waits_for(busy[UNMODIFIED]["device"], medians[UNMODIFIED]) if busy else "one",
        **{what: _of_ranks(measured, what) for what in counted},
        "steps": {"variant": first.names, "wall": wall.tolist(), "processor": processor.tolist()},
    }


def _of_ways(measured: Measured, seconds: NDArray[np.float64]) -> dict[str, dict[str, Any]]:
    """By way, how steps ``[ranks, n]`` compare with those around them, on the rank with the largest ratio."""
    around = (seconds[:, :-2] + seconds[:, 2:]) / 2
    ratios = 1 + (seconds[:, 1:-1] - around) / around.max(axis=0)
    names, kinds = np.array(measured.names[1:-1]), np.array(measured.kinds[1:-1])

    def of_way(name: str) -> dict[str, Any]:
        chosen = names == name
        of_ranks = [
            median_ratio(ratio[chosen], kinds[chosen], measured.shares[name], len(ratios)) for ratio in ratios
        ]
        return _largest(of_ranks)

    return {name: of_way(name) for name in measured.shares if name != UNMODIFIED}


def _largest(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    if len(of_ranks) == 1:
        return of_ranks[0]
    rank = max(range(len(of_ranks)), key=lambda rank: of_ranks[rank]["ratio"])
    intervals = [found["confidence_95"] for found in of_ranks]
    together = None if None in intervals else [max(limits) for limits in zip(*intervals, strict=True)]
    return {**of_ranks[rank], "confidence_95": together, "rank": rank}


def _without_ratio(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "ratio"}


def _waits_for(device_seconds: float, seconds: float) -> str:
    if not device_seconds:
        return "unknown"  # the profiler saw nothing
    return "device" if device_seconds >= BUSY * seconds else "host"


def _busiest(of_ranks: Sequence[Sequence[Busy]]) -> dict[str, float]:
    return {
        what: max(float(np.median([getattr(each, what) for each in of_rank])) for of_rank in of_ranks)
        for what in ("whole", "device", "host")
    }


def _of_ranks(measured: Sequence[Measured], what: str) -> dict[str, dict[str, list[int]]]:
    """By way and kind of step, one number a rank."""
    return {
        name: {kind: [getattr(each.counts[name][kind], what) for each in measured] for kind in kinds}
        for name, kinds in measured[0].counts.items()
    }
