"""Ratios of step times, robust where other work disturbs the machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 10
"""Steps from which on an interval is given: a bootstrap of fewer makes it too narrow."""

_RESAMPLES = 2000


def median_ratio(
    ratios: NDArray[np.float64], is_measuring: NDArray[np.bool_], measuring_share: float, ranks: int = 1
) -> dict[str, Any]:
    """The ratio of an average step, with its 95% confidence interval.

    A step that measures and one that does not are two kinds: the medians of both kinds are averaged, weighted
    by how many there are in training.

    Args:
        ratios: of each step to the unmodified ones around it.
        is_measuring: which kind it is.
        measuring_share: of training's steps, in 0..1; for ratios of both kinds.
        ranks: whose intervals are to hold the truth together, each then a wider one than for itself.

    Returns:
        ``ratio``; ``confidence_95``, from a bootstrap within each kind, or None for less than
        :data:`FEWEST` ratios; ``quartiles`` of the ratios; their number ``steps``.
    """
    kinds = [
        (share, kind)
        for share, kind in (
            (measuring_share, ratios[is_measuring]),
            (1 - measuring_share, ratios[~is_measuring]),
        )
        if len(kind)
    ]
    if len(kinds) == 1:
        kinds = [(1.0, kinds[0][1])]
    residuals = np.concatenate([kind - np.median(kind) for _, kind in kinds])
    generator = np.random.default_rng(0)
    resampled = np.zeros(_RESAMPLES)
    ratio = 0.0
    for share, kind in kinds:
        middle = float(np.median(kind))
        # A kind of few steps does not show how it scatters; then it is taken to scatter as all do.
        scatter = kind - middle if len(kind) >= FEWEST else residuals
        draws = generator.choice(scatter, size=(_RESAMPLES, len(kind)))
        resampled += share * (middle + np.median(draws, axis=1))
        ratio += share * middle
    tail = 2.5 / ranks
    interval = np.percentile(resampled, [tail, 100 - tail]).tolist()
    return {
        "ratio": ratio,
        "confidence_95": interval if len(ratios) >= FEWEST else None,
        "quartiles": np.percentile(ratios, [25, 75]).tolist(),
        "steps": len(ratios),
    }
