"""The cost of a training step: Megatron's own, run in turn without JREG, with it, and in the naive way.

Megatron's ``pretrain`` builds and drives everything as in a training run; only its ``train_step`` is replaced
by one that runs the step in one of several ways and takes its time. All ways share one model. Every second
step is unmodified, and each other one is compared with the two around it: what else the machine does lasts
longer than a step and hits all three.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from jreg_megatron.bench.counting import Counts, count
from jreg_megatron.bench.names import JREG, KINDS, MEASURE, UNMODIFIED, WAYS
from jreg_megatron.bench.ratios import median_ratio
from jreg_megatron.bench.variants import LOG_INTERVAL, Variant, make_variants
from jreg_megatron.methods.jreg.settings import JRegConfig

WARM_UP = (LOG_INTERVAL, 1)
"""Iterations before the timed ones, with measuring and without."""
IN_EVERY_ROUND = (MEASURE, JREG)
"""The variants that a round has beside one of the others."""


def whole_rounds(config: JRegConfig) -> int:
    """Rounds after which steps that measure and steps that log have had their share."""
    return math.lcm(LOG_INTERVAL, config.measure_interval)


def shares_of_kinds(config: JRegConfig, kind: Callable[[int], str]) -> dict[str, float]:
    """What share of training's steps is of which kind; ``kind`` tells it of an iteration."""
    whole = whole_rounds(config)
    counts = Counter(kind(iteration) for iteration in range(1, whole + 1))
    return {name: number / whole for name, number in counts.items()}


def most_steps(rounds: int, config: JRegConfig) -> int:
    """How many training steps so many rounds take at most."""
    per_round = 2 * (len(IN_EVERY_ROUND) + 1)
    return len(WAYS) * (len(WARM_UP) + 3) + 1 + per_round * (rounds + whole_rounds(config))


@dataclass
class Measured:
    """What a rank has measured."""

    config: JRegConfig
    names: list[str] = field(default_factory=list)
    """The variant of each timed step, in the order in which they ran."""
    kinds: list[str] = field(default_factory=list)
    """What sets it apart from others of its variant."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """By variant, what share of training's steps each kind has."""
    wall: list[float] = field(default_factory=list)
    """Seconds of each."""
    processor: list[float] = field(default_factory=list)
    """Seconds of this process's threads in each."""
    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)
    """Of each variant's ordinary and logging step."""


class InterleavedSteps:
    """Stands for Megatron's ``train_step``: runs the variants in turn and ends the training when done.

    Args:
        train_step: Megatron's.
        config: JREG's settings.
        ways: names of the variants to run.
        rounds: at most so many, rounded up to :func:`whole_rounds`.
        seconds: after which the round that runs is the last, if each variant has had its turn and measured.
        on_step: told of each step, for a progress bar.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        config: JRegConfig,
        ways: Collection[str],
        rounds: int,
        seconds: float,
        on_step: Callable[[], None],
    ) -> None:
        self.measured = Measured(config)
        self._train_step = train_step
        self._ways = ways
        self._rounds = rounds
        self._seconds = seconds
        self._on_step = on_step
        self._plan: Iterator[Callable[..., Any]] | None = None
        self._next: Callable[..., Any] | None = None

    @property
    def is_done(self) -> bool:
        """Whether all steps have run."""
        return self._plan is not None and self._next is None

    def __call__(self, forward_step: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        """One training step; called by Megatron's loop."""
        if self._plan is None:
            self._plan = self._steps(make_variants(model, self.measured.config, self._ways))
            self._next = next(self._plan)
        assert self._next is not None
        result = self._next(forward_step, data_iterator, model, *rest, **named)
        self._on_step()
        self._next = next(self._plan, None)
        if self._next is None:
            from megatron.training import get_args

            get_args().train_iters = get_args().curr_iteration + 1
        return result

    def _steps(self, variants: dict[str, Variant]) -> Iterator[Callable[..., Any]]:
        for name, variant in variants.items():
            self.measured.shares[name] = shares_of_kinds(self.measured.config, variant.kind)
        for iteration in WARM_UP:
            for variant in variants.values():
                yield self._running(variant, iteration)
        yield from self._timed_steps(variants)
        yield self._counted(variants[UNMODIFIED], 1, UNMODIFIED, KINDS[0])  # the profiler's own first time
        for kind, iteration in zip(KINDS, (1, LOG_INTERVAL), strict=True):
            for name, variant in variants.items():
                yield self._counted(variant, iteration, name, kind)

    def _timed_steps(self, variants: dict[str, Variant]) -> Iterator[Callable[..., Any]]:
        shuffle = random.Random(0).shuffle  # the same on every rank
        iterations = dict.fromkeys(variants, 0)
        always = [name for name in IN_EVERY_ROUND if name in variants]
        others = [name for name in variants if name not in (UNMODIFIED, *IN_EVERY_ROUND)]
        interval, whole = self.measured.config.measure_interval, whole_rounds(self.measured.config)
        # Rounds until each has had its turn.
        turns = max(1, len(others))
        is_late = False
        began = time.monotonic()
        yield self._timed(variants[UNMODIFIED], UNMODIFIED, 1)
        for number in range(1, self._rounds + whole):
            if is_late and number >= turns:
                # The last round: what has not measured yet does so now.
                iterations |= {name: whole - 1 for name in always if iterations[name] < interval}
            names = list(always)
            names += others[number % len(others) :][:1] if others else []
            shuffle(names)
            for name in names:
                iterations[name] += 1
                yield self._timed(variants[name], name, iterations[name])
                yield self._timed(variants[UNMODIFIED], UNMODIFIED, 1)
            is_late = _any_rank(time.monotonic() - began > self._seconds)
            have_measured = all(iterations[name] >= interval for name in always)
            if is_late and number >= turns and have_measured:
                return
            if number % whole == 0 and number >= self._rounds:
                return

    def _timed(self, variant: Variant, name: str, iteration: int) -> Callable[..., Any]:
        measured = self.measured

        def around(step: Callable[[], Any]) -> Any:
            dist.barrier()
            torch.cuda.synchronize()
            wall, processor = time.perf_counter(), time.process_time()
            result = step()
            torch.cuda.synchronize()
            measured.processor.append(time.process_time() - processor)
            measured.wall.append(time.perf_counter() - wall)
            measured.names.append(name)
            measured.kinds.append(variant.kind(iteration))
            return result

        return self._running(variant, iteration, around)

    def _counted(self, variant: Variant, iteration: int, name: str, kind: str) -> Callable[..., Any]:
        def around(step: Callable[[], Any]) -> Any:
            result, counts = count(step)
            self.measured.counts.setdefault(name, {})[kind] = counts
            return result

        return self._running(variant, iteration, around)

    def _running(
        self,
        variant: Variant,
        iteration: int,
        around: Callable[[Callable[[], Any]], Any] = lambda step: step(),
    ) -> Callable[..., Any]:
        """A training step with the variant, which is put on before and taken off after ``around``."""

        def run(forward_step: Any, *rest: Any, **named: Any) -> Any:
            of_variant = variant.forward_step(forward_step)

            def step() -> Any:
                result = self._train_step(of_variant, *rest, **named)
                variant.after_step(iteration)
                return result

            with variant.on(iteration):
                return around(step)

        return run


def _any_rank(flag: bool) -> bool:
    told = torch.tensor(float(flag), device=torch.cuda.current_device())
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
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
        ``ratio`` and ``spread`` by variant, the latter of processor time of several ranks with the ``rank``
        that needs most more; ``wall``, the same of wall time; ``median_seconds`` on the slowest rank; counts
        by variant, kind of step and rank; all ``steps``, with seconds by rank.
    """
    first = measured[0]
    names, kinds = np.array(first.names), np.array(first.kinds)
    wall = np.array([each.wall for each in measured])
    processor = np.array([each.processor for each in measured])
    seconds = (processor if by_processor_time else wall).max(axis=0)
    ways = [name for name in first.counts if name != UNMODIFIED]

    def of_ways(ratios: NDArray[np.float64]) -> dict[str, dict[str, Any]]:
        found = {}
        for name in ways:
            chosen = names[1:-1] == name
            of_ranks = [
                median_ratio(ratio[chosen], kinds[1:-1][chosen], first.shares[name], len(ratios))
                for ratio in ratios
            ]
            found[name] = _largest(of_ranks)
        return found

    by_wall = of_ways(_ratios(wall.max(axis=0, keepdims=True)))
    found = of_ways(_ratios(processor)) if by_processor_time else by_wall
    return {
        "ratio": {name: of_name["ratio"] for name, of_name in found.items()},
        "spread": {name: _without_ratio(of_name) for name, of_name in found.items()},
        "wall": by_wall,
        "clock": "processor" if by_processor_time else "wall",
        "median_seconds": {name: float(np.median(seconds[names == name])) for name in first.counts},
        **{
            what: _of_ranks(measured, what)
            for what in ("peak_bytes", "kernels", "collectives", "synchronisations")
        },
        "steps": {"variant": first.names, "wall": wall.tolist(), "processor": processor.tolist()},
    }


def _ratios(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of steps ``[ranks, n]`` with those around them, ``[ranks, n - 2]``."""
    around = (seconds[:, :-2] + seconds[:, 2:]) / 2
    ratios: NDArray[np.float64] = 1 + (seconds[:, 1:-1] - around) / around.max(axis=0)
    return ratios


def _largest(of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    if len(of_ranks) == 1:
        return of_ranks[0]
    rank = max(range(len(of_ranks)), key=lambda rank: of_ranks[rank]["ratio"])
    intervals = [found["confidence_95"] for found in of_ranks]
    together = None if None in intervals else [max(limits) for limits in zip(*intervals, strict=True)]
    return {**of_ranks[rank], "confidence_95": together, "rank": rank}


def _without_ratio(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "ratio"}


def _of_ranks(measured: Sequence[Measured], what: str) -> dict[str, dict[str, list[int]]]:
    """By variant and kind of step, one number a rank."""
    return {
        name: {kind: [getattr(each.counts[name][kind], what) for each in measured] for kind in kinds}
        for name, kinds in measured[0].counts.items()
    }
