"""The promises of ``jreg_megatron.sweep``: every run of the grid once, and their measurements as a result."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import report_toy

from jreg_megatron.report.charts import Chart
from jreg_megatron.report.reading import read
from jreg_megatron.runtime.last_error import LastError
from jreg_megatron.sweep import grid
from jreg_megatron.sweep.__main__ import main
from jreg_megatron.sweep.report import compose
from jreg_megatron.sweep.results import Results

ROOT = Path(__file__).parents[1]

RECIPE = """#!/usr/bin/env bash
# Stands for a recipe: says what it was called with, and does what the plan has for RUN.
LAMBDA=${LAMBDA:-9} ALPHA=${ALPHA:-9} SEED=${SEED:-9} RUN=${RUN:-nowhere} TOKENS=${TOKENS:-1000}
here=$(dirname "$0")
printf '%s\\t' "$LAMBDA" "$ALPHA" "$SEED" "${RUN##*/}" "$TOKENS" "${MASTER_ADDR:-}" >> "$here/calls"
printf '%q ' "$@" >> "$here/calls"
echo >> "$here/calls"
plan=$here/plan/${RUN##*/}
[[ -d $plan ]] || plan=$here/plan/default
cat "$plan/says"
if [[ -e $plan/waits ]]; then
    trap 'echo saving; exit 75' TERM
    echo $$ > "$here/waiting"
    for _ in {1..600}; do sleep 0.1; done
fi
status=$(cat "$plan/status")
[[ $status != 0 ]] || { mkdir -p "$RUN"; cp -r "$plan/tensorboard" "$RUN/"; }
exit "$status"
"""


def write_events(
    folder: Path,
    *,
    loss: float = 3.0,
    psi: Sequence[float] = (0.1, 0.01, 0.02),
    iterations: int = 200,
    settings: Mapping[str, str] | None = None,
) -> None:
    """TensorBoard files with a validation every 100 iterations."""
    losses = {step: loss + (200 - step) / 100 for step in range(100, iterations + 1, 100)}
    not_logged = dict.fromkeys(("jreg_coeff", "jreg_alpha", "jreg_final_state"), "")
    logged = not_logged | {"lr": "0.0006"} | dict(settings or {})
    rate = 100 * max(0, psi[-1] - psi[-2])
    report_toy.write_events(folder, losses, settings=logged, displacement=psi, jump_rate=rate)


class Call(NamedTuple):
    """A start of the recipe: its knobs and its words."""

    coeff: str
    alpha: str
    seed: str
    run: str
    tokens: str
    master: str
    words: str


class StandIn:
    """A folder with a recipe that trains nothing, and a plan of its runs' behaviour."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = self.write_recipe("toy.sh")
        self.plan({})

    def write_recipe(self, name: str) -> Path:
        recipe = self.folder / name
        recipe.write_text(RECIPE)
        recipe.chmod(0o755)
        return recipe

    def plan(self, runs: dict[str, dict[str, Any]]) -> None:
        """Set a run's behaviour by its name: status, says, waits, and the arguments of write_events."""
        shutil.rmtree(self.folder / "plan", ignore_errors=True)
        for name, does in ({"default": {}} | runs).items():
            plan = self.folder / "plan" / name
            plan.mkdir(parents=True)
            (plan / "status").write_text(str(does.pop("status", 0)))
            (plan / "says").write_text("".join(line + "\n" for line in does.pop("says", ["training"])))
            if does.pop("waits", False):
                (plan / "waits").touch()
            write_events(plan / "tensorboard", **does)

    @property
    def calls(self) -> list[Call]:
        """Each start of the recipe so far."""
        calls = self.folder / "calls"
        return [Call(*line.split("\t")) for line in calls.read_text().splitlines()] if calls.exists() else []

    @property
    def started(self) -> list[str]:
        """Names of the runs that were started so far, in order."""
        return [call.run for call in self.calls]

    def waits(self) -> int:
        """Wait until a run does; its process."""
        file = self.folder / "waiting"
        return int(eventually(lambda: file.exists() and file.read_text()))


@pytest.fixture
def toy(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture(autouse=True)
def _no_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*grid.SWEPT, "TOKENS", "NODES", "NODE_RANK", "PYTHON", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def sweep(*words: object) -> int:
    """Run the command here; its exit status."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jreg_megatron.sweep", *map(str, words)],
        env=os.environ | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def eventually(ask: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return answer


def read_summary(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "summary.json").read_text()))


def test_every_setting_and_a_baseline_per_seed_are_trained_once_each_in_its_own_folder(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    output = toy.folder / "out"
    grid = ["--coeff", 0.1, 1e-2, "--alpha", 1, 0.5, "--seeds", 1, 2, "--output", output]
    assert sweep(toy.recipe, *grid, "--", "--lr", "1e-3") == 0
    expected = []
    for seed in ("1", "2"):
        expected.append(("0", "9", seed, f"baseline_seed{seed}", "baseline -- --lr 1e-3 "))
        for alpha in ("1", "0.5"):
            for coeff in ("0.1", "0.01"):
                name = f"coeff{coeff}_alpha{alpha}_seed{seed}"
                expected.append((coeff, alpha, seed, name, "jreg -- --lr 1e-3 "))
    assert [(*call[:4], call.words) for call in toy.calls] == expected
    assert (output / "coeff0.1_alpha1_seed2" / "train.log").read_text() == "training\n"
    assert "[10/10] coeff0.01_alpha0.5_seed2: finished" in capsys.readouterr().out
    # The same command finds nothing left, and draws the result.
    (output / "sweep.png").unlink()
    assert sweep(toy.recipe, *grid, "--", "--lr", "1e-3") == 0
    assert len(toy.calls) == 10
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "sweep.svg").read_text()


PSI = {"baseline": [0.2, 0.01, 0.03], "jreg": [0.2, 0.02, 0.015]}


def test_the_summary_holds_paired_differences_and_95_percent_t_intervals(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    base, with_jreg = {1: 3.0, 2: 3.25, 3: 3.5}, {1: 2.5, 2: 3.0, 3: 3.0}
    toy.plan(
        {f"baseline_seed{s}": {"loss": loss, "psi": PSI["baseline"]} for s, loss in base.items()}
        | {f"coeff0.1_alpha1_seed{s}": {"loss": loss, "psi": PSI["jreg"]} for s, loss in with_jreg.items()}
    )
    output = toy.folder / "out"
    assert sweep(toy.recipe, "--coeff", 0.1, 1, "--seeds", 1, 2, 3, "--output", output) == 0
    summary = read_summary(output)
    # Differences -0.5, -0.25, -0.5: mean -5/12, deviation sqrt(1/48); Student's t(0.975, 2) is 4.302653.
    setting = next(s for s in summary["settings"] if s["coeff"] == 0.1)
    half = 4.302653 * (1 / 48) ** 0.5 / 3**0.5
    difference = setting["difference_to_baseline"]
    assert difference["n"] == 3
    assert [difference[end] for end in ("mean", "low", "high")] == pytest.approx(
        [-5 / 12, -5 / 12 - half, -5 / 12 + half], rel=1e-5
    )
    assert setting["validation_loss"]["mean"] == pytest.approx(8.5 / 3)
    assert setting["jump_rate"]["mean"] == 0
    assert setting["displacement"] == pytest.approx(PSI["jreg"])
    assert summary["baseline"]["jump_rate"]["mean"] == pytest.approx(2.0)
    assert summary["runs"]["baseline_seed2"]["history"] == [
        {"iteration": 100, "validation_loss": 4.25, "jump_rate": pytest.approx(2.0)},
        {"iteration": 200, "validation_loss": 3.25, "jump_rate": pytest.approx(2.0)},
    ]
    assert (summary["iterations"], summary["final_state"]) == (200, "pre_norm")
    assert summary["lowest_validation_loss"] == {"coeff": 0.1, "alpha": 1.0}
    assert {run.name: run.summary()["history"] for run in read([output]).runs} == {
        name: run["history"] for name, run in summary["runs"].items()
    }
    said = " ".join(capsys.readouterr().out.split())
    assert "lambda 0.1, alpha 1, -0.4167 (-0.7752 to -0.0581)" in said


def test_one_seed_and_an_interval_around_zero_are_not_called_a_difference(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (toy.recipe, "--coeff", 0.1, "--output", toy.folder / "out")

    def difference() -> dict[str, Any]:
        (setting,) = read_summary(toy.folder / "out")["settings"]
        found: dict[str, Any] = setting["difference_to_baseline"]
        return found

    def verdict() -> str:
        """The line on the best setting, without its numbers."""
        (line,) = (it for it in capsys.readouterr().out.splitlines() if "lambda 0.1, alpha 1, " in it)
        return re.sub(r"[-+]\d\.\d+", "", line)

    toy.plan({f"baseline_seed{s}": {"loss": loss} for s, loss in ((1, 3.5), (2, 2.9), (4, 3.5), (5, 3.5))})
    assert sweep(*words, "--seeds", 1) == 0
    of_one = verdict()
    assert "--seeds" in of_one and difference()["low"] is None
    assert sweep(*words, "--seeds", 2) == 0
    around_zero = verdict()
    assert difference()["low"] < 0 < difference()["high"]
    shutil.rmtree(toy.folder / "out")
    assert sweep(*words, "--seeds", 4, 5) == 0
    assert difference()["high"] < 0
    assert len({of_one, around_zero, verdict()}) == 3


def root_cause(rank: int, traceback: str) -> list[str]:
    """torchrun's last lines."""
    others = ["  rank      : 0 (local_rank: 0)", "  exitcode  : 1 (pid: 6)"]
    mine = [f"  rank      : {rank} (local_rank: {rank})", "  exitcode  : 1 (pid: 7)", "  error_file: <N/A>"]
    return [
        *others,
        "Root Cause (first observed failure):",
        "[0]:",
        *mine,
        f"  traceback : {traceback}",
        "===",
    ]


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ([], "nothing was printed"),
        (["Killed", ""], "Killed"),
        (["Error reading x, trying again", "Exception ignored in: <f>", "bye"], "bye"),
        (["ValueError: x", "ImportError: sys.meta_path is None, going down"], "ValueError: x"),
        (["[rank1]: OSError: no disk", "a.ChildFailedError: ", "bye"], "[rank1]: OSError: no disk"),
        (
            ["[rank2]: KeyError", "[rank2]: ValueError: x", "[rank0]: RuntimeError: y"],
            "[rank2]: ValueError: x",
        ),
        (["[rank0]: OSError: lost", "[rank2]: KeyError", *root_cause(2, "exit")], "[rank2]: KeyError"),
        (["[rank0]: OSError: lost", *root_cause(2, "Signal 9 (SIGKILL)")], "rank 2: Signal 9 (SIGKILL)"),
        (["[rank0]: OSError: lost", *root_cause(2, "To enable")], "rank 2: exit code 1 (pid: 7)"),
        (["ValueError: x", *root_cause(2, "Signal 9 (SIGKILL)")], "rank 2: Signal 9 (SIGKILL)"),
        (["ValueError: x", *root_cause(2, "To enable")], "ValueError: x"),
        (["[default1]:jreg_megatron: error: --lr is -1", "bye"], "--lr is -1"),
        (["jreg_megatron: error: --lr is -1", "RuntimeError: a rank failed", "bye"], "--lr is -1"),
    ],
)
def test_the_reason_of_a_failed_run_is_our_line_else_an_errors_else_the_last(
    printed: list[str], why: str
) -> None:
    last_error = LastError()
    for line in printed:
        last_error.read(f"{line}\n")
    assert str(last_error) == why


def test_a_run_that_fails_is_named_with_the_reason_and_the_others_continue(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "coeff0.1_alpha1_seed1"
    says = ["Traceback:", "[rank1]: RuntimeError: out of memory", "torch.x.ChildFailedError: rank 1", "bye"]
    toy.plan({broken: {"status": 1, "says": says}})
    words = (toy.recipe, "--coeff", 0.1, 1, "--seeds", 1, "--output", toy.folder / "out")
    assert sweep(*words) == 1
    (line,) = (it for it in capsys.readouterr().out.splitlines() if says[1] in it)
    assert broken in line and "status 1" in line and f"{toy.folder}/out/{broken}/train.log" in line
    assert read_summary(toy.folder / "out")["left_out"] == {broken: "unfinished"}
    assert toy.started == ["baseline_seed1", broken, "coeff1_alpha1_seed1"]
    toy.plan({})
    assert sweep(*words) == 0
    assert toy.started[3:] == [broken]
    assert read_summary(toy.folder / "out")["left_out"] == {}


def test_after_a_refusal_of_the_first_run_the_others_are_not_tried(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.plan({"baseline_seed1": {"status": 2, "says": ["jreg_megatron: error: DATA is missing; make it"]}})
    assert sweep(toy.recipe, "--coeff", 0.1, "--seeds", 1, "--output", toy.folder / "out") == 2
    (line,) = (it for it in capsys.readouterr().out.splitlines() if "DATA is missing; make it" in it)
    assert "baseline_seed1" in line and f"{toy.folder}/out/baseline_seed1/train.log" in line
    assert toy.started == ["baseline_seed1"]


def test_sigterm_reaches_the_recipe_and_the_same_command_resumes_it(toy: StandIn) -> None:
    waiting = "coeff0.1_alpha1_seed1"
    toy.plan({waiting: {"waits": True}})
    words = (toy.recipe, "--coeff", 0.1, 1, "--seeds", 1, "--output", toy.folder / "out")
    with start(*words) as queue:
        toy.waits()
        queue.send_signal(signal.SIGTERM)
        output = queue.communicate(timeout=30)[0]
    assert queue.returncode == 75, output
    assert "saving" in (toy.folder / "out" / waiting / "train.log").read_text()
    toy.plan({})
    assert sweep("--output", toy.folder / "out") == 0
    assert toy.started == ["baseline_seed1", waiting, waiting, "coeff1_alpha1_seed1"]


def test_a_killed_queue_leaves_no_run_and_two_do_not_train_the_same_run(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.plan({"baseline_seed1": {"waits": True}})
    words = (toy.recipe, "--coeff", 0.1, "--seeds", 1, "--output", toy.folder / "out")
    with start(*words) as queue:
        recipe = toy.waits()
        assert sweep(*words) == 2
        assert "baseline_seed1 is being trained by process" in capsys.readouterr().err
        queue.kill()
    eventually(lambda: not psutil.pid_exists(recipe) or psutil.Process(recipe).status() == "zombie")
    toy.plan({})
    assert sweep(*words) == 0
    assert toy.started == ["baseline_seed1", "baseline_seed1", "coeff0.1_alpha1_seed1"]


def test_another_grid_adds_its_runs_after_those_that_are_there(toy: StandIn) -> None:
    output = toy.folder / "out"
    assert sweep(toy.recipe, "--coeff", 0.1, "--seeds", 1, "--output", output) == 0
    assert sweep(toy.recipe, "--coeff", 0.1, 1, "--alpha", 1, "--seeds", 2, 1, "--output", output) == 0
    assert toy.started == [
        *("baseline_seed1", "coeff0.1_alpha1_seed1"),
        *("baseline_seed2", "coeff0.1_alpha1_seed2", "coeff1_alpha1_seed2", "coeff1_alpha1_seed1"),
    ]
    assert [run["coeff"] for run in json.loads((output / "sweep.json").read_text())["runs"]] == [
        *(0.0, 0.1, 0.0, 0.1, 1.0, 1.0)
    ]


def test_a_sweep_continues_with_its_first_knobs(
    toy: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (toy.recipe, "--coeff", 0.1, "--seeds", 1, "--output", toy.folder / "out")
    monkeypatch.setenv("TOKENS", "5000")
    toy.plan({"coeff0.1_alpha1_seed1": {"status": 1}})
    assert sweep(*words) == 1
    monkeypatch.setenv("TOKENS", "7000")
    assert sweep(*words) == 2
    assert "TOKENS is 7000, " in capsys.readouterr().err
    monkeypatch.delenv("TOKENS")
    toy.plan({})
    assert sweep(*words) == 0
    assert [call.tokens for call in toy.calls] == ["5000"] * 3


@pytest.mark.parametrize(
    ("words", "expected"),
    {
        "a recipe that is not there": (["no.sh", "--coeff", 1], "RECIPE is no.sh, "),
        "a file that is no recipe": (["FOLDER/plan", "--coeff", 1], "cannot be executed"),
        "a script that takes no lambda": (["/bin/sh", "--coeff", 1], "takes no LAMBDA, ALPHA, SEED, RUN"),
        "no recipe": (["--coeff", 1], "--coeff is given without a RECIPE"),
        "nothing": ([], "RECIPE is missing"),
        "no lambda": (["RECIPE"], "--coeff is missing"),
        "an empty list": (["RECIPE", "--coeff"], "argument --coeff: expected at least one argument"),
        "a lambda that is text": (["RECIPE", "--coeff", "high"], "argument --coeff: invalid float value"),
        "a negative lambda": (
            ["RECIPE", "--coeff", -1],
            "--jreg-coeff (JRegConfig.coeff) is -1.0; it must be",
        ),
        "an alpha that is no number": (["RECIPE", "--coeff", 1, "--alpha", "nan"], "--jreg-alpha"),
        "lambda 0": (["RECIPE", "--coeff", 0, 1], "--coeff names 0, "),
        "a lambda twice": (["RECIPE", "--coeff", 0.1, 1, "1e-1"], "--coeff names 0.1 twice"),
        "a seed twice": (["RECIPE", "--coeff", 1, "--seeds", 1, 1], "--seeds names 1 twice"),
        "seed 0": (["RECIPE", "--coeff", 1, "--seeds", 0], "--seeds is 0; it must be"),
        "a flag of the sweep's": (["RECIPE", "--coeff", 1, "--", "--seed=4"], "--seed comes after --"),
        "an unknown flag of JREG": (
            ["RECIPE", "--coeff", 1, "--", "--jreg-final-sate", "post_norm"],
            "unknown flag --jreg-final-sate; did you mean --jreg-final-state?",
        ),
        "an output without a sweep": (["--output", "FOLDER", "--report"], "--output is FOLDER"),
        "no iterations of a smoke": (["RECIPE", "--coeff", 1, "--smoke", 0], "--smoke is 0; it must be"),
        "only what is not there": (["RECIPE", "--coeff", 1, "--only", 2], "--only is 2;"),
        "only a task, outside an array": (
            ["RECIPE", "--coeff", 1, "--only"],
            "SLURM_ARRAY_TASK_ID is not set",
        ),
        "a Slurm without sbatch": (["RECIPE", "--coeff", 1, "--slurm"], "slurm.sh is missing"),
    }.values(),
)
def test_a_mistake_ends_in_one_line_before_anything_is_started(
    words: list[object], expected: str, toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RECIPE": str(toy.recipe), "FOLDER": str(toy.folder)}
    written = [
        str(word).replace("RECIPE", places["RECIPE"]).replace("FOLDER", places["FOLDER"]) for word in words
    ]
    at = written.index("--") if "--" in written else len(written)
    if "--output" not in written and "RECIPE" in words:
        written[at:at] = ["--output", str(toy.folder / "out")]
    assert sweep(*written) == 2
    said = capsys.readouterr().err
    assert said.startswith("jreg_megatron: error: ")
    assert said.count("\n") == 1
    assert expected.replace("FOLDER", places["FOLDER"]) in said
    assert not toy.calls
    assert not (toy.folder / "out").exists()


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ("x", "not readable JSON"),
        ("[]", "the whole is a list of 0"),
        ('{"runs": [{}]}', "recipe is missing"),
    ],
)
def test_a_file_that_is_not_a_sweep_is_refused_in_one_line(
    kept: str, expected: str, toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy.folder / "sweep.json").write_text(kept)
    assert sweep("--output", toy.folder) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "sweep.json" in said and expected in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["other.sh", "--coeff", 1], "RECIPE is {folder}/other.sh, "),
        (["toy.sh", "--coeff", 1, "--", "--lr", "1"], "Megatron flags are --lr 1, "),
        (["toy.sh", "--coeff", 1, "--smoke"], "--smoke is 4, "),
    ],
)
def test_an_output_with_another_sweep_is_refused(
    words: list[object], expected: str, toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_recipe("other.sh")
    assert sweep(toy.recipe, "--coeff", 1, "--seeds", 1, "--output", toy.folder / "out") == 0
    before = (toy.folder / "out" / "sweep.json").read_text()
    recipe, *rest = words
    assert sweep(toy.folder / str(recipe), "--output", toy.folder / "out", *rest) == 2
    assert expected.format(folder=toy.folder) in capsys.readouterr().err
    assert (toy.folder / "out" / "sweep.json").read_text() == before


def test_a_dry_run_prints_lines_that_a_shell_takes_and_leaves_nothing(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (toy.recipe, "--coeff", 0.1, "--seeds", 1, "--output", toy.folder / "out")
    assert sweep(*words, "--dry-run", "--", "--name", "two words") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (toy.folder / "out").exists()
    for line in lines:
        subprocess.run(["bash", "-c", line], env=os.environ | {"PYTHON": sys.executable}, check=True)
    by_hand = toy.calls
    assert sweep(*words, "--", "--name", "two words") == 0
    assert toy.calls[2:] == by_hand
    assert sweep("--output", toy.folder / "out", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "# finished: baseline_seed1",
        "# finished: coeff0.1_alpha1_seed1",
    ]


def test_parts_that_cannot_be_compared_are_left_out_by_name(
    toy: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.plan(
        {
            "coeff0.1_alpha1_seed1": {"loss": float("nan")},
            "coeff0.2_alpha1_seed1": {"settings": {"seed": "1234"}},
            "coeff0.3_alpha1_seed1": {"iterations": 100},
            "coeff0.4_alpha1_seed1": {"settings": {"lr": "0.001"}},
            "coeff0.6_alpha1_seed1": {"iterations": 0},
        }
    )
    output = toy.folder / "out"
    assert (
        sweep(toy.recipe, "--coeff", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, "--seeds", 1, "--output", output) == 0
    )
    gone, empty = (output / f"coeff{coeff}_alpha1_seed1" / "tensorboard" for coeff in (0.7, 0.6))
    shutil.rmtree(gone)
    assert sweep("--output", output, "--report") == 0
    summary = read_summary(output)
    named = {
        "coeff0.1_alpha1_seed1": ["loss is nan"],
        "coeff0.2_alpha1_seed1": ["seed 1234"],
        "coeff0.3_alpha1_seed1": ["iteration 100"],
        "coeff0.6_alpha1_seed1": [f"{empty} ", "'jump rate validation'"],
        "coeff0.7_alpha1_seed1": [f"{gone} ", "--tensorboard-dir"],
    }
    assert summary["left_out"].keys() == named.keys()
    assert all(what in summary["left_out"][run] for run, told in named.items() for what in told)
    assert summary["arguments_that_differ"] == {"lr": ["0.0006", "0.001"]}
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\blr .*0\.0006, 0\.001\b", said)


def test_the_picture_shows_the_means_of_all_settings_also_of_a_sweep_that_is_not_finished(
    toy: StandIn,
) -> None:
    losses = {("0.1", 1): 2.5, ("0.1", 2): 3.5, ("1", 1): 3.25}
    toy.plan(
        {f"baseline_seed{s}": {"loss": 3.0, "psi": PSI["baseline"]} for s in (1, 2)}
        | {
            f"coeff{coeff}_alpha1_seed{seed}": {"loss": loss, "psi": PSI["jreg"]}
            for (coeff, seed), loss in losses.items()
        }
        | {"coeff1_alpha1_seed2": {"status": 1}}
    )
    output = toy.folder / "out"
    assert sweep(toy.recipe, "--coeff", 0.1, 1, "--alpha", 1, 0.5, "--seeds", 1, 2, "--output", output) == 1
    results = Results.read(grid.Sweep.load(output))
    (loss, rate), layers = compose(results)

    def lines(panel: tuple[str, Chart], key: str = "y") -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for row in panel[1]["datasets"]["rows"]:
            found.setdefault(row["model"], []).extend([row[key]] if key in row else [])
        return found

    assert lines(loss)["α = 1"] == pytest.approx([0.0, 0.25])
    assert lines(loss, "seed") == {"baseline": [], "α = 0.5": [0] * 4, "α = 1": [-0.5, 0.5]}
    assert lines(rate)["α = 1"] == [0, 0]
    assert lines(rate)["baseline"] == pytest.approx([2.0, 2.0])
    assert [title.partition("α")[2] for title, _ in layers] == [" = 0.5", " = 1"]
    assert lines(layers[1])["λ = 0.1"] == pytest.approx([0.2, 0.02, 0.015])
    assert lines(layers[1])["baseline"] == pytest.approx([0.2, 0.01, 0.03])
    picture = (output / "sweep.svg").read_text()
    assert "toy, 200 iterations, last state before the final norm, 2 seeds" in picture
    assert "1 of 10 runs not finished" in picture


SLURM = {
    # Runs the tasks of the array at once, each on a node of its own, and waits for them.
    "sbatch": """#!/usr/bin/env bash
set -e
echo "$*" >> {folder}/sbatch_words
for word; do case $word in --array=*) array=${{word#*=}};; esac; done
while [[ $1 == -* ]]; do shift; done
for range in ${{array//,/ }}; do
    for task in $(seq ${{range%-*}} ${{range#*-}}); do
        SLURM_JOB_ID=$((100 + task)) SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NODELIST=x SLURM_JOB_NUM_NODES=1 \\
            bash "$@" >> {folder}/task_$task.log 2>&1 &
    done
done
wait
echo "Submitted batch job 100"
""",
    "srun": """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
""",
    "scontrol": """#!/usr/bin/env bash
case $1 in show) echo localhost;; requeue) echo "$2" >> {folder}/requeued;; esac
""",
}


@pytest.fixture
def slurm(toy: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The commands of a cluster on PATH. They really start their scripts."""
    programs = toy.folder / "bin"
    programs.mkdir()
    for name, text in SLURM.items():
        (programs / name).write_text(text.format(folder=toy.folder))
        (programs / name).chmod(0o755)
    shutil.copy(ROOT / "recipes" / "slurm.sh", toy.folder)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    return toy


def test_a_slurm_array_trains_one_run_a_task_and_draws_the_result(
    slurm: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = slurm.folder / "out"
    slurm.plan({"coeff0.1_alpha1_seed1": {"status": 75}})
    monkeypatch.setenv("TOKENS", "5000")
    words = (slurm.recipe, "--coeff", 0.1, "--seeds", 1, "--output", output, "--slurm")
    assert sweep(*words, "--slurm-options", "--time=60 --nodes=1") == 0
    assert "Submitted batch job 100" in capsys.readouterr().out
    called = (slurm.folder / "sbatch_words").read_text()
    assert "--array=0,1 " in called
    assert (
        called.index("--time=60 --nodes=1") < called.index("slurm.sh") < called.index("jreg_megatron.sweep")
    )
    assert sorted(slurm.started) == ["baseline_seed1", "coeff0.1_alpha1_seed1"]
    assert {call.tokens for call in slurm.calls} == {"5000"}
    assert {call.master for call in slurm.calls} == {"localhost"}
    # Run 1 has saved and ended early, so its task goes back to the queue. The other has drawn the results.
    assert (slurm.folder / "requeued").read_text() == "101\n"
    assert list(read_summary(output)["runs"]) == ["baseline_seed1"]
    slurm.plan({})
    assert sweep(*words) == 0
    assert "--array=1 " in (slurm.folder / "sbatch_words").read_text().splitlines()[1]
    assert slurm.started[2:] == ["coeff0.1_alpha1_seed1"]
    assert len(read_summary(output)["runs"]) == 2
    assert sweep(*words) == 0
    assert "nothing to submit" in capsys.readouterr().out


def test_slurm_without_sbatch_is_refused_in_one_line(
    slurm: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    words = (slurm.recipe, "--coeff", 1, "--output", slurm.folder / "out", "--slurm")
    assert sweep(*words, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("sbatch --array=0,1 ")
    assert sweep(*words) == 2
    told = capsys.readouterr().err
    assert all(named in told for named in ("--slurm ", "sbatch", "PATH"))
    assert not (slurm.folder / "out").exists()


@pytest.mark.parametrize("status", [2, 3])
def test_a_task_that_fails_ends_with_the_recipes_status(
    status: int, slurm: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.plan({"baseline_seed1": {"status": status}})
    words = (slurm.recipe, "--coeff", 1, "--seeds", 1, "--output", slurm.folder / "out")
    assert sweep(*words, "--only", 0) == status
    assert "no other run" not in capsys.readouterr().out
    assert sweep("--output", slurm.folder / "out", "--only", 1) == 0
    assert sweep("--output", slurm.folder / "out", "--only", 1) == 0
    assert slurm.started == ["baseline_seed1", "coeff1_alpha1_seed1"]


@pytest.mark.slow
def test_the_170m_recipe_is_swept_as_a_toy(tmp_path: Path) -> None:
    with start(
        *(ROOT / "recipes" / "llama_170m.sh", "--coeff", 0.3, "--alpha", 1, "--seeds", 5, "--smoke", 2),
        *("--output", tmp_path, "--", "--jreg-final-state", "post_norm"),
    ) as queue:
        output = queue.communicate(timeout=500)[0]
    assert queue.returncode == 0, output
    from harness import read_scalars

    summary = read_summary(tmp_path)
    assert (summary["iterations"], summary["final_state"], summary["left_out"]) == (2, "post_norm", {})
    assert summary["arguments_that_differ"] == {}
    assert len(summary["runs"]) == 2
    for name, run in summary["runs"].items():
        logged = read_scalars(tmp_path / name / "smoke" / "tensorboard")
        assert run["validation_loss"] == logged["lm loss validation"][-1]
        last, before = (logged[f"jreg/displacement_layer_{n:02d} validation"][-1] for n in (2, 1))
        assert run["jump_rate"] == pytest.approx(max(0, 100 * (last - before)), rel=1e-4, abs=1e-6)
    base, run = summary["runs"]["baseline_seed5"], summary["runs"]["coeff0.3_alpha1_seed5"]
    assert summary["settings"][0]["difference_to_baseline"]["mean"] == pytest.approx(
        run["validation_loss"] - base["validation_loss"]
    )
    assert run["validation_loss"] != base["validation_loss"]
