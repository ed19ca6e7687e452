"""The example of a custom loop trains, regularizes, and is the same with tensor parallelism."""

from __future__ import annotations

import re

import numpy as np
import pytest
from harness import run_ranks

EXAMPLE = "jreg_megatron.examples.custom_loop:main"


def steps(*argv: object, world_size: int = 1) -> np.ndarray:
    """Cross-entropy, jreg loss and jump rate of each step, ``[steps, 3]``."""
    output = run_ranks(argv, world_size, entry=EXAMPLE).output[-1]
    found = re.findall(r"lm loss (\S+) \| jreg loss (\S+) \| jump rate (\S+)", output)
    return np.array(found, dtype=float)


@pytest.fixture(scope="module")
def baseline() -> np.ndarray:
    return steps("--steps", 8)


def test_the_example_learns(baseline: np.ndarray) -> None:
    assert len(baseline) == 8
    assert baseline[-1, 0] < baseline[0, 0] - 0.3


def test_the_example_regularizes(baseline: np.ndarray) -> None:
    regularized = steps("--steps", 8, "--jreg-coeff", 5)
    np.testing.assert_allclose(regularized[0], baseline[0])
    assert regularized[-1, 1] < 0.7 * baseline[-1, 1]


def test_the_example_gives_the_same_with_tensor_parallelism(baseline: np.ndarray) -> None:
    cut = steps("--steps", 8, "--tensor", 2, world_size=2)
    np.testing.assert_allclose(cut, baseline, rtol=2e-3, atol=2e-4)


def test_a_mistake_is_reported_before_anything_is_started() -> None:
    run = run_ranks(["--jreg-coeff", -1], entry=EXAMPLE, check=False)
    assert run.status == [2] and "Traceback" not in run.output[0]
    assert "--jreg-coeff (JRegConfig.coeff) is -1.0; it must be" in run.output[0]
