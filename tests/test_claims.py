"""The promises of ``make claims``: the rule's verdicts, the right number for each claim."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from report_toy import BITS_PER_BYTE, Page, evaluation_of, write_events
from scipy import stats

from jreg_megatron.claims import experiment
from jreg_megatron.claims.__main__ import main
from jreg_megatron.claims.evidence import evaluation_name, find, gather
from jreg_megatron.claims.rules import Claim, Question
from jreg_megatron.claims.toy import runs as toys_of
from jreg_megatron.demo.data import DemoData
from jreg_megatron.demo.training import Run, train_all
from jreg_megatron.paper import TASKS
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.programs import run_logged

SEEDS = (1, 2, 3, 4)
COMMON = {
    "weight_decay": "0.1",
    **{"seq_length": "64", "num_layers": "8", "hidden_size": "64", "lr": "0.006", "train_iters": "800"},
    **{"jreg_final_state": "pre_norm", "global_batch_size": "8"},
}


def question(values: Sequence[float], side: Any = "above", bar: float = 0.0) -> Question:
    return Question("", "", "", dict(enumerate(values)), side, bar)


@pytest.mark.parametrize("shift", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("side", ["above", "below"])
def test_a_verdict_is_where_the_95_percent_interval_over_seeds_lies(shift: float, side: str) -> None:
    values = [0.3 + shift, 1.1 + shift, -0.7 + shift, 0.2 + shift]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    above, below = interval.low > 0.1, interval.high < 0.1
    wanted = "cannot tell"
    if above or below:
        wanted = "agrees" if above == (side == "above") else "disagrees"
    assert question(values, side, 0.1).verdict == wanted


def test_fewer_than_three_seeds_decide_nothing() -> None:
    assert question([5.0, 5.1]).verdict == question([5.0]).verdict == question([]).verdict == "cannot tell"
    assert question([5.0, 5.1, 5.2]).verdict == "agrees"


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [("aa", "agrees"), ("ac", "cannot tell"), ("ad", "disagrees"), ("cd", "disagrees"), ("c", "cannot tell")],
)
def test_a_claim_agrees_only_if_all_of_its_questions_do(verdicts: str, wanted: str) -> None:
    values = {"a": [1.0, 1.1, 1.2], "d": [-1.0, -1.1, -1.2], "c": [1.0, -1.1, 0.2]}
    assert Claim("", tuple(question(values[letter]) for letter in verdicts)).verdict == wanted


def psi(last: float, before: float = 0.02, fifth: float = 0.02) -> list[float]:
    """Of eight layers."""
    return [0.3, 0.02, 0.021, 0.022, fifth, 0.02, before, last]


def write_run(
    folder: Path,
    profiles: Mapping[int, Sequence[float]],
    seed: int,
    coeff: float = 0.0,
    alpha: float = 1.0,
    **settings: str,
) -> Path:
    asked = {"seed": str(seed), "jreg_coeff": str(coeff), "jreg_alpha": str(alpha)}
    losses = dict.fromkeys(profiles, 3.0)
    write_events(folder / "tensorboard", losses, settings=COMMON | asked | settings, displacement=profiles)
    return folder


def baseline(seed: int, steps: int = 800) -> dict[int, list[float]]:
    """A jump that grows from seed/100 at a quarter to 3 + seed hundredths."""
    return {steps // 4: psi(0.02 + 0.0001 * seed), steps: psi(0.05 + 0.01 * seed)}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Finished trainings with numbers that a head can follow."""
    folder = tmp_path / "runs"
    for seed in SEEDS:
        write_run(folder / f"baseline_{seed}", baseline(seed), seed)
        write_run(folder / f"jreg_{seed}", {800: psi(0.0201)}, seed, 1.0)
    for seed in SEEDS[:3]:
        write_run(folder / f"half_{seed}", {800: psi(0.02)}, seed, 1.0, 0.5)
        bump = psi(0.03, 0.04 + 0.001 * seed)
        write_run(folder / f"sharp_{seed}", {800: bump}, seed, 1.0, 3.0)
        for batch in (16, 32):
            steps = 800 * 8 // batch
            rise = 0.05 + 0.01 * seed - 0.01 * math.log2(batch // 8)
            write_run(
                folder / f"batch{batch}_{seed}",
                {steps: psi(rise)},
                seed,
                global_batch_size=str(batch),
                train_iters=str(steps),
            )
    return folder


def evaluation(seed: int, jreg: bool, tasks: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A file of ``evaluate --json`` for one model; losses differ by hand-made amounts."""
    off = 0.1 + 0.01 * seed if jreg else 0.0
    loss = [3.0 - 0.1 * layer for layer in range(9)]
    read_out = [value - off * (1 + layer / 10) for layer, value in enumerate(loss[:-1])] + [loss[-1]]
    lens = [value + off / 10 for value in loss[:-1]] + [loss[-1]]
    drop = [2.2 + 1.0, *(2.2 + 0.1 + off / (9 - layer) for layer in range(2, 9))]
    scores: dict[str, Any] = {
        "speeches_last_word": {"value": 0.4 + off / 10},
        "speeches_bits_per_byte": BITS_PER_BYTE | {"value": 2.0 + off / 100},
    }
    if tasks is not None:
        scores = {task: {"value": value} for task, value in tasks.items()}
    return evaluation_of(
        "",
        800,
        scores,
        read_out={"text": "speeches", "loss": read_out},
        lens={"text": "speeches", "loss": lens},
        layer_drop={"loss": drop, "unchanged": 2.2},
    )


def judge(
    folder: Path, output: Path, evaluations: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The claims of finished trainings, whose evaluations are there already."""
    kept = output / "evaluations"
    kept.mkdir(parents=True)
    (kept / "words.json").write_text("[]")
    for name, found in (evaluations or {}).items():
        checkpoints = folder / name / "checkpoints"
        checkpoints.mkdir()
        found["models"][0]["source"] = str(checkpoints)
        (kept / evaluation_name(folder / name)).write_text(json.dumps(found))
    main(["--runs", str(folder), "--output", str(output)])
    found: dict[str, Any] = json.loads((output / "claims.json").read_text())
    return found


def by_seed(found: dict[str, Any], claim: str, question: int = 0) -> list[float]:
    return list(found["claims"][claim]["questions"][question]["by_seed"].values())


def of_both(tasks: Mapping[int, tuple[dict[str, float], dict[str, float]]] | None = None) -> dict[str, Any]:
    return {
        f"{name}_{seed}": evaluation(seed, side == 1, None if tasks is None else tasks[seed][side])
        for side, name in enumerate(("baseline", "jreg"))
        for seed in SEEDS
    }


def test_each_claim_has_the_number_that_its_runs_give(runs: Path, tmp_path: Path) -> None:
    found = judge(runs, tmp_path / "out", of_both())
    jumps = np.array([4.0, 5.0, 6.0, 7.0])  # Psi_8 - Psi_7 of the baselines, x 100
    off = np.array([0.11, 0.12, 0.13, 0.14])
    near = lambda values: pytest.approx(list(values), rel=1e-4)  # noqa: E731
    assert by_seed(found, "1") == near(jumps)
    assert by_seed(found, "2") == near(jumps - [0.01, 0.02, 0.03, 0.04])
    assert by_seed(found, "3") == near([1.0] * 3)  # one hundredth less for each doubling of the batch
    assert by_seed(found, "4") == near(0.01 - jumps / 5)
    assert by_seed(found, "4", 1) == near(-jumps[:3] / 5)
    assert by_seed(found, "4", 2) == near(-jumps[:3] / 5)  # the last layer turns less than the bump
    assert by_seed(found, "4", 3) == near([2.1 - 0.01, 2.2 - 0.01, 2.3 - 0.01])
    assert by_seed(found, "5") == near([0.0] * 4)
    assert by_seed(found, "5", 1) == near(-off * 1.25)  # the mean of layers 1 to 4
    assert by_seed(found, "5", 2) == near(-off * 1.6)
    assert by_seed(found, "5", 3) == near(off / 10)
    assert by_seed(found, "5", 4) == near(off * (1 / 7 + 1 / 6 + 1 / 5) / 3)
    assert by_seed(found, "6") == near(10 * off)
    assert by_seed(found, "6", 1) == near(off / 100)
    verdicts = [found["claims"][key]["verdict"] for key in "123456"]
    assert verdicts == ["agrees", "agrees", "agrees", "agrees", "disagrees", "disagrees"]
    first = found["claims"]["1"]
    interval = stats.ttest_1samp(jumps, 0).confidence_interval(0.95)
    assert first["found"] == pytest.approx(5.5) and first["interval"] == near(interval)
    one_sided = stats.ttest_1samp(jumps, 0, alternative="greater").pvalue
    assert first["questions"][0]["p_one_sided"] == pytest.approx(one_sided, rel=1e-3)
    assert "20.6 in Llama-3.2-1B" in first["paper"] and "7.24" in first["paper"]


def test_the_page_shows_each_claim_with_its_verdict_and_figures(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judge(runs, tmp_path / "out", of_both())
    page = Page(tmp_path / "out" / "claims.html")
    assert page.sections == ["verdicts", *(f"claim_{n}" for n in range(1, 7)), "how"]
    assert page.figures == ["growth", "steps", "profiles", "top", "early_exit", "layer_drop"]
    rows = page.tables["Verdicts"][1:]
    assert [(row[0], row[2]) for row in rows] == [(k, c["verdict"]) for k, c in found["claims"].items()]
    assert len(page.tables["All runs"]) == 1 + len(found["runs"])
    assert "disagrees" in capsys.readouterr().out


def test_the_papers_nine_tasks_are_judged_with_and_without_boolq(runs: Path, tmp_path: Path) -> None:
    tasks = {
        seed: (dict.fromkeys(TASKS, 0.5), {task: 0.5 + 0.09 * (task == "boolq") for task in TASKS})
        for seed in SEEDS
    }
    found = judge(runs, tmp_path / "out", of_both(tasks))
    assert by_seed(found, "6") == pytest.approx([1.0] * 4)
    assert by_seed(found, "6", 1) == pytest.approx([0.0] * 4)
    assert len(found["claims"]["6"]["questions"]) == 2
    power = stats.nct.sf(stats.t.ppf(0.95, 3), 3, 0.41 / 0.63 * 2)
    assert f"a power of {power:.0%}" in found["claims"]["6"]["remark"]


def test_a_claim_without_runs_is_not_decided(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_run(tmp_path / "runs" / f"baseline_{seed}", baseline(seed), seed)
    found = judge(tmp_path / "runs", tmp_path / "out")
    verdicts = [claim["verdict"] for claim in found["claims"].values()]
    assert verdicts == ["agrees", "agrees", *["cannot tell"] * 4]
    assert found["claims"]["3"]["found"] is None and found["claims"]["3"]["interval"] is None


def test_batches_on_other_numbers_of_tokens_do_not_count_as_equal(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_run(tmp_path / f"baseline_{seed}", baseline(seed), seed)
        more = {"global_batch_size": "16"}
        write_run(tmp_path / f"more_{seed}", {800: psi(0.09)}, seed, **more)
    assert gather(sorted(tmp_path.iterdir())).batches == {}


def test_a_run_that_is_not_finished_or_diverged_is_left_out_by_name(tmp_path: Path) -> None:
    for seed in SEEDS[:3]:
        write_run(tmp_path / f"baseline_{seed}", baseline(seed), seed)
    write_run(tmp_path / "early", {200: psi(0.05)}, 4)
    write_run(tmp_path / "lost", {200: psi(math.nan), 800: psi(0.05)}, 5)
    write_run(tmp_path / "samples", {200: psi(0.05)}, 7, train_iters="None", train_samples="6400")
    write_run(tmp_path / "stopped", {800: psi(0.05)}, 8, 1.0, jreg_stop_iteration="100")
    write_run(tmp_path / "sampled", {800: psi(0.05)}, 10, 1.0, jreg_token_share="0.25")
    write_run(tmp_path / "scaled", {800: psi(0.05)}, 11, lns_power="0.5", norms_measure_interval="10")
    write_run(tmp_path / "odd", {800: psi(0.05)}, 9, seq_length="many")
    write_run(tmp_path / "shallow", {800: psi(0.05)[-3:]}, 6)
    found = gather(sorted(tmp_path.iterdir()))
    assert [run.seed for run in found.runs] == [1, 2, 3]
    named = {
        "early": ["step 200 of 800"],
        "lost": ["diverged"],
        "samples": ["step 200 of 800"],
        "stopped": ["jreg_stop_iteration is 100;", " None"],
        "sampled": ["jreg_token_share is 0.25;", " 1.0"],
        "scaled": ["(lns_power)"],
        "odd": [f'{tmp_path / "odd"}: seq_length is "many"'],
        "shallow": ["3 layers;", " 4"],
    }
    why = {Path(place).name: why for place, why in found.left_out.items()}
    assert why.keys() == named.keys()
    assert all(what in why[run] for run, told in named.items() for what in told)


def test_runs_of_two_experiments_and_twins_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", baseline(1), 1)
    for name, value in {"lr": "0.001", "weight_decay": "0.2", "jreg_tokens": "unmasked"}.items():
        write_run(tmp_path / name, baseline(2), 2, **{name: value})
        with pytest.raises(UserError, match=rf"{name} is .* in .*a and {value} in .*{name}"):
            gather([tmp_path / "a", tmp_path / name])
    write_run(tmp_path / "short", {400: psi(0.02)}, 1, 1.0, train_iters="400")
    with pytest.raises(UserError, match=r"--runs: .*\b800\b.*short.*\b400\b"):
        gather([tmp_path / "a", tmp_path / "short"])
    with pytest.raises(UserError, match=r"--runs: .*lambda 0"):
        gather([tmp_path / "short"])
    write_run(tmp_path / "twin", baseline(1), 1)
    with pytest.raises(UserError, match=f"--runs: .*{tmp_path / 'twin'}"):
        gather([tmp_path / "a", tmp_path / "twin"])
    with pytest.raises(UserError, match=f"--runs: .*{tmp_path / 'nowhere'}"):
        gather([tmp_path / "nowhere"])


def test_runs_that_are_not_used_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", baseline(1), 1)
    write_run(tmp_path / "b", {800: psi(0.02)}, 1, 0.1)
    write_run(tmp_path / "c", {400: psi(0.02)}, 1, 1.0, global_batch_size="16", train_iters="400")
    found = gather([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert (found.pairs, found.batch) == ({}, 8)
    assert [note.split(" counts")[0] for note in found.notes[:2]] == [
        str(tmp_path / "b"),
        str(tmp_path / "c"),
    ]
    assert "Seeds 1 have no baseline" in found.notes[2]


def test_the_batch_with_most_pairs_is_judged(runs: Path) -> None:
    for seed in range(5, 15):
        write_run(runs / f"more_{seed}", {400: psi(0.05)}, seed, global_batch_size="16", train_iters="400")
    assert gather(find([runs])).batch == 8


def test_growth_takes_a_validation_near_a_quarter(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_run(tmp_path / "runs" / f"baseline_{seed}", {400: psi(0.03), 800: psi(0.05)}, seed)
    found = judge(tmp_path / "runs", tmp_path / "out")
    assert (by_seed(found, "2"), found["claims"]["2"]["verdict"]) == ([], "cannot tell")


def test_runs_are_found_once_and_a_recipes_smoke_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "one", baseline(1), 1)
    write_run(run / "smoke", baseline(1), 1)
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    assert find([tmp_path / "sweep", tmp_path / "link", run]) == [run]


def test_runs_of_one_name_keep_evaluations_of_their_own(tmp_path: Path) -> None:
    for seed in SEEDS[:3]:
        write_run(tmp_path / "runs" / f"seed{seed}" / "base", baseline(seed), seed)
        write_run(tmp_path / "runs" / f"seed{seed}" / "jreg", {800: psi(0.0201)}, seed, 1.0)
    names = {
        f"seed{seed}/{name}": evaluation(seed, name == "jreg")
        for seed in SEEDS[:3]
        for name in ("base", "jreg")
    }
    found = judge(tmp_path / "runs", tmp_path / "out", names)
    assert by_seed(found, "6") == pytest.approx([1.1, 1.2, 1.3])
    assert len(found["runs"]) == 6


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("step", 400, "has step 400, but"),
        ("source", "elsewhere", "has checkpoint "),
    ],
)
def test_an_evaluation_of_another_model_is_refused(
    key: str, value: Any, said: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(runs, tmp_path / "out", of_both())
    file = tmp_path / "out" / "evaluations" / evaluation_name(runs / "jreg_2")
    found = json.loads(file.read_text())
    found["models"][0][key] = value
    file.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        main(["--runs", str(runs), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert said in error and file.name in error


def test_an_evaluation_that_fails_half_way_leaves_nothing_that_counts(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in runs.iterdir():
        (folder / "checkpoints").mkdir()

    async def fails(what: str, words: list[str], log: Path, on_line: Any) -> None:
        Path(words[words.index("--json") + 1]).write_text(json.dumps(evaluation(1, False)))
        raise UserError("out of memory")

    monkeypatch.setattr(experiment, "run_logged", fails)
    with pytest.raises(SystemExit):
        main(["--runs", str(runs), "--output", str(tmp_path / "out")])
    assert [file.name for file in (tmp_path / "out" / "evaluations").glob("[!.]*.json")] == ["words.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "--seeds is 0; it must be a whole number >= 1"),
        (["--steps", "30"], "--steps is 30; it must be a whole number >= 32"),
        (["--steps", "50"], "--steps is 50; it must be a multiple of 4"),
        (["--runs", "empty", "--steps", "40"], "--steps is 40, but --runs trains nothing"),
        (["--runs", "empty", "--", "--taks", "paper"], "--taks"),
        (["--runs", "empty", "--", "--json", "x.json"], "names --json, which claims sets"),
        (["--jobs", "0"], "--jobs is 0; it must be a whole number >= 1"),
        (["--", "--tasks", "paper"], "--tasks paper after -- needs --runs"),
        (["--output", "file"], "--output is file/claims.html, "),
        (["--output", "full"], "--output is full, where claims.html is a folder; name another"),
        (["--output", "locked"], "--output is locked, where .lock is a folder; name another"),
        (["--runs", "empty"], "--runs names empty, which has no folder tensorboard"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    Path("full/claims.html").mkdir(parents=True)
    Path("locked/.lock").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_evaluations_with_other_words_are_not_mixed(runs: Path, tmp_path: Path) -> None:
    judge(runs, tmp_path / "out", of_both())
    with pytest.raises(SystemExit):
        main(["--runs", str(runs), "--output", str(tmp_path / "out"), "--", "--tasks", "paper"])


def test_the_toys_are_paired_and_see_equally_many_tokens(tmp_path: Path) -> None:
    toys = toys_of(tmp_path, steps=2000, seeds=10)
    pairs = {(run.seed, run.coeff, run.alpha) for run in toys if "batch8_" in run.name}
    assert {(seed, coeff, 1.0) for seed in range(1, 11) for coeff in (0.0, 1.0)} <= {
        (seed, coeff, alpha if coeff else 1.0) for seed, coeff, alpha in pairs
    }
    sizes = [dict(zip(run.flags, run.flags[1:], strict=False)) for run in toys]
    tokens = {
        run.iterations * int(size["--global-batch-size"]) for run, size in zip(toys, sizes, strict=True)
    }
    assert tokens == {16000}
    alphas = {run.alpha for run in toys if run.coeff and run.seed <= 3}
    assert alphas == {0.0, 0.1, 0.3, 0.5, 1.0, 3.0}
    assert len({run.name for run in toys}) == len(toys) == 41


class FakeRun(Run):
    """Trains nothing, and keeps count."""

    trained: ClassVar[list[str]] = []
    now: ClassVar[list[str]] = []
    most: ClassVar[int] = 0

    async def train(self, data: Any, on_iteration: Any) -> None:
        type(self).now.append(self.name)
        type(self).most = max(self.most, len(self.now))
        await asyncio.sleep(0.01)
        self.folder.mkdir()
        on_iteration(self.iterations)
        if self.name == "bad":
            raise UserError("the bad run ended")
        self.now.remove(self.name)
        self.trained.append(self.name)


@pytest.fixture
def fakes(tmp_path: Path) -> list[FakeRun]:
    FakeRun.trained, FakeRun.now, FakeRun.most = [], [], 0
    return [FakeRun(f"run{n}", 10, tmp_path / f"run{n}") for n in range(5)]


def train(runs: Sequence[Run]) -> None:
    data: Any = DemoData
    train_all(runs, data, 2, quiet=True)


def test_as_many_runs_as_asked_train_side_by_side_and_finished_ones_never_again(fakes: list[FakeRun]) -> None:
    fakes[1].folder.mkdir()  # begun, and killed
    (fakes[1].folder / "half").touch()
    train(fakes[:3])
    assert (sorted(FakeRun.trained), FakeRun.most) == (["run0", "run1", "run2"], 2)
    assert not (fakes[1].folder / "half").exists()
    train(fakes)
    assert sorted(FakeRun.trained) == ["run0", "run1", "run2", "run3", "run4"]


def test_a_failed_run_is_named_and_finished_ones_are_kept(fakes: list[FakeRun], tmp_path: Path) -> None:
    bad = FakeRun("bad", 10, tmp_path / "bad")
    with pytest.raises(UserError, match=r"\bbad\b"):
        train([fakes[0], fakes[1], bad, fakes[2]])
    assert {"run0", "run1"} <= set(FakeRun.trained)
    train(fakes[:2])
    assert len(FakeRun.trained) == len(set(FakeRun.trained))


def test_finished_runs_of_other_settings_are_refused_before_anything_trains(
    fakes: list[FakeRun], tmp_path: Path
) -> None:
    train(fakes[:1])
    longer = FakeRun("run0", 20, fakes[0].folder)
    with pytest.raises(UserError, match=r"\brun0\b"):
        train([fakes[1], longer])
    assert FakeRun.trained == ["run0"]


def test_a_bar_that_never_ends_its_line_is_read_too(tmp_path: Path) -> None:
    lines: list[str] = []
    prints = "for n in range(40000): print(f'{n} of many', end='\\r')\nprint('at last: é' * 1000, end='')"
    asyncio.run(run_logged("it", ["-c", prints], tmp_path / "log", lines.append))
    assert lines[-1] == "39999 of many" and len(lines) == 40000
    with pytest.raises(UserError, match=rf"status 3: why.*{tmp_path / 'log'}"):
        asyncio.run(run_logged("it", ["-c", "print('why'); exit(3)"], tmp_path / "log", lines.append))


@pytest.mark.slow
def test_toys_train_are_evaluated_and_judged_end_to_end(tmp_path: Path) -> None:
    words = [
        "--steps",
        "32",
        "--seeds",
        "1",
        "--output",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "data"),
    ]
    main(words)
    found = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert len(found["runs"]) == 9 and found["notes"] == []
    assert all(q["found"] is not None for key in "12456" for q in found["claims"][key]["questions"][:1])
