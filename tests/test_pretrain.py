"""The promises of ``jreg_megatron.pretrain``: baseline, resume, log, and errors."""

from __future__ import annotations

import functools
import os
import re
import runpy
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from harness import MEGATRON_FSDP, read_scalars, run_ranks

from jreg_megatron import UserError, pretrain
from jreg_megatron.mcore import installed
from jreg_megatron.runtime.errors import megatrons_refusals
from jreg_megatron.runtime.fork import be_alone_unless_started

SCRIPT = Path(__file__).with_name("unmodified_pretrain.py")
NAMES = ("jreg loss", "jump rate")
PIPELINE = ("--pipeline-model-parallel-size", 2)
TENSOR = ("--tensor-model-parallel-size", 2, "--sequence-parallel")


def test_with_coeff_zero_a_run_is_bit_identical_to_megatrons_own_loop(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *PIPELINE, "--train-iters", 5, "--eval-interval", 2, "--eval-iters", 1, "--bf16"]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "ours", "--jreg-coeff", 0], 2)
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "own"], 2, entry="unmodified_pretrain:main")
    ours, own = read_scalars(tmp_path / "ours"), read_scalars(tmp_path / "own")
    assert len(own["lm loss"]) == 5
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        assert ours[tag] == own[tag], tag
    # It did measure.
    assert len(ours["jreg loss"]) == 5
    assert len(ours["jump rate validation"]) == len(ours["lm loss validation"])


def test_with_coeff_zero_a_run_in_megatron_fsdp_is_bit_identical_to_megatrons_own_loop(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, "--train-iters", 4, "--eval-interval", 2, "--eval-iters", 1, "--bf16"]
    argv += MEGATRON_FSDP
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "ours", "--jreg-coeff", 0], 2)
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "own"], 2, entry="unmodified_pretrain:main")
    ours, own = read_scalars(tmp_path / "ours"), read_scalars(tmp_path / "own")
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        assert ours[tag] == own[tag], tag
    assert len(ours["jump rate"]) == 4, "it measures"


def test_stop_at_step_5_and_resume_is_bit_identical_to_a_run_that_did_not_stop(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [
        *(*toy_arguments, *TENSOR, "--use-distributed-optimizer", "--train-iters", 10),
        *("--jreg-coeff", 0.5, "--jreg-alpha", 1, "--jreg-start-iteration", 3, "--jreg-warmup-iterations", 5),
    ]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "whole"], 2)
    saving = [*argv, "--save", tmp_path / "saved", "--load", tmp_path / "saved", "--save-interval", 5]
    stopped = run_ranks([*saving, "--exit-interval", 5], 2)
    assert not said_by_jreg(stopped.output[1]), "Megatron's line of iteration 5 has said all"
    run_ranks([*saving, "--tensorboard-dir", tmp_path / "resumed"], 2)
    whole, resumed = read_scalars(tmp_path / "whole"), read_scalars(tmp_path / "resumed")
    for tag in ("lm loss", "jreg loss", "jump rate", "grad-norm"):
        assert len(whole[tag]) == 10, tag
        assert resumed[tag] == whole[tag][5:], tag


@pytest.mark.skipif(find_spec("emerging_optimizers") is None, reason="the package is not installed")
def test_muon_that_ranks_share_gives_what_each_gives_alone_and_resumes_bit_identically(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, "--bf16", "--optimizer", "muon", "--lr", 1e-2, "--train-iters", 4]
    argv += ["--jreg-coeff", 0.5, "--jreg-alpha", 0.5]
    shared = [*argv, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    saving = ["--ddp-bucket-size", 1000, "--save", tmp_path / "saved", "--save-interval", 2]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "alone"], 2)
    run_ranks([*shared, *saving, "--tensorboard-dir", tmp_path / "shared"], 2)
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    by_its_old_name = [*shared, "--optimizer", "dist_muon", "--load", tmp_path / "saved"]
    run_ranks([*by_its_old_name, "--tensorboard-dir", tmp_path / "resumed"], 2)
    alone, shared_values, resumed = (read_scalars(tmp_path / name) for name in ("alone", "shared", "resumed"))
    for tag in ("lm loss", "jreg loss", "jump rate", "grad-norm"):
        # Norms are summed in another order, and bf16 makes more of it at every step.
        assert shared_values[tag][:2] == pytest.approx(alone[tag][:2], rel=1e-5), tag
        assert resumed[tag] == shared_values[tag][2:] and len(resumed[tag]) == 2, tag


def test_console_and_tensorboard_carry_jreg_loss_jump_rate_and_every_layer(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [
        *(*toy_arguments, *PIPELINE, "--train-iters", 4, "--log-interval", 2, "--eval-interval", 4),
        *("--eval-iters", 1, "--tensorboard-dir", tmp_path, "--jreg-coeff", 0.1, "--jreg-log-per-layer"),
    ]
    output = run_ranks(argv, 2).output[-1]
    lines = [line for line in output.splitlines() if re.search(r"iteration +[24]/ +4 ", line)]
    assert len(lines) == 2
    logged = read_scalars(tmp_path)
    for name in ("jreg loss", "jump rate"):
        shown = [float(re.search(rf"\| {name}: (\S+) \|", line)[1]) for line in lines]  # type: ignore[index]
        assert shown == pytest.approx(logged[name], rel=1e-6)
    for layer in (1, 2, 3, 4):
        assert len(logged[f"jreg/displacement_layer_{layer:02d}"]) == 2
        assert len(logged[f"jreg/displacement_layer_{layer:02d} validation"]) > 0
    last, before = (logged[f"jreg/displacement_layer_{layer:02d}"] for layer in (4, 3))
    expected = [max(0, 100 * (a - b)) for a, b in zip(last, before, strict=True)]
    assert logged["jump rate"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "validation JREG at iteration 4 | jreg loss value: " in output


def test_measuring_every_second_iteration_logs_the_same_values_there(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, "--train-iters", 4]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "all"])
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "second", "--jreg-measure-interval", 2])
    every, second = read_scalars(tmp_path / "all"), read_scalars(tmp_path / "second")
    assert second["jump rate"] == every["jump rate"][1::2]
    assert second["lm loss"] == every["lm loss"]


def means(each: dict[str, list[float]], *intervals: Sequence[int]) -> dict[str, list[float]]:
    """A log's values for these intervals, from ``each``, which has every iteration (1-based) alone."""
    layers = [f"jreg/displacement_layer_{layer:02d}" for layer in (3, 4)]
    of = {tag: [np.mean([each[tag][i - 1] for i in some]) for some in intervals] for tag in layers}
    before_last, last = of.values()
    weighted = [np.mean([each["jreg loss"][i - 1] for i in some]) for some in intervals]
    return {
        "jreg loss": weighted,
        "jump rate": [max(0, 100 * (a - b)) for a, b in zip(last, before_last, strict=True)],
        **of,
    }


def said_by_jreg(output: str, logged: dict[str, list[float]] | None = None) -> list[str]:
    """JREG's own lines; values at their beginning must be the last that were ``logged``, and are left out."""
    lines = []
    for line in re.findall(r"^ JREG at iteration (.*) \| $", output, re.MULTILINE):
        found = re.fullmatch(r"(\d+ \| )jreg loss: (\S+) \| jump rate: (\S+) \| (.*)", line)
        if found:
            assert logged is not None
            shown, expected = [float(found[2]), float(found[3])], [logged[t][-1] for t in NAMES]
            assert shown == pytest.approx(expected, rel=1e-6)
        lines.append(found[1] + "values | " + found[4] if found else line)
    return lines


@pytest.fixture(scope="module")
def every_iteration(
    toy_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("every iteration")
    argv = [*toy_arguments, *PIPELINE, "--train-iters", 11, "--jreg-log-per-layer"]
    run = run_ranks([*argv, "--tensorboard-dir", folder], 2)
    assert not said_by_jreg(run.output[1]), "each interval is whole"
    return read_scalars(folder)


def check_logged(
    folder: Path, each: dict[str, list[float]], *intervals: Sequence[int]
) -> dict[str, list[float]]:
    logged = read_scalars(folder)
    for tag, expected in means(each, *intervals).items():
        assert logged[tag] == pytest.approx(expected, rel=1e-5, abs=1e-5), tag
    return logged


def test_a_run_that_exits_or_ends_within_a_log_interval_logs_its_part_and_names_the_iterations(
    toy_arguments: list[str], every_iteration: dict[str, list[float]], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *PIPELINE, "--train-iters", 11, "--log-interval", 4, "--jreg-log-per-layer"]
    argv += ["--save", tmp_path / "saved", "--load", tmp_path / "saved", "--save-interval", 100]
    folder = tmp_path / "cut"
    run = run_ranks([*argv, "--exit-interval", 6, "--tensorboard-dir", folder], 2)
    logged = check_logged(folder, every_iteration, range(1, 5), (5, 6))
    assert said_by_jreg(run.output[1], logged) == ["6 | values | measured in 2 iterations, 5 to 6"]

    run = run_ranks([*argv, "--tensorboard-dir", tmp_path / "resumed"], 2)
    logged = check_logged(tmp_path / "resumed", every_iteration, (7, 8), (9, 10, 11))
    assert said_by_jreg(run.output[1], logged) == [
        "8 | measured in 2 iterations, 7 to 8",
        "11 | values | measured in 3 iterations, 9 to 11",
    ]


def launch_and_ask_to_end(argv: list[str]) -> None:
    """A scheduler sends SIGTERM in iteration 7; the rank knows JREG by the launcher."""
    from megatron.training import get_args, training

    from jreg_megatron import launch

    train_step = training.train_step

    @functools.wraps(train_step)
    def with_signal(*args: object, **named: object) -> object:
        if get_args().curr_iteration == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **named)

    training.train_step = with_signal
    launch.main(argv)


def test_sigterm_within_a_log_interval_logs_the_iterations_that_were_measured_in_it(
    toy_arguments: list[str], every_iteration: dict[str, list[float]], tmp_path: Path
) -> None:
    argv = [SCRIPT, *toy_arguments, *PIPELINE, "--train-iters", 11, "--log-interval", 4]
    argv += ["--jreg-measure-interval", 2, "--jreg-log-per-layer", "--exit-signal-handler"]
    run = run_ranks([*argv, "--tensorboard-dir", tmp_path], 2, entry="test_pretrain:launch_and_ask_to_end")
    logged = check_logged(tmp_path, every_iteration, (2, 4), (6,))
    assert "exiting program after receiving SIGTERM" in run.output[0] + run.output[1]
    assert said_by_jreg(run.output[1], logged) == ["7 | values | measured in iteration 6"]


def exit_in_the_sixth_step(argv: list[str]) -> None:
    """As Megatron's rerun state machine ends a run: the loop ends after the step."""
    from megatron.training import get_args, training

    train_step = training.train_step

    @functools.wraps(train_step)
    def with_exit(*args: object, **named: object) -> object:
        result = train_step(*args, **named)
        return (*result[:3], True, 17, *result[5:]) if get_args().curr_iteration == 5 else result

    training.train_step = with_exit
    pretrain.main(argv)


def test_measurements_are_logged_if_a_rerun_ends_training_or_its_last_iterations_are_skipped(
    toy_arguments: list[str], every_iteration: dict[str, list[float]], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *PIPELINE, "--jreg-log-per-layer", "--tensorboard-dir", tmp_path / "rerun"]
    rerun = [*argv, "--train-iters", 11, "--log-interval", 4]
    run = run_ranks(rerun, 2, entry="test_pretrain:exit_in_the_sixth_step", check=False)
    assert run.status == [17, 17]
    logged = check_logged(tmp_path / "rerun", every_iteration, range(1, 5), (5, 6))
    assert said_by_jreg(run.output[1], logged) == ["6 | values | measured in 2 iterations, 5 to 6"]

    argv[-1] = tmp_path / "skipped"
    run = run_ranks([*argv, "--train-iters", 5, "--log-interval", 3, "--iterations-to-skip", 5], 2)
    logged = check_logged(tmp_path / "skipped", every_iteration, range(1, 4), (4,))
    assert said_by_jreg(run.output[1], logged) == ["4 | values | measured in iteration 4"]


def test_a_log_interval_whose_last_iteration_is_skipped_says_that_the_next_line_is_about_both(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, "--train-iters", 6, "--log-interval", 2, "--iterations-to-skip", 4]
    run = run_ranks([*argv, "--tensorboard-dir", tmp_path])
    assert said_by_jreg(run.output[0]) == ["6 | measured in 3 iterations, 3 to 6"]
    assert len(read_scalars(tmp_path)["jreg loss"]) == 2


def test_help_shows_megatrons_arguments_and_jregs_in_a_group_of_its_own() -> None:
    output = run_ranks(["--help"]).output[0]
    assert "--tensor-model-parallel-size" in output
    group = output[output.index("JREG, the jump-suppressing regularizer") :]
    assert "--jreg-coeff LAMBDA" in group
    assert "--jreg-log-per-layer" in group


def test_a_refusal_of_megatron_becomes_one_line_and_another_error_stays() -> None:
    def end(error: Exception, cause: Exception | None = None, has_begun: bool = False) -> Exception:
        with (
            pytest.raises(type(error) if has_begun else Exception) as caught,
            megatrons_refusals(lambda: has_begun),
        ):
            raise error from cause
        return caught.value

    refusals: list[tuple[Exception, Exception | None, str]] = [
        (AssertionError("two\n  lines"), None, "two lines"),
        (AssertionError(), None, "raise error from cause"),
        (ImportError("no einops"), None, "no einops"),
        (RuntimeError("einops is required"), ImportError(), "einops is required"),
        (FileNotFoundError(2, "No such file", "x.yaml"), None, "[Errno 2] No such file: 'x.yaml'"),
    ]
    for error, cause, said in refusals:
        refused = end(error, cause)
        assert isinstance(refused, UserError) and str(refused) == f"Megatron refuses the arguments: {said}"
        assert end(error, cause, has_begun=True) is error
    for error in (RuntimeError("NCCL"), TypeError("fault"), UserError("--jreg-coeff is -1")):
        assert end(error) is error


def test_a_fault_while_megatron_builds_is_not_a_refusal_of_the_arguments(tmp_path: Path) -> None:
    def end(place: str, error: str) -> str:
        file = tmp_path / "megatron" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"raise {error}")
        with pytest.raises(Exception) as caught, megatrons_refusals(is_building=True):  # noqa: PT011
            runpy.run_path(str(file))
        return type(caught.value).__name__

    assert end("core/transformer/attention.py", "AssertionError('heads')") == "UserError"
    assert end("core/optimizer/__init__.py", "ValueError('optimizer')") == "UserError"
    assert end("../elsewhere/any.py", "ImportError('einops')") == "UserError"
    assert end("core/transformer/attention.py", "OSError(28, 'No space left on device')") == "OSError"
    assert end("core/dist_checkpointing/core.py", "ValueError('damaged')") == "ValueError"
    assert end("training/checkpointing.py", "AssertionError('damaged')") == "AssertionError"
    assert end("../torch/nn/init.py", "ValueError('std')") == "ValueError"


MISTAKES = {
    "a negative coeff": (
        ["--jreg-coeff", -0.1],
        r"--jreg-coeff .* is -0\.1; it must be a finite number >= 0",
    ),
    "a coeff that is no number": (["--jreg-coeff", "nan"], r"--jreg-coeff .* is nan; it must be"),
    "a coeff that is text": (["--jreg-coeff", "high"], r"argument --jreg-coeff: invalid float value: 'high'"),
    "an unknown rule": (
        ["--jreg-weights", "sofmax"],
        r"--jreg-weights .* is sofmax; it must be one of softmax",
    ),
    "weights for another depth": (["--jreg-weights", "0,0,1"], r"--jreg-weights .* 4 numbers.* not 3"),
    "a start after the stop": (
        ["--jreg-start-iteration", 9, "--jreg-stop-iteration", 5],
        r"--jreg-stop-iteration .* is 5; .*--jreg-start-iteration \(9\)",
    ),
    "missing data": (["--data-path", "no/such/data"], r"--data-path .*no/such/data"),
    "a vocabulary below the data's": (["--vocab-size", 100], r"(?=.*vocab)(?=.*255)"),
    "layers that stages cannot share": (
        ["--num-layers", 5, *PIPELINE],
        r"(?=.*--num-layers)(?=.*\b5\b)(?=.*2)",
    ),
    "an unknown flag": (["--jreg-coef", 0.1], r"--jreg-coef;.* --jreg-coeff"),
    "what only Megatron itself checks": (["--clone-scatter-output-in-embedding", "--fp16", "--bf16"], r""),
    "no kind of full recompute": (("--recompute-granularity", "full"), "Megatron refuses .*recompute"),
    "two precisions": (
        ("--bf16", "--fp16"),
        "Megatron refuses the arguments: assert not args.bf16",
    ),
    "an optimizer whose package is missing": (("--optimizer", "muon"), "is muon, .* emerging_optimizers"),
    "positions in pictures": (
        ("--position-embedding-type", "mrope", "--mrope-section", 2, 3, 3),
        "--mrope-section is not part of jreg_megatron.pretrain",
    ),
    "batches from outside": (("--dataloader-type", "external"), "--dataloader-type external is not part of"),
    "a package that Megatron imports late": (
        *[("--non-persistent-ckpt-type", "local", "--non-persistent-local-ckpt-dir", "x")],
        "Megatron refuses .*nvidia_resiliency_ext",
    ),
    "what Megatron refuses while it builds the model": (
        ("--num-experts", 2, "--moe-token-dispatcher-type", "flex"),
        "Megatron refuses the arguments: DeepEP dispatcher requires",
    ),
    "what Megatron refuses before it builds the model": (
        ("--use-distributed-optimizer", "--num-distributed-optimizer-instances", 3),
        "Megatron refuses the arguments: Data parallel size should be divisible by partial DistOpt shard",
    ),
    "post_norm without a last layer": (
        (*PIPELINE, "--pipeline-model-parallel-layout", "Etttt|L", "--jreg-final-state", "post_norm"),
        "'post_norm' with no layer on the last pipeline stage; use 'pre_norm'",
    ),
}


FOUND_WHILE_RANKS_MEET = ("what Megatron refuses before it builds the model",)
"""Found by each rank in turn. A later rank may find that the first one has ended."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_every_rank_with_one_clear_line(mistake: str, toy_arguments: list[str]) -> None:
    flags, expected = MISTAKES[mistake]
    run = run_ranks([*toy_arguments, "--train-iters", 2, *flags], 2, check=False, timeout=180)
    said = run.output
    if mistake in FOUND_WHILE_RANKS_MEET:
        assert run.status[0] == 2
        said = said[:1]
    else:
        assert run.status == [2, 2]
    for output in said:
        assert "Traceback" not in output
        errors = [line for line in output.splitlines() if line.startswith("jreg_megatron: error: ")]
        assert len(errors) == 1
        assert re.search(expected, errors[0]), errors[0]
        assert output.rstrip().endswith(errors[0])


def test_torchrun_shows_a_mistake_once_and_does_not_hang(toy_arguments: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*toy_arguments, "--train-iters", "2", "--jreg-coeff", "-1"]
    run = subprocess.run(
        [*torchrun, "-m", "jreg_megatron.pretrain", *argv],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode != 0
    assert run.stderr.count("jreg_megatron: error: --jreg-coeff") == 1


def without_torchrun(argv: list[str]) -> None:
    """A command, in a process whose environment says nothing of ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    module, *argv = argv
    if found := argv[0].partition("=")[2]:
        os.environ[argv.pop(0).partition("=")[0]] = found
    __import__(module, fromlist=["_"]).main(argv)


@pytest.mark.parametrize("module", ["jreg_megatron.pretrain", "jreg_megatron.launch"])
def test_without_torchrun_a_single_rank_trains(module: str, toy_arguments: list[str]) -> None:
    script = [SCRIPT] if module.endswith("launch") else []
    argv = [module, *script, *toy_arguments, "--train-iters", 1]
    assert "jump rate" in run_ranks(argv, entry="test_pretrain:without_torchrun").output[0]


@pytest.mark.parametrize("module", ["jreg_megatron.pretrain", "jreg_megatron.launch"])
def test_processes_of_srun_that_know_no_rank_do_not_train_alone(
    module: str, toy_arguments: list[str]
) -> None:
    script = [SCRIPT] if module.endswith("launch") else []
    argv = [module, "SLURM_STEP_NUM_TASKS=2", *script, *toy_arguments, "--train-iters", 1]
    run = run_ranks(argv, entry="test_pretrain:without_torchrun", check=False)
    assert run.status == [2]
    assert re.search("error: SLURM_STEP_NUM_TASKS is 2.*RANK.*torchrun", run.output[0])


STARTED = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "9"}


@pytest.mark.parametrize(
    ("given", "local"),
    [
        ({}, "0"),
        (STARTED | {"SLURM_LOCALID": "1"}, "1"),
        (STARTED | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "2"),
        (STARTED | {"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, "3"),
    ],
)
def test_a_rank_without_local_rank_gets_that_of_srun_or_mpirun(given: dict[str, str], local: str) -> None:
    with mock.patch.dict(os.environ, given, clear=True):
        be_alone_unless_started()
        assert {name: os.environ[name] for name in given} == given
        assert os.environ["LOCAL_RANK"] == local


SLOW_TO_GO_DOWN = """
import atexit, os, signal, time
from jreg_megatron.runtime.errors import UserError, user_errors_exit

signal.signal(signal.SIGTERM, lambda *_: None)  # as Megatron's --exit-signal-handler, which makes a note
if os.environ["LOCAL_RANK"] == "0":
    atexit.register(time.sleep, 5)
with user_errors_exit():
    raise UserError("--mistake is made; mend it")
"""


def test_a_mistake_is_shown_once_however_slowly_the_first_rank_goes_down(tmp_path: Path) -> None:
    (tmp_path / "mistaken.py").write_text(SLOW_TO_GO_DOWN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "mistaken.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode != 0
    assert run.stderr.count("jreg_megatron: error: --mistake is made; mend it") == 1


@pytest.mark.parametrize(
    ("missing", "implementation", "expected"),
    [
        ("transformer_engine", "transformer_engine", "install jreg_megatron.te., or give --transformer-impl"),
        ("transformer_engine", "local", None),
        (installed.APEX_FUSION, "local", "install NVIDIA's Apex, or give --no-gradient-accumulation-fusion"),
    ],
)
def test_on_a_gpu_nvidias_packages_that_megatron_takes_for_granted_are_asked_for_at_start_up(
    missing: str, implementation: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == missing else name)
    asked = Namespace(transformer_impl=implementation, spec=None, gradient_accumulation_fusion=True)
    if expected is None:
        installed.refuse_without_nvidias_packages(asked)
    else:
        with pytest.raises(UserError, match=expected):
            installed.refuse_without_nvidias_packages(asked)
    installed.refuse_without_nvidias_packages(
        Namespace(transformer_impl="transformer_engine", spec=["a"], gradient_accumulation_fusion=False)
    )


def pretrain_without_a_training_loop(_: list[str]) -> None:
    from jreg_megatron import pretrain

    installed.has_training_loop = lambda: False
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--cpu"])
    assert ended.value.code == 2


def test_a_megatron_core_without_training_loop_is_named_with_what_works_instead() -> None:
    run = run_ranks([], entry="test_pretrain:pretrain_without_a_training_loop")
    (line,) = [line for line in run.output[0].splitlines() if "error" in line]
    assert "needs the training loop of 0.19 or later" in line and "jreg_megatron.attach" in line


def test_an_evaluation_may_have_another_micro_batch_size_under_tensor_parallelism(
    toy_arguments: list[str], tmp_path: Path
) -> None:
    argv = [*toy_arguments, *TENSOR, "--train-iters", 2, "--eval-interval", 2, "--eval-iters", 1]
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "same"], 2)
    run_ranks([*argv, "--tensorboard-dir", tmp_path / "other", "--eval-micro-batch-size", 1], 2)
    same, other = read_scalars(tmp_path / "same"), read_scalars(tmp_path / "other")
    for name in ("lm loss validation", "jreg loss validation"):
        assert other[name] == pytest.approx(same[name], rel=1e-5), name
