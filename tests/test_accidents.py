"""Accidents: the behaviour of a run when a rank dies, a number breaks, or it is started in another way."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import read_scalars, run_ranks

PIPELINE = ("--pipeline-model-parallel-size", 2)
TENSOR = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
ZERO = ("--use-distributed-optimizer",)
JREG = ("--jreg-coeff", 0.5, "--jreg-alpha", 1, "--jreg-log-per-layer")
TRAINING = (
    *("lm loss", "grad-norm", "jreg loss", "jump rate"),
    *(f"jreg/displacement_layer_{layer:02d}" for layer in (1, 2, 3, 4)),
)

BROKEN = pytest.mark.parametrize(
    ("value", "layout"),
    [
        pytest.param("nan", PIPELINE, id="nan-PP2"),
        pytest.param("inf", (), id="inf-DP2"),
        pytest.param("nan", (), id="nan-DP2", marks=pytest.mark.slow),
        pytest.param("inf", PIPELINE, id="inf-PP2", marks=pytest.mark.slow),
    ],
)
"""A token that is not a number, and the layout that it appears at."""

Log = dict[str, list[float]]


def train(folder: Path, *argv: object, ranks: int = 2) -> Log:
    run_ranks([*argv, "--tensorboard-dir", folder], ranks)
    return read_scalars(folder)


def start_from(weights: Path) -> tuple[object, ...]:
    return ("--load", weights, "--finetune", "--no-load-optim", "--no-load-rng")


def checkpoints(folder: Path, interval: int) -> tuple[object, ...]:
    return ("--save", folder, "--load", folder, "--save-interval", interval)


def assert_equals(log: Log, whole: Log, first: int, last: int) -> None:
    for name in TRAINING:
        assert len(whole[name]) >= last, name
        assert log[name] == whole[name][first - 1 : last], name


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(PIPELINE, id="PP2"),
        pytest.param(TENSOR, id="TP2", marks=pytest.mark.slow),
        pytest.param(ZERO, id="DP2", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_is_killed_the_other_ends_soon_with_an_error_that_names_the_lost_peer(
    layout: tuple[object, ...], toy_arguments: list[str], tmp_path: Path
) -> None:
    # After a checkpoint, whose helper process must not hide that the rank has died.
    argv = [1, 2, *toy_arguments, *layout, "--train-iters", 1000, *checkpoints(tmp_path, 1)]
    run = run_ranks(argv, 2, entry="accident:killed", check=False, timeout=180)
    assert run.status == [1, -9]
    assert re.search(r"Error: .*(Connection (reset|closed) by peer|Broken pipe)", run.output[0])


def test_the_cpu_launcher_names_the_killed_rank_and_a_restart_is_bit_identical_to_a_run_without_a_kill(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *ZERO, *JREG, "--train-iters", 10]
    whole = train(tmp_path / "whole", *argv)
    saving = [*argv, *checkpoints(tmp_path / "saved", 4)]
    accident = (Path(__file__).parent / "accident.py", "killed", 1, 7)
    command = list(map(str, (sys.executable, "-m", "jreg_megatron.cpu", "--nproc", 2, *accident, *saving)))
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 128 + 9, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("jreg_megatron: error: ")]
    (line,) = lines
    assert "rank 1 " in line and "signal 9 (Killed)" in line
    assert_equals(train(tmp_path / "restarted", *saving), whole, 5, 10)


def test_a_run_killed_while_saving_resumes_bit_identically_from_the_previous_checkpoint(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *PIPELINE, *JREG, "--train-iters", 8]
    whole = train(tmp_path / "whole", *argv)
    saved = tmp_path / "saved"
    saving = [*argv, *checkpoints(saved, 3)]
    run = run_ranks([6, *saving], 2, entry="accident:killed_while_saving", check=False, timeout=180)
    assert run.status == [-9, -9]
    assert [file.stat().st_size > 0 for file in (saved / "iter_0000006").glob("*.distcp")]
    assert_equals(train(tmp_path / "restarted", *saving, "--exit-interval", 6), whole, 4, 6)
    # The half-written checkpoint was written over by a whole one.
    assert_equals(train(tmp_path / "again", *saving), whole, 7, 8)


RESHARDABLE = (*ZERO, "--dist-ckpt-optim-fully-reshardable")
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "TP2 with the distributed optimizer": (2, (*TENSOR, *RESHARDABLE)),
    "DP2 with the distributed optimizer": (2, RESHARDABLE),
    "TP2 x PP2": (4, (*TENSOR, *PIPELINE)),
    "TP1 x PP1": (1, ()),
}


@pytest.fixture(scope="module")
def whole(toy_arguments: list[str], initial_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    argv = [*toy_arguments, *JREG, "--train-iters", 10, *start_from(initial_weights)]
    return train(tmp_path_factory.mktemp("whole"), *argv, ranks=1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("TP2 x PP2", "TP1 x PP1"),
        pytest.param("TP1 x PP1", "TP2 x PP2", marks=pytest.mark.slow),
        ("TP2 with the distributed optimizer", "DP2 with the distributed optimizer"),
    ],
    ids=str,
)
def test_a_run_resumes_at_another_layout_with_the_same_numbers(
    before: str, after: str, toy_arguments: list[str], initial_weights: Path, whole: Log, tmp_path: Path
) -> None:
    argv = [*toy_arguments, *JREG, "--train-iters", 10, "--save", tmp_path / "saved", "--save-interval", 5]
    ranks, flags = LAYOUTS[before]
    run_ranks([*argv, *flags, *start_from(initial_weights), "--exit-interval", 5], ranks)
    ranks, flags = LAYOUTS[after]
    resumed = train(tmp_path / "resumed", *argv, *flags, "--load", tmp_path / "saved", ranks=ranks)
    for name in TRAINING:
        assert len(resumed[name]) == 5, name
        # The jump rate is a difference of two displacements of about 1 hundredth, in hundredths.
        atol = 1e-5 if name == "jump rate" else 0
        np.testing.assert_allclose(resumed[name], whole[name][5:], rtol=1e-5, atol=atol, err_msg=name)


@BROKEN
def test_one_broken_token_stops_every_rank_with_megatrons_message(
    value: str, layout: tuple[object, ...], toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *layout, *JREG, "--train-iters", 5, *checkpoints(tmp_path, 100)]
    run = run_ranks([1, 3, 3, value, *argv], 2, entry="accident:not_finite", check=False, timeout=180)
    assert run.status == [16, 16]  # Megatron's status for "resume, to see whether it was the hardware"
    assert "(message='found NaN in the loss')" in run.output[1]
    assert "Saving a checkpoint and exiting now" in run.output[0]
    assert not any("Traceback" in output for output in run.output)


@BROKEN
def test_an_interval_with_a_broken_token_says_so_and_the_next_one_is_clean(
    value: str, layout: tuple[object, ...], toy_arguments: list[str], tmp_path: Path
) -> None:
    # With fp16 the step is left out, so that nothing of it stays.
    argv = [*toy_arguments, *layout, *JREG, "--fp16", "--initial-loss-scale", 1024, "--train-iters", 4]
    clean = train(tmp_path / "clean", *argv)
    argv = [1, 3, 3, value, *argv, "--tensorboard-dir", tmp_path / "broken"]
    run = run_ranks(argv, 2, entry="accident:not_finite")
    broken = read_scalars(tmp_path / "broken")
    for name in TRAINING[2:]:
        is_above = name not in ("jreg/displacement_layer_01", "jreg/displacement_layer_02")
        assert broken[name][:2] == clean[name][:2], name
        assert math.isnan(broken[name][2]) if is_above else broken[name][2] == clean[name][2], name
        assert math.isfinite(broken[name][3]), name
    lines = [line for line in run.output[-1].splitlines() if "JREG at iteration" in line]
    assert lines == [" JREG at iteration 3 | displacement not finite in layers: 3 4 | "]


def test_without_megatrons_check_a_run_with_a_broken_token_logs_nan_and_does_not_hang(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *JREG, "--no-check-for-nan-in-loss-and-grad", "--train-iters", 5]
    argv = [1, 3, 3, "nan", *argv, "--tensorboard-dir", tmp_path]
    run_ranks(argv, 2, entry="accident:not_finite", timeout=180)
    log = read_scalars(tmp_path)
    # The optimizer has taken the NaN into the weights.
    for name in ("lm loss", "jreg loss", "jump rate"):
        assert [math.isnan(value) for value in log[name]] == [False, False, True, True, True], name


def test_evaluation_in_mid_training_changes_no_number_of_the_training(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *PIPELINE, *JREG, "--train-iters", 6, "--hidden-dropout", 0.1]
    argv += ["--eval-interval", 2, "--eval-iters"]
    without = train(tmp_path / "without", *argv, 0)
    evaluated = train(tmp_path / "with", *argv, 1)
    assert len(evaluated["jreg loss validation"]) == 4  # after iterations 2, 4, 6 and at the end
    assert "jreg loss validation" not in without
    assert_equals(evaluated, without, 1, 6)


def test_skip_train_reports_what_the_evaluation_after_training_reported(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [
        *toy_arguments,
        *PIPELINE,
        *JREG,
        *checkpoints(tmp_path, 2),
        "--train-iters",
        2,
        "--eval-iters",
        1,
    ]
    outputs = [run_ranks([*argv, *more], 2).output[-1] for more in ((), ("--skip-train",))]
    trained, evaluated = (re.findall(r"^ validation .*", output, re.MULTILINE) for output in outputs)
    assert trained == evaluated
    assert re.search(r"jreg loss value: \d\.\d+E.* jump rate value: \d", evaluated[1])


def test_a_model_of_one_layer_trains_and_evaluates(toy_arguments: list[str], tmp_path: Path) -> None:
    argv = [*toy_arguments, *JREG, "--num-layers", 1, "--train-iters", 2, "--eval-iters", 1]
    log = train(tmp_path, *argv, ranks=1)
    assert log["jreg loss"] == log["jreg/displacement_layer_01"]
    assert len(log["jreg loss"]) == 2
    assert all(math.isnan(value) for value in log["jump rate"])  # it compares two layers


@pytest.mark.slow
def test_a_coefficient_schedule_that_crosses_a_resume_is_bit_identical_to_a_run_without_one(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    # The resume falls into the warm-up; the stop comes after it.
    schedule = ("--jreg-start-iteration", 2, "--jreg-warmup-iterations", 6, "--jreg-stop-iteration", 9)
    argv = [*toy_arguments, *TENSOR, *JREG, *schedule, "--train-iters", 10]
    whole = train(tmp_path / "whole", *argv)
    saving = [*argv, *checkpoints(tmp_path / "saved", 5)]
    run_ranks([*saving, "--exit-interval", 5], 2)
    assert_equals(train(tmp_path / "resumed", *saving), whole, 6, 10)


def test_iterations_that_fp16_skips_are_measured_like_others_and_training_continues(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *PIPELINE, "--fp16", "--train-iters", 20]
    overflowing = [*argv, *JREG, "--initial-loss-scale", 2**32]
    log = train(tmp_path / "log", *overflowing)
    frozen = train(tmp_path / "frozen", *argv, *JREG[-1:], "--loss-scale", 1, "--lr", 0, "--min-lr", 0)
    skipped = 20 - len(log["grad-norm"])
    assert 8 < skipped < 16
    for name in TRAINING[3:]:
        assert log[name][: skipped + 1] == frozen[name][: skipped + 1], name
        assert log[name][skipped + 1 :] != frozen[name][skipped + 1 :], name
        assert np.isfinite(log[name]).all(), name
    # An interval of which some iterations were skipped: the mean of all, also on the console.
    run = run_ranks([*overflowing, "--log-interval", 4, "--tensorboard-dir", tmp_path / "mean"], 2)
    means = np.reshape(log["jreg loss"], (5, 4)).mean(axis=1)
    assert read_scalars(tmp_path / "mean")["jreg loss"] == pytest.approx(means, rel=1e-6)
    shown = re.findall(r"iteration +(?:4|8|12|16|20)/.* jreg loss: (\S+) ", run.output[-1])
    assert [float(value) for value in shown] == pytest.approx(means, rel=1e-6)
