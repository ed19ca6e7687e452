"""Rounds in which everything runs in turn, and what their times say where other work disturbs the machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 10
"""Steps from which on an interval is given: a bootstrap of fewer makes it too narrow."""

_RESAMPLES = 2000


def rounds[T](
    names: Sequence[T], most: int, fewest: int = 1, is_over: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, T]]:
    """The number of each round, from 0, with each name in an order drawn anew, the same on every rank.

    Args:
        names: what runs once in a round.
        most: rounds, at most.
        fewest: rounds, before whose end ``is_over`` is not asked.
        is_over: asked before each further round.
    """
    generator, order = random.Random(0), list(names)
    for number in range(max(most, fewest)):
        if number >= fewest and is_over():
            return
        generator.shuffle(order)
        for name in order:
            yield number, name


def times(seconds: Sequence[float]) -> dict[str, Any]:
    """``seconds``, the median, and its ``quartiles``."""
    low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"seconds": middle, "quartiles": [low, high]}


def median_ratio(
    ratios: NDArray[np.float64], kinds: NDArray[np.str_], shares: Mapping[str, float]
) -> dict[str, Any]:
    """The ratio of an average step, with its 95% confidence interval.

    Steps that measure, or log, are of kinds of their own: the medians of all kinds are averaged, weighted by
    how many there are in training. A kind that has no ratio does not count.

    Args:
        ratios: of each step to the unmodified ones around it.
        kinds: of each.
        shares: what share of training's steps each kind has.

    Returns:
        ``ratio``; ``confidence_95``, from a bootstrap within each kind, or None for less than
        :data:`FEWEST` ratios; ``quartiles`` of the ratios; their number ``steps``.
    """
    of_kinds = [(share, ratios[kinds == name]) for name, share in shares.items() if name in kinds]
    whole = sum(share for share, _ in of_kinds)
    residuals = np.concatenate([kind - np.median(kind) for _, kind in of_kinds])
    generator = np.random.default_rng(0)
    resampled = np.zeros(_RESAMPLES)
    ratio = 0.0
    for share, kind in of_kinds:
        middle = float(np.median(kind))
        # A kind of few steps does not show how it scatters; then it is taken to scatter as all do.
        scatter = kind - middle if len(kind) >= FEWEST else residuals
        draws = generator.choice(scatter, size=(_RESAMPLES, len(kind)))
        resampled += share / whole * (middle + np.median(draws, axis=1))
        ratio += share / whole * middle
    interval = np.percentile(resampled, [2.5, 97.5]).tolist()
    return {
        "ratio": ratio,
        "confidence_95": interval if len(ratios) >= FEWEST else None,
        "quartiles": np.percentile(ratios, [25, 75]).tolist(),
        "steps": len(ratios),
    }
