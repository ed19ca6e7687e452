"""Ratios of step times, robust where other work disturbs the machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 2000


def median_ratio(ratios: NDArray[np.float64], is_measuring: NDArray[np.bool_]) -> dict[str, Any]:
    """The ratio of an average step, with its 95% confidence interval.

    A step that measures and one that does not are two kinds: the medians of both kinds are averaged, weighted
    by how many there are.

    Args:
        ratios: of each step to the unmodified ones around it.
        is_measuring: which kind it is.

    Returns:
        ``ratio``; ``confidence_95``, from a bootstrap within each kind; ``quartiles`` of the ratios; their
        number ``steps``.
    """
    kinds = [kind for kind in (ratios[is_measuring], ratios[~is_measuring]) if len(kind)]
    shares = [len(kind) / len(ratios) for kind in kinds]
    generator = np.random.default_rng(0)
    resampled = np.zeros(_RESAMPLES)
    ratio = 0.0
    for share, kind in zip(shares, kinds, strict=True):
        draws = generator.integers(len(kind), size=(_RESAMPLES, len(kind)))
        resampled += share * np.median(kind[draws], axis=1)
        ratio += share * float(np.median(kind))
    return {
        "ratio": ratio,
        "confidence_95": np.percentile(resampled, [2.5, 97.5]).tolist(),
        "quartiles": np.percentile(ratios, [25, 75]).tolist(),
        "steps": len(ratios),
    }
