"""Ten steps of Megatron's own training loop, at many layouts, equal those of one process in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ITERATIONS
from harness import MEGATRON_FSDP, read_scalars, run_ranks
from reference_training import train

COEFF, ALPHA = 0.5, 0.5
FIRST = "iter_0000001"
LAST, BEFORE_LAST = "jreg/displacement_layer_04", "jreg/displacement_layer_03"
VALUES = ("lm loss", "jreg loss", "grad-norm", BEFORE_LAST, LAST)

TENSOR, PIPELINE = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
EVERY_LAYER = (
    "--recompute-granularity",
    "full",
    "--recompute-method",
    "uniform",
    "--recompute-num-layers",
    1,
)
LAYOUTS = {
    "TP1 x PP1": (1, ()),
    "TP2 x PP2": (4, (*TENSOR, *PIPELINE)),
    "TP2 x PP2 with sequence parallelism": (4, (*TENSOR, *PIPELINE, "--sequence-parallel")),
    "CP2": (2, ("--context-parallel-size", 2)),
    "DP2 with the distributed optimizer": (2, ("--use-distributed-optimizer",)),
    "DP2 with FSDP2": (2, ("--use-torch-fsdp2",)),
    "DP2 with Megatron-FSDP": (2, MEGATRON_FSDP),
    "PP2 with two virtual stages each": (2, (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", 1)),
    "PP2 with full recompute": (2, (*PIPELINE, *EVERY_LAYER)),
    "TP2 with per-token loss": (2, (*TENSOR, "--calculate-per-token-loss")),
}

Log = dict[str, list[float]]


@pytest.fixture(scope="module")
def reference(initial_weights: Path, toy_steps: Any) -> Log:
    return train(initial_weights / FIRST, toy_steps, coeff=COEFF, alpha=ALPHA)


def megatron_log(
    toy_arguments: list[str], initial_weights: Path, folder: Path, world_size: int, *more: object
) -> Log:
    start: tuple[object, ...] = ("--load", initial_weights, "--finetune", "--no-load-optim", "--no-load-rng")
    if "--use-megatron-fsdp" in more:
        start = ()  # it reads no such checkpoint; the seed gives the same weights
    run_ranks(
        [
            *(*toy_arguments, "--train-iters", ITERATIONS, *start, "--tensorboard-dir", folder),
            *("--jreg-coeff", COEFF, "--jreg-alpha", ALPHA, "--jreg-log-per-layer", *more),
        ],
        world_size,
    )
    return read_scalars(folder)


def assert_same(log: Log, expected: Log) -> None:
    for name in VALUES:
        assert len(log[name]) == ITERATIONS
        np.testing.assert_allclose(log[name], expected[name], rtol=1e-5, err_msg=name)
    # In hundredths of displacement, and the difference of two of them.
    error = np.abs(np.subtract(log["jump rate"], expected["jump rate"]))
    assert (error <= 100 * 1e-5 * np.add(expected[LAST], expected[BEFORE_LAST])).all(), "jump rate"


def test_the_toy_model_has_a_jump_and_a_penalty_worth_comparing(
    reference: Log, initial_weights: Path, toy_steps: Any
) -> None:
    # Guards the tests below: equal zeros would prove nothing, nor would a penalty lost in the digits.
    assert np.median(reference["jump rate"]) > 0.1
    assert min(reference["jreg loss"]) > 0.005
    unregularized = train(initial_weights / FIRST, toy_steps, coeff=0, alpha=ALPHA)
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
    expected = train(initial_weights / FIRST, toy_steps, coeff=COEFF, alpha=ALPHA, post_norm=True)
    flags = (*TENSOR, "--sequence-parallel", "--jreg-final-state", "post_norm", *EVERY_LAYER)
    assert_same(megatron_log(toy_arguments, initial_weights, tmp_path, 2, *flags), expected)


@pytest.mark.parametrize("per_token", [False, True], ids=["averaged loss", "per-token loss"])
def test_ten_steps_on_unmasked_tokens_only_equal_the_reference_on_middle_pipeline_stages_too(
    per_token: bool, toy_arguments: list[str], initial_weights: Path, toy_masked_steps: Any, tmp_path: Path
) -> None:
    # Parameters that only masked tokens move have gradients near 0, whose rounding Adam would blow up.
    how = {"per_token": per_token, "only_unmasked": True, "adam_eps": 1e-6}
    expected = train(initial_weights / FIRST, toy_masked_steps, coeff=COEFF, alpha=ALPHA, **how)
    flags = ["--pipeline-model-parallel-size", 4, "--eod-mask-loss", "--jreg-tokens", "unmasked"]
    flags += ["--adam-eps", 1e-6]
    flags += ["--calculate-per-token-loss"] * per_token
    assert_same(megatron_log(toy_arguments, initial_weights, tmp_path, 4, *flags), expected)
