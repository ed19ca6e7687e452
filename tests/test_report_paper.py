"""The paper's profiles under measured ones, in the report."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_toy import PER_LAYER, Page, evaluation, measurement, refusal, write, write_events

from jreg_megatron.report.inputs import STATE_WORDS

DEPTHS = {"170m": 12, "1b": 16, "3.4b": 30}
# The ends of the printed profiles, in hundredths: for the baseline and for alpha 1.
ENDS = {
    "170m": ((25.63, 13.22), (26.36, 0.67)),
    "1b": ((25.00, 9.06), (28.04, 0.39)),
    "3.4b": ((27.30, 7.58), (27.58, 0.18)),
}


def chart(name: str) -> dict[str, Any]:
    """The specification of a figure on the page."""
    (text,) = re.findall(
        r'<script[^>]*id="figures"[^>]*>(.*?)</script>', Path("report.html").read_text(), re.S
    )
    spec: dict[str, Any] = json.loads(text)[name]["spec"]
    return spec


def lines_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The values of a chart by the label of their line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in spec["datasets"]["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found


def thin(spec: dict[str, Any]) -> list[str]:
    (labels,) = (param["value"] for param in spec["params"] if param["name"] == "thin")
    return list(labels)


def caption(name: str) -> str:
    text = Path("report.html").read_text()
    (found,) = re.findall(rf'<figure id="{name}".*?<figcaption>(.*?)</figcaption>', text, re.S)
    return html.unescape(found)


@pytest.mark.parametrize("size", DEPTHS)
@pytest.mark.parametrize("layers", [12, 30, 7])
def test_the_papers_profiles_lie_under_the_measured_ones_from_the_first_to_the_last_layer(
    report: Callable[..., Page], size: str, layers: int
) -> None:
    page = report(write(Path("m.json"), measurement(layers=layers)), "--paper", size)
    spec, depth = chart("displacement"), DEPTHS[size]
    labels = [f"the paper's {size.upper()}, {words}" for words in ("baseline", "λ 1, α 1")]
    assert thin(spec) == labels
    lines = lines_of(spec)
    assert list(lines) == [*labels, "baseline", "jreg"]  # those drawn first lie below
    for label, ends in zip(labels, ENDS[size], strict=True):
        rows = [row for row in lines[label] if row["first"] == "dropped"]
        assert len(rows) == depth and len(lines[label]) == 2 * depth
        assert {row["state"] for row in lines[label]} == {"pre_norm"}
        steps = [after["x"] - before["x"] for before, after in pairwise(rows)]
        assert steps == pytest.approx([(layers - 1) / (depth - 1)] * (depth - 1))
        assert [rows[at]["x"] for at in (0, -1)] == pytest.approx([1, layers])
        assert [rows[at]["y"] for at in (0, -1)] == pytest.approx([end / 100 for end in ends])
    said = caption("displacement")
    for named in (f"paper's {size.upper()}", f"{depth} layers", "2601.18302v1", "Tables 5 and 16"):
        assert named in said
    assert STATE_WORDS["pre_norm"] in said and f"no numbers {STATE_WORDS['post_norm']}" in said
    assert bool(re.search(rf"layer {depth} \D*{layers}[,.]", said)) == (depth != layers)
    table = dict(zip(page.column(PER_LAYER, "layer"), page.column(PER_LAYER, labels[1]), strict=True))
    assert float(table[f"{depth}, before the final norm"]) == pytest.approx(ENDS[size][1][1] / 100)
    assert float(table["1"]) == pytest.approx(ENDS[size][1][0] / 100)


def test_the_papers_profiles_lie_under_a_training_run_too(report: Callable[..., Page]) -> None:
    page = report(write_events(Path("run"), {100: 3.0}, layers=4), "--paper", "3.4B", "--figures", "figures")
    spec = chart("displacement_in_training")
    assert len(thin(spec)) == 2
    assert [row["x"] for row in lines_of(spec)["run"]] == [1, 2, 3, 4]
    assert max(row["x"] for row in spec["datasets"]["rows"]) == pytest.approx(4)
    column = page.column(f"{PER_LAYER} at the last validation", "the paper's 3.4B, baseline")
    assert len(column) == 30 and float(column[-1]) == pytest.approx(0.0758)
    # A picture without a page names its source, on as many lines as needed.
    picture = Path("figures/displacement_in_training.svg").read_text()
    assert "2601.18302v1" in picture and re.search(r"layer 30 \D*4\.", picture)


def test_without_the_flag_nothing_of_the_papers_is_there(report: Callable[..., Page]) -> None:
    report(write(Path("m.json"), measurement()))
    spec = chart("displacement")
    assert thin(spec) == [] and set(lines_of(spec)) == {"baseline", "jreg"}
    assert "the paper" not in caption("displacement")


def test_a_model_with_the_name_of_a_line_of_the_papers_gets_another_label(
    report: Callable[..., Page],
) -> None:
    name = "the paper's 170M, baseline"
    report(write(Path("m.json"), measurement((name, "jreg"))), "--paper", "170m")
    assert list(lines_of(chart("displacement")))[2] == f"{name} #2"


def test_the_paper_under_nothing_is_refused_in_one_line(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(report, capsys, write(Path("e.json"), evaluation()), "--paper", "1b")
    assert "--paper is 1b" in said


def test_the_difference_without_boolq_is_shown_where_it_was_computed(report: Callable[..., Page]) -> None:
    document = evaluation()
    document["comparison"]["without_boolq"] = {
        "difference": 0.004,
        "interval": [-0.003, 0.011],
        "p_value": 0.3,
    }
    page = report(write(Path("e.json"), document))
    table = page.table("jreg minus baseline")
    assert ["mean without BoolQ", "+0.00400"] in [row[:2] for row in table]
