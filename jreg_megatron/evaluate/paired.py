"""Intervals and tests over samples, with scipy: for one model, and for the difference of two models.

A figure is a sum of amounts divided by a sum of weights. With weights of 1 it is a mean. With numbers of
tokens as weights it is nats per token.

Intervals are percentile bootstraps over whole samples. A share of one model, such as an accuracy, has
Wilson's interval, because a bootstrap interval has no width at 0 and 1.

Tests are two-sided. Two shares have McNemar's exact test: a binomial test on the samples that only one model
gets right. Other figures have a permutation test that swaps the models' results per sample. It assumes no
distribution and tests the reported figure; a t-test and Wilcoxon's test do not. :func:`adjusted` corrects for
several tests by Benjamini and Hochberg's bound on the false discovery rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
FEWEST = 6
"""Fewer samples have no interval: a bootstrap would be too narrow, and no test could reach 0.05."""

_RESAMPLES = 9999
_SEED = 20
_BATCH = 1 << 22  # numbers held at a time


class Difference(NamedTuple):
    """The second model minus the first, on the same samples."""

    difference: float
    interval: Interval | None  # None for fewer than FEWEST samples, like the p-value
    p_value: float | None
    samples: int


def interval(amounts: Floats, weights: Floats) -> Interval | None:
    """The interval of ``sum(amounts) / sum(weights)``, both ``[n]``; None for fewer than :data:`FEWEST`
    samples."""
    from scipy import stats

    if len(amounts) < FEWEST:
        return None
    if is_share(amounts, weights):
        found = stats.binomtest(int(amounts.sum()), len(amounts)).proportion_ci(CONFIDENCE, "wilson")
        return float(found.low), float(found.high)
    return _bootstrap([(amounts, weights)])


def compare(a: Floats, b: Floats, weights: Floats) -> Difference:
    """The difference ``b`` minus ``a``: amounts ``[n]`` of the same samples with the same weights ``[n]``."""
    from scipy import stats

    value = float((b - a).sum() / weights.sum())
    if len(a) < FEWEST:
        return Difference(value, None, None, len(a))
    if is_share(a, weights) and is_share(b, weights):
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        p_value = float(stats.binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    else:
        p_value = _permutation(a, b)
    return Difference(value, _bootstrap([(b - a, weights)]), p_value, len(a))


def compare_mean(pairs: Sequence[tuple[Floats, Floats]]) -> Difference:
    """The mean over tasks of the differences of shares, from each task's ``a`` and ``b`` ``[n]``.

    Samples are drawn and swapped within each task, because only the samples are random, not the tasks.
    """
    value = float(np.mean([(b - a).mean() for a, b in pairs]))
    size = sum(len(a) for a, _ in pairs)
    if min(len(a) for a, _ in pairs) < FEWEST:
        return Difference(value, None, None, size)
    found = _bootstrap([(b - a, np.ones(len(a))) for a, b in pairs])
    # Each sample is divided by its task's size. Then a plain sum has the same weights as the mean of means.
    first, second = (np.concatenate([pair[side] / len(pair[side]) for pair in pairs]) for side in (0, 1))
    return Difference(value, found, _permutation(first, second), size)


def adjusted(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Differences for JSON, with p-values that are adjusted for several tests: of those below x, at most
    about a share x are false discoveries. A missing p-value stays None."""
    from scipy import stats

    made = [found.p_value for found in differences if found.p_value is not None]
    raised = iter(stats.false_discovery_control(made).tolist() if made else [])
    return [
        found._asdict() | {"p_adjusted": None if found.p_value is None else next(raised)}
        for found in differences
    ]


def is_share(amounts: Floats, weights: Floats) -> bool:
    """Whether every sample is right or wrong."""
    return bool(np.isin(amounts, (0.0, 1.0)).all() and (weights == 1).all())


def _bootstrap(groups: list[tuple[Floats, Floats]]) -> Interval:
    """The interval of the mean over groups of ``sum(amounts) / sum(weights)``. It draws within groups."""
    from scipy import stats

    # scipy draws several arrays independently. Indices keep amounts and weights together.
    def statistic(*drawn: NDArray[np.int64], axis: int = -1) -> Any:
        drawn_of = zip(drawn, groups, strict=True)
        return np.mean([a[index].sum(axis) / w[index].sum(axis) for index, (a, w) in drawn_of], axis=0)

    samples = [np.arange(len(amounts)) for amounts, _ in groups]
    how = _how(sum(map(len, samples))) | {"confidence_level": CONFIDENCE, "method": "percentile"}
    found = stats.bootstrap(samples, statistic, **how).confidence_interval
    return float(found.low), float(found.high)


def _permutation(a: Floats, b: Floats) -> float:
    from scipy import stats

    def statistic(first: Floats, second: Floats, axis: int) -> Any:
        return (second - first).sum(axis)

    found = stats.permutation_test((a, b), statistic, permutation_type="samples", **_how(len(a)))
    return float(found.pvalue)


def _how(samples: int) -> dict[str, Any]:
    """scipy's settings for resampling."""
    how = {"n_resamples": _RESAMPLES, "vectorized": True, "rng": np.random.default_rng(_SEED)}
    return how | {"batch": max(1, _BATCH // samples)}
