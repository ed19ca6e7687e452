"""The promises of ``make compare``: paired runs, the rule's numbers, one page, and to resume."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import read_scalars
from report_toy import BITS_PER_BYTE, Page, evaluation_of, write_events
from scipy import stats

from jreg_megatron.claims import experiment
from jreg_megatron.compare.__main__ import WORDS, main
from jreg_megatron.compare.ways import WAYS, Plan
from jreg_megatron.demo import training
from jreg_megatron.demo.training import Run
from jreg_megatron.paper.over_seeds import holm, p_two_sided

SEEDS = 4
STEPS = 400
NOISE = (0.0, 0.03, -0.01, 0.02)
EFFECT = {"jreg": 0.0, "slowqk": -0.05, "slowqk_gelu": -0.2, "let": -0.1, "periln": 2.0}
"""A method's change of the loss, besides a little noise of each seed."""


def test_holms_correction_is_as_worked_by_hand() -> None:
    # Sorted: 0.005 * 4, 0.01 * 3, then 0.03 * 2; 0.04 * 1 is not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_a_way_without_a_p_value_still_counts_among_the_tests() -> None:
    assert holm([None, 0.01, 0.5]) == [None, pytest.approx(0.03), 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("sign", [-1, 1])
def test_p_is_of_a_paired_two_sided_t_test(sign: int) -> None:
    values = [0.3 * sign, 1.1 * sign, -0.7, 0.2]
    assert p_two_sided(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert p_two_sided([0.1]) is None and p_two_sided([0.1, 0.1]) is None


def sizes(run: Run) -> dict[str, str]:
    return dict(zip(run.flags, run.flags[1:], strict=False))


def test_a_way_and_its_baseline_differ_by_the_method_alone(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    assert len(plan.runs) == len({run.name for _, _, run in plan.runs}) == 55
    for name, against in plan.against.items():
        way, base = plan.run(name, 3), plan.run(against, 3)
        assert (way.seed, way.iterations) == (base.seed, base.iterations) == (3, 1500)
        of_method = [word for word in way.flags[len(base.flags) - 1 :] if word.startswith("--")]
        prefix = f"--{name.partition('_')[0]}-"
        if name == "jreg":
            assert way.flags == base.flags and (way.coeff, way.alpha) == (1.0, 1.0)
            continue
        assert way.coeff == base.coeff == 0
        assert [word for word in base.flags if word not in way.flags] == []
        assert of_method and all(
            word.startswith((prefix, "--init-fan-in", "--log-timers")) for word in of_method
        )
    assert sizes(plan.run("slowqk", 1))["--slowqk-hold-iterations"] == "60"
    assert sizes(plan.run("let", 1))["--let-stop-iterations"] == "750"
    assert sizes(plan.run("let", 1))["--let-teacher"] == str(plan.teacher.exported)
    assert plan.teacher.seed not in {run.seed for _, _, run in plan.runs}


def test_gelu_blocks_have_as_many_weights_and_no_gate(tmp_path: Path) -> None:
    gated, gelu = (Plan(tmp_path).run(name, 1) for name in ("baseline", "baseline_gelu"))
    assert 3 * int(sizes(gated)["--ffn-hidden-size"]) == 2 * int(sizes(gelu)["--ffn-hidden-size"])
    assert "--swiglu" in gated.flags and "--swiglu" not in gelu.flags


def test_a_few_ways_come_with_their_baselines_and_the_teacher_only_where_it_is_needed(tmp_path: Path) -> None:
    plan = Plan(tmp_path, ways=["slowqk_gelu", "jreg"])
    assert plan.names == ["baseline", "jreg", "baseline_gelu", "slowqk_gelu"]
    assert plan.against == {"jreg": "baseline", "slowqk_gelu": "baseline_gelu"}
    assert not plan.needs_teacher and Plan(tmp_path).needs_teacher


def psi(last: float) -> list[float]:
    return [0.3, 0.02, 0.021, 0.022, 0.02, 0.02, 0.02, last]


def finish(
    run: Run, losses: Mapping[int, float], last: float, seconds: float, kept: Sequence[float] = ()
) -> None:
    """A finished training with numbers that a head can follow."""
    steps = range(25, STEPS + 1, 25)
    # Another process slows down every third interval.
    times = {step: seconds * (3 if step % 75 == 0 else 1) for step in steps}
    more: dict[str, Any] = {"iteration-time": times}
    more |= {
        f"attenuation/kept_layer_{n:02d} validation": {STEPS // 2: 0.5, STEPS: value}
        for n, value in enumerate(kept, 1)
    }
    settings = {"seed": run.seed, "jreg_coeff": run.coeff, "jreg_alpha": run.alpha, "train_iters": STEPS}
    settings |= {"global_batch_size": 8, "seq_length": 64}
    logged = {name: str(value) for name, value in settings.items()}
    write_events(run.tensorboard, losses, settings=logged, displacement=psi(last), jump_rate=1.0, more=more)
    run.checkpoints.mkdir()
    run.log.write_text(" > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 1000\n")
    run.finished_file.write_text(json.dumps(run.settings))


def evaluation(run: Run, off: float) -> dict[str, Any]:
    loss = [3.0 - 0.1 * layer + off for layer in range(9)]
    return evaluation_of(
        run.checkpoints,
        STEPS,
        {
            "speeches_last_word": {"value": 0.4 - off},
            "speeches_bits_per_byte": BITS_PER_BYTE | {"value": 2.0 + off},
        },
        read_out={"text": "speeches", "loss": loss},
        lens={"text": "speeches", "loss": [value + off for value in loss]},
    )


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """All runs and evaluations, finished."""
    plan = Plan(tmp_path / "out" / "runs", STEPS, SEEDS)
    (tmp_path / "out" / "evaluations").mkdir(parents=True)
    (tmp_path / "out" / "evaluations" / "words.json").write_text(json.dumps(WORDS))
    for name, seed, run in plan.runs:
        off = (
            EFFECT.get(name, 0.01) + NOISE[seed - 1] * (0.1 + 0.01 * len(name)) if WAYS[name].against else 0.0
        )
        early = 4.0 + (2 * off if name == "let" else off) + 0.1 * seed
        kept = [0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.7] if name == "attenuation_learned" else ()
        finish(
            run,
            {100: early, STEPS: 3.0 + off + 0.1 * seed},
            0.03 if name == "jreg" else 0.05,
            0.1 + off / 10,
            kept,
        )
        (run.folder / "evaluation.json").write_text(json.dumps(evaluation(run, off)))
    finish(plan.teacher, {STEPS: 4.0}, 0.04, 0.02)
    plan.teacher.exported.mkdir()
    return plan


def compare(tmp_path: Path, *words: str) -> dict[str, Any]:
    asked = ["--output", str(tmp_path / "out"), "--data", str(tmp_path), "--steps", str(STEPS)]
    main([*asked, "--seeds", str(SEEDS), *words])
    found: dict[str, Any] = json.loads((tmp_path / "out" / "compare.json").read_text())
    return found


@pytest.fixture(autouse=True)
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is not made, and a function that would start a process fails."""

    async def fails(what: str, *_: Any) -> None:
        raise AssertionError(f"{what} was started")

    monkeypatch.setattr("jreg_megatron.demo.data.prepare", lambda *_, **__: None)
    monkeypatch.setattr(training, "run_logged", fails)
    monkeypatch.setattr(experiment, "run_logged", fails)


def of(found: dict[str, Any], family: str, way: str) -> dict[str, Any]:
    numbers: dict[str, Any] = found["families"][family]["ways"][way]
    return numbers


def test_each_number_is_the_paired_difference_and_the_interval_and_p_are_scipys(
    plan: Plan, tmp_path: Path
) -> None:
    found = compare(tmp_path)
    near = lambda values: pytest.approx(list(values), abs=1e-5)  # noqa: E731
    noise = np.array(NOISE)
    gelu = -0.2 + noise * 0.21
    bits = of(found, "bits", "slowqk_gelu")
    assert list(bits["by_seed"].values()) == near(gelu) and bits["against"] == "baseline_gelu"
    assert bits["interval"] == near(stats.ttest_1samp(gelu, 0).confidence_interval(0.95))
    assert bits["p"] == pytest.approx(stats.ttest_1samp(gelu, 0).pvalue, rel=1e-3)
    assert bits["verdict"] == "lower" and bits["p"] < bits["p_adjusted"] < 0.05
    loss = [of(found, "loss", way) for way in plan.against]
    assert [way["p_adjusted"] for way in loss] == pytest.approx(holm([way["p"] for way in loss]))
    assert list(of(found, "loss", "slowqk")["by_seed"].values()) == near(-0.05 + noise * 0.16)
    assert list(of(found, "task", "slowqk")["by_seed"].values()) == near(-100 * (-0.05 + noise * 0.16))
    assert list(of(found, "early_exit", "slowqk")["by_seed"].values()) == near(-0.05 + noise * 0.16)
    assert list(of(found, "lens", "slowqk")["by_seed"].values()) == near(2 * (-0.05 + noise * 0.16))
    assert of(found, "jump", "jreg")["found"] == pytest.approx(-2.0, rel=1e-4)
    assert of(found, "profile", "jreg")["found"] == pytest.approx(0.0, abs=1e-4)
    # The intervals that another process slowed down do not count.
    assert list(of(found, "cost", "slowqk")["by_seed"].values()) == near(10 * 10 * (-0.05 + noise * 0.16))
    assert of(found, "jump", "slowqk")["verdict"] == "cannot tell"  # all differences are the same


def test_the_authors_results_are_tested_on_the_right_runs(plan: Plan, tmp_path: Path) -> None:
    found = compare(tmp_path, "--quiet")["published"]["questions"]
    by_seed = [list(question["by_seed"].values()) for question in found]
    noise = np.array(NOISE)
    near = lambda values: pytest.approx(list(values), abs=1e-5)  # noqa: E731
    assert by_seed[0] == near((-0.2 + noise * 0.21) - (-0.05 + noise * 0.16))
    assert by_seed[1] == near([(0.8 + 0.8 + 0.8 + 0.7) / 4 - 0.9] * SEEDS)
    assert by_seed[2] == near([0.7 - (4 * 0.9 + 3 * 0.8) / 7] * SEEDS)
    assert by_seed[3] == near(2 * (-0.1 + noise * 0.13))
    assert [question["verdict"] for question in found] == ["agrees"] * 4


def test_the_page_has_a_section_for_each_question(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(tmp_path)
    page = Page(tmp_path / "out" / "compare.html")
    assert page.sections == ["overview", *found["families"], "published", "how"]
    assert {
        "loss_nearer",
        "loss_in_training",
        "jump_in_training",
        "profiles",
        "kept",
        "lens_by_layer",
    } <= set(page.figures)
    overview = {row[0]: row for row in page.tables["Overview"]}
    assert overview["slow Q/K, GELU"][1].endswith(", better")
    assert len(overview) == 1 + len(plan.against)
    assert len(page.tables["All runs"]) == 1 + len(found["runs"]) == 2 + 11 * SEEDS
    text = (tmp_path / "out" / "compare.html").read_text()
    assert "Validation loss over training, without Peri-LN<" in text  # it would hide the others
    assert found["ways"]["slowqk"]["flags"] == "--slowqk-hold-iterations 16"
    assert found["ways"]["let"]["teacher"] == {
        "parameters": 1000,
        "tokens": STEPS * 512,
        "seconds": pytest.approx(0.02 * STEPS),
    }
    assert "slowqk_gelu" in capsys.readouterr().out


def test_a_toy_that_diverged_is_left_out_by_name_with_its_pair(plan: Plan, tmp_path: Path) -> None:
    run = plan.run("periln", 2)
    for file in run.tensorboard.iterdir():
        file.unlink()
    write_events(run.tensorboard, {100: 4.0, STEPS: math.nan}, displacement=psi(0.05))
    found = compare(tmp_path, "--quiet")
    assert list(of(found, "loss", "periln")["by_seed"]) == ["1", "3", "4"]
    assert list(of(found, "loss", "jreg")["by_seed"]) == ["1", "2", "3", "4"]
    assert found["notes"] == ["periln_seed2 is left out: it has diverged."]


def test_only_the_requested_ways_are_compared_and_corrected_for(plan: Plan, tmp_path: Path) -> None:
    found = compare(tmp_path, "--quiet", "--ways", "slowqk_gelu")
    assert list(found["families"]["loss"]["ways"]) == ["slowqk_gelu"]
    one = of(found, "loss", "slowqk_gelu")
    assert one["p"] == one["p_adjusted"]


def test_only_missing_parts_are_run(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    again = plan.run("lns", 2)

    async def notes(what: str, words: list[str], *_: Any) -> None:
        started.append(what)
        if "--json" in words:
            Path(words[words.index("--json") + 1]).write_text(json.dumps(evaluation(again, 0.0)))

    async def trains(self: Run, *_: Any) -> None:
        started.append(self.name)
        finish(self, {100: 4.0, STEPS: 3.0}, 0.05, 0.1)

    again.finished_file.unlink()
    plan.teacher.exported.rmdir()
    monkeypatch.setattr("jreg_megatron.demo.training.run_logged", notes)
    monkeypatch.setattr(experiment, "run_logged", notes)
    monkeypatch.setattr(Run, "train", trains)
    compare(tmp_path, "--quiet")
    assert started == ["exporting the teacher", "lns_seed2", f"evaluating {again.folder}"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--steps", "49"], "--steps is 49"),
        (["--ways", "jrge"], "invalid choice: 'jrge'"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(
    words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_of_what_trains_toys_and_recipes_comes_without_torch() -> None:
    code = (
        "import contextlib, runpy, sys\n"
        "for tool in ('claims', 'compare', 'demo', 'sft', 'sweep'):\n"
        "    sys.argv = [tool, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_module(f'jreg_megatron.{tool}', run_name='__main__')\n"
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n") and out.count("usage: ") == 5


@pytest.mark.slow
def test_ways_are_trained_evaluated_and_compared_also_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jreg_megatron.compare", "--ways", "jreg", "let", "--steps", "50"]
    command += ["--seeds", "1", "--output", str(out), "--data", str(tmp_path / "data"), "--quiet"]
    with subprocess.Popen(command) as cut_off:
        while not (out / "runs" / "baseline_seed1" / "finished.json").exists():
            assert cut_off.poll() is None
            time.sleep(0.1)
        cut_off.kill()

    def finished() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in out.rglob("finished.json")}

    before = finished()
    subprocess.run(command, check=True)
    whole = finished()
    assert before.keys() < whole.keys() and before.items() <= whole.items()
    subprocess.run(command, check=True)
    assert finished() == whole  # there was nothing left to train

    found = json.loads((out / "compare.json").read_text())
    assert len(found["runs"]) == len(whole) == 4 and found["notes"] == []
    ends = {
        way: read_scalars(out / "runs" / f"{way}_seed1" / "tensorboard")["lm loss validation"][-1]
        for way in ("baseline", "jreg", "let")
    }
    for way in ("jreg", "let"):
        assert of(found, "loss", way)["by_seed"] == {"1": pytest.approx(ends[way] - ends["baseline"])}
        for family in ("early_exit", "lens", "task", "bits"):
            assert of(found, family, way)["found"] is not None
    assert Page(out / "compare.html").sections == ["overview", *found["families"], "published", "how"]
