"""The paper's tasks over training seeds: its test, the interval, the power, and refusals."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jreg_megatron.evaluate.__main__ import main
from jreg_megatron.paper import TASKS, numbers
from jreg_megatron.paper.over_seeds import Estimate, p_one_sided, power, seeds_needed
from jreg_megatron.runtime.errors import LINE_START

# Of JREG less its baseline, in percentage points, by seed: of the eight tasks, and of BoolQ.
EIGHT, BOOLQ = (0.9, -0.3, 0.45, 0.15, 0.6), (4.5, 0.9, -1.8, 7.2, 2.7)


def evaluation(seed: int, eight: float, boolq: float) -> dict[str, Any]:
    """A file of ``evaluate --json`` for the two models of a seed."""

    def task(model: int, name: str) -> dict[str, Any]:
        gain = boolq if name == "boolq" else eight
        value = 0.4 + 0.01 * TASKS.index(name) + 0.002 * seed + model * gain / 100
        return {"metric": "acc", "value": value, "interval": None, "samples": 500, "higher_is_better": True}

    models = [
        {
            **{"name": name, "source": f"seed{seed}/{name}", "kind": "megatron", "revision": None},
            **{"step": 100, "num_layers": 12, "tasks": {each: task(model, each) for each in TASKS}},
        }
        for model, name in enumerate(("baseline", "jreg"))
    ]
    return {
        **{"format": "jreg_megatron evaluation", "version": 1, "versions": {}, "limit": None},
        **{"models": models, "comparison": None},
    }


def write(folder: Path, documents: Sequence[dict[str, Any]]) -> list[str]:
    files = [folder / f"seed{number}.json" for number in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(json.dumps(document))
    return list(map(str, files))


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return [evaluation(seed, *gains) for seed, gains in enumerate(zip(EIGHT, BOOLQ, strict=True))]


def test_the_papers_test_is_shown_with_an_interval_and_its_power_with_and_without_boolq(
    documents: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = write(tmp_path, documents), (tmp_path / "out.json", tmp_path / "out.csv")
    main(["--seeds", *files, "--json", str(out[0]), "--csv", str(out[1])])
    found = json.loads(out[0].read_text())
    assert (found["format"], found["files"]) == ("jreg_megatron evaluation over seeds", files)
    assert (found["models"], found["limit"]) == (["baseline", "jreg"], None)
    nine = [(8 * eight + boolq) / 9 for eight, boolq in zip(EIGHT, BOOLQ, strict=True)]
    for name, differences in {"mean": nine, "mean_without_boolq": list(EIGHT)}.items():
        one_sided = stats.ttest_1samp(differences, 0, alternative="greater")
        interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        row = found["means"][name]
        assert row["differences"] == pytest.approx(differences)
        assert row["difference"] == pytest.approx(np.mean(differences))
        assert row["second"] - row["first"] == pytest.approx(row["difference"])
        assert row["sd"] == pytest.approx(np.std(differences, ddof=1))
        assert row["interval"] == pytest.approx([interval.low, interval.high])
        assert row["p_one_sided"] == pytest.approx(one_sided.pvalue)
    assert found["means"]["mean"]["first"] == pytest.approx(44.4)
    assert found["power"]["power"] == power(5, 0.41, 0.63)
    rows = list(csv.DictReader(out[1].open()))
    assert [float(row["value"]) for row in rows if row["figure"] == "low"] == [
        row["interval"][0] for row in found["means"].values()
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "33% of the time" in printed and "+0.41, one-sided p 0.034" in printed


def test_a_limit_is_named(
    documents: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--seeds", *write(tmp_path, [document | {"limit": 500} for document in documents])])
    assert "first 500 samples" in capsys.readouterr().out


def _drop_model(documents: list[dict[str, Any]]) -> None:
    del documents[1]["models"][1]


def _drop_task(documents: list[dict[str, Any]]) -> None:
    del documents[1]["models"][1]["tasks"]["swag"]


def _other_metric(documents: list[dict[str, Any]]) -> None:
    documents[1]["models"][1]["tasks"]["piqa"]["metric"] = "acc_norm"


def _fewer_samples(documents: list[dict[str, Any]]) -> None:
    documents[1]["models"][0]["tasks"]["race"]["samples"] = 499


def _limit(documents: list[dict[str, Any]]) -> None:
    documents[1]["limit"] = 100


def _turn_round(documents: list[dict[str, Any]]) -> None:
    documents[1]["models"].reverse()


def _copy(documents: list[dict[str, Any]]) -> None:
    documents[1] = copy.deepcopy(documents[0])


def _one_baseline(documents: list[dict[str, Any]]) -> None:
    documents[1]["models"][0] = documents[0]["models"][0]


def _one_seed(documents: list[dict[str, Any]]) -> None:
    del documents[1:]


def _measurement(documents: list[dict[str, Any]]) -> None:
    documents[1] = {"format": "something else"}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_drop_model, ("--seeds", "seed1.json")),
        (_drop_task, ("--seeds", "seed1.json", "jreg", "swag")),
        (_other_metric, ("--seeds", "piqa", "seed0.json", "seed1.json")),
        (_fewer_samples, ("--seeds", "race", "seed0.json", "seed1.json")),
        (_limit, ("--seeds", "--limit", "none", "100", "seed0.json", "seed1.json")),
        (_turn_round, ("--seeds", "baseline", "jreg", "seed0.json", "seed1.json")),
        (_copy, ("--seeds", "baseline", "seed0.json", "seed1.json")),
        (_one_baseline, ("--seeds", "baseline", "seed0.json", "seed1.json")),
        (_one_seed, ("--seeds",)),
        (_measurement, ("seed1.json",)),
    ],
)
def test_seeds_that_make_no_mean_are_one_line(
    documents: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[list[dict[str, Any]]], None],
    named: tuple[str, ...],
) -> None:
    spoil(documents)
    with pytest.raises(SystemExit) as ended:
        main(["--seeds", *write(tmp_path, documents)])
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert ended.value.code == 2 and printed.out == ""
    assert line.startswith(LINE_START) and not [word for word in named if word not in line]


def test_the_power_is_how_often_the_test_finds_a_true_difference() -> None:
    rng = np.random.default_rng(3)
    for n in (5, 10):
        drawn = rng.normal(0.41, 0.63, size=(40_000, n))
        p_values = stats.ttest_1samp(drawn, 0, axis=1, alternative="greater").pvalue
        assert power(n, 0.41, 0.63) == pytest.approx((p_values < 0.05).mean(), abs=0.008)
    assert power(10, 0.0, 0.63) == pytest.approx(0.05)


def test_the_papers_ten_seeds_had_60_percent_power_and_17_would_have_80() -> None:
    paper = numbers()["tasks"]["seeds"]
    # The sd is not printed. It follows from p, up to rounding.
    t_values = [stats.t.isf(p, 9) for p in (0.0335, 0.0345)]
    assert 0.405 * math.sqrt(10) / t_values[0] < paper["sd"] < 0.415 * math.sqrt(10) / t_values[1]
    assert power(10, paper["difference"], paper["sd"]) == pytest.approx(0.60, abs=0.005)
    assert seeds_needed(paper["difference"], paper["sd"]) == 17
    assert power(16, paper["difference"], paper["sd"]) < 0.8 <= power(17, paper["difference"], paper["sd"])


def test_one_seed_and_equal_differences_have_no_test() -> None:
    assert p_one_sided([0.4]) is None
    assert p_one_sided([0.4, 0.4, 0.4]) is None
    assert p_one_sided([-0.4, -0.5]) == pytest.approx(
        stats.ttest_1samp([-0.4, -0.5], 0, alternative="greater").pvalue
    )
    found = Estimate.of([0.4])
    assert found is not None and found.low is None
