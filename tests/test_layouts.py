"""The same numbers at every layout, and the same as an independent single-process reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ITERATIONS
from harness import read_scalars, run_ranks
from reference_llama import ReferenceLlama, load_weights, train

COEFF, ALPHA = 0.5, 0.5
FIRST = "iter_0000001"
VALUES = ("lm loss", "jreg loss", "jump rate", "grad-norm")

LAYOUTS = {
    "TP1 x PP1": (1, ()),
    "TP2 x PP1": (2, ("--tensor-model-parallel-size", 2)),
    "TP1 x PP2": (2, ("--pipeline-model-parallel-size", 2)),
    "TP2 x PP2": (4, ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)),
    "TP2 x PP2 with sequence parallelism": (
        4,
        ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel"),
    ),
    "DP2 with the distributed optimizer": (2, ("--use-distributed-optimizer",)),
    "PP2 with two virtual stages each": (
        2,
        ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
    ),
    "PP2 with full recompute": (
        2,
        (
            *("--pipeline-model-parallel-size", 2, "--recompute-granularity", "full"),
            *("--recompute-method", "uniform", "--recompute-num-layers", 2),
        ),
    ),
    "TP2 with per-token loss": (2, ("--tensor-model-parallel-size", 2, "--calculate-per-token-loss")),
}

Log = dict[str, list[float]]


@pytest.fixture(scope="module")
def reference(initial_weights: Path, toy_steps: Any) -> Log:
    weights = load_weights(initial_weights / FIRST)
    return train(ReferenceLlama(weights), toy_steps, coeff=COEFF, alpha=ALPHA)


def megatron_log(
    toy_arguments: list[str], initial_weights: Path, folder: Path, world_size: int, *more: object
) -> Log:
    start = ("--load", initial_weights, "--finetune", "--no-load-optim", "--no-load-rng")
    run_ranks(
        [
            *(*toy_arguments, "--train-iters", ITERATIONS, *start, "--tensorboard-dir", folder),
            *("--jreg-coeff", COEFF, "--jreg-alpha", ALPHA, *more),
        ],
        world_size,
    )
    return read_scalars(folder)


def assert_same(log: Log, expected: Log) -> None:
    for name in VALUES:
        assert len(log[name]) == ITERATIONS
        np.testing.assert_allclose(log[name], expected[name], rtol=1e-5, err_msg=name)


def test_the_toy_model_has_a_jump_and_a_penalty_worth_comparing(
    reference: Log, initial_weights: Path, toy_steps: Any
) -> None:
    # Guards the tests below: equal zeros would prove nothing, nor would a penalty lost in the digits.
    assert np.median(reference["jump rate"]) > 0.1
    assert min(reference["jreg loss"]) > 0.005
    unregularized = train(
        ReferenceLlama(load_weights(initial_weights / FIRST)), toy_steps, coeff=0, alpha=ALPHA
    )
    for name in VALUES:
        difference = np.subtract(unregularized[name], reference[name])
        assert np.max(np.abs(difference)) > 2e-4 * np.median(reference[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_equal_the_independent_reference_at_layout(
    layout: str, toy_arguments: list[str], initial_weights: Path, reference: Log, tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    assert_same(megatron_log(toy_arguments, initial_weights, tmp_path, world_size, *flags), reference)


def test_ten_steps_with_the_last_state_after_the_final_norm_equal_the_reference(
    toy_arguments: list[str], initial_weights: Path, toy_steps: Any, tmp_path: Path
) -> None:
    model = ReferenceLlama(load_weights(initial_weights / FIRST))
    expected = train(model, toy_steps, coeff=COEFF, alpha=ALPHA, post_norm=True)
    flags = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--jreg-final-state", "post_norm")
    assert_same(megatron_log(toy_arguments, initial_weights, tmp_path, 2, *flags), expected)
