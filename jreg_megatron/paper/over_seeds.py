"""A figure over training seeds: its mean and interval, the paper's test, and the power of n seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
INTERVAL = f"{CONFIDENCE:.0%} t interval over seeds"
"""Of an :class:`Estimate`."""
LEVEL = 0.05
"""The level of the one-sided test in :func:`power`."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its interval."""

    mean: float
    low: float | None
    """Lower end of the 95% t interval; None for one seed."""
    high: float | None
    n: int
    """Number of seeds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """The mean of one value for each seed, and its 95% t interval; None for no value."""
        n = len(values)
        if n == 0:
            return None
        mean = statistics.fmean(values)
        if n == 1:
            return cls(mean, None, None, n)
        from scipy.special import stdtrit  # not stats: it takes seconds

        half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)


def p_one_sided(differences: Sequence[float]) -> float | None:
    """The paper's test: a one-sided one-sample t-test that the mean of ``differences`` is above 0.

    Each seed gives one difference, JREG minus its baseline. Returns p in [0, 1]; None for fewer than two
    seeds, or if all differences are the same.
    """
    from scipy.special import stdtr

    n = len(differences)
    if n < 2 or len(set(differences)) == 1:
        return None
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(n))
    return float(stdtr(n - 1, -t))


def p_two_sided(differences: Sequence[float]) -> float | None:
    """The same t-test for both sides; returns and None as for :func:`p_one_sided`."""
    p = p_one_sided(differences)
    return None if p is None else 2 * min(p, 1 - p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for several tests, in the given order. None is kept, and counts as a test."""
    adjusted, most = list(p_values), 0.0
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    for rank, (p, place) in enumerate(known):
        most = max(most, min(1.0, p * (len(p_values) - rank)))
        adjusted[place] = most
    return adjusted


def power(n: int, difference: float, sd: float) -> float:
    """How often the test finds a true ``difference`` at :data:`LEVEL`, in [0, 1]; by the non-central t.

    ``n`` is the number of seeds, at least 2; ``sd`` the differences' standard deviation over seeds, above 0.
    """
    from scipy.special import nctdtr, stdtrit

    return 1 - float(nctdtr(n - 1, difference / sd * math.sqrt(n), stdtrit(n - 1, 1 - LEVEL)))


def seeds_needed(difference: float, sd: float, wanted: float = 0.8) -> int:
    """The fewest seeds with a :func:`power` of at least ``wanted``, for a difference above 0."""
    n = 2
    while power(n, difference, sd) < wanted:
        n += 1
    return n
