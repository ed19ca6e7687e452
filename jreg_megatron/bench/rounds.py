"""Rounds in which each way runs once, and statistics of times that other work on the machine disturbs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 10
"""With fewer steps there is no interval: a bootstrap would make it too narrow."""

_RESAMPLES = 2000


def rounds[T](
    names: Sequence[T], most: int, fewest: int = 1, is_over: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, T]]:
    """Yield each round's number, from 0, with each name, in a new random order that all ranks share.

    Args:
        names: what runs once in a round.
        most: rounds, at most.
        fewest: rounds that run in any case.
        is_over: called before each further round.
    """
    generator, order = random.Random(0), list(names)
    for number in range(max(most, fewest)):
        if number >= fewest and is_over():
            return
        generator.shuffle(order)
        for name in order:
            yield number, name


def times(seconds: Sequence[float]) -> dict[str, Any]:
    """The median as ``seconds``, and the ``quartiles``."""
    low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return {"seconds": middle, "quartiles": [low, high]}


def median_ratio(
    ratios: NDArray[np.float64], kinds: NDArray[np.str_], shares: Mapping[str, float]
) -> dict[str, Any]:
    """The ratio of an average step, with its 95% confidence interval.

    Each kind of step has its own median. The medians are averaged with ``shares`` as weights. A kind without
    a ratio does not count.

    Args:
        ratios: of each step to the unmodified ones around it.
        kinds: the kind of each step.
        shares: each kind's share of the steps of a training.

    Returns:
        ``ratio``; ``confidence_95``, from a bootstrap within each kind, or None for fewer than
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
        # Few steps do not show how much their kind scatters. Then the scatter of all steps is used.
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
