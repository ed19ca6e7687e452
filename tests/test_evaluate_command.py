"""The command ``jreg-megatron evaluate``: its files, its output and its refusals."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluate_toy import own_task, save_toy

from jreg_megatron.data.texts import training_speeches
from jreg_megatron.evaluate.__main__ import main
from jreg_megatron.paper import TASKS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    place = tmp_path_factory.mktemp("models")
    return str(save_toy(place / "first", seed=0)), str(save_toy(place / "second", seed=1))


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The single line on standard error with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("jreg_megatron: error: ")


def test_the_help_needs_neither_torch_nor_the_harness() -> None:
    code = "import sys, jreg_megatron.evaluate.__main__ as m; m.parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lm_eval", "scipy", "megatron"} & set(done.stdout.split())


def test_two_models_are_evaluated_compared_and_written(
    folders: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = training_speeches()[:40]  # all of them take long
    monkeypatch.setattr("jreg_megatron.evaluate.__main__.training_speeches", lambda: some)
    files = tmp_path / "all.json", tmp_path / "all.csv"
    fewer = ["--limit", "8", "--max-tokens", "32", "--lens"]
    main([*folders, *fewer, "--json", str(files[0]), "--csv", str(files[1])])
    found: dict[str, Any] = json.loads(files[0].read_text())
    assert (found["format"], found["version"]) == ("jreg_megatron evaluation", 1)
    for model, name in zip(found["models"], ("first", "second"), strict=True):
        assert (model["name"], model["kind"], model["num_layers"]) == (name, "hugging_face", 3)
        assert set(model["tasks"]) == {
            "speeches_continuation",
            "speeches_last_word",
            "speeches_bits_per_byte",
        }
        for task in model["tasks"].values():
            low, high = task["interval"]
            assert low <= task["value"] <= high and task["samples"] == 8
        assert [len(model["read_out"][key]) for key in ("loss", "accuracy", "agreement")] == [4, 4, 4]
        assert model["read_out"]["agreement"][-1] == 1
        assert len(model["layer_drop"]["loss"]) == 3
        assert model["lens"]["loss"][-1] == pytest.approx(model["read_out"]["loss"][-1])
        assert len(model["lens"]["loss"]) == 4 and model["lens"]["fit_tokens"] > 1000
        assert model["layer_drop"]["unchanged"] == pytest.approx(model["read_out"]["loss"][-1], rel=1e-6)
    a, b = found["models"]
    comparison = found["comparison"]
    assert comparison["models"] == ["first", "second"]
    for name, difference in comparison["tasks"].items():
        expected = b["tasks"][name]["value"] - a["tasks"][name]["value"]
        assert difference["difference"] == pytest.approx(expected)
        assert 0 < difference["p_value"] <= difference["p_adjusted"] <= 1
    assert comparison["overall"]["tasks"] == ["speeches_continuation", "speeches_last_word"]
    losses = zip(a["read_out"]["loss"], b["read_out"]["loss"], strict=True)
    assert comparison["read_out"]["difference"] == pytest.approx([second - first for first, second in losses])
    assert len(comparison["lens"]["p_adjusted"]) == 4

    rows = list(csv.DictReader(files[1].open()))
    values = [float(row["value"]) for row in rows if row["model"] == "second" and row["part"] == "layer_drop"]
    assert values == [*b["layer_drop"]["loss"], b["layer_drop"]["unchanged"]]
    assert {row["model"] for row in rows} == {"first", "second", "second - first"}
    printed = capsys.readouterr().out
    assert "speeches_continuation" in printed and "not a public benchmark" in printed
    assert "loss by lens" in printed and "Loss through the lens by layer" in printed


@pytest.fixture(scope="module")
def nine_tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of small tasks that have the names of the paper's, in place of the hub's."""
    place = tmp_path_factory.mktemp("nine")
    for number, name in enumerate(TASKS):
        own_task(place / name, start=9 * number, task=name)
    return str(place)


def test_the_papers_nine_tasks_have_their_mean_and_that_without_boolq(
    folders: tuple[str, str], nine_tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "all.json", tmp_path / "all.csv"
    options = ["--parts", "tasks", "--tasks", "paper,speeches_last_word", "--limit", "7"]
    options += ["--include-path", nine_tasks, "--json", str(files[0]), "--csv", str(files[1])]
    main([*folders, *options])
    found = json.loads(files[0].read_text())
    means = []
    for model in found["models"]:
        values = {name: model["tasks"][name]["value"] for name in TASKS}
        expected = {"mean": sum(values.values()) / 9}
        expected["mean_without_boolq"] = (sum(values.values()) - values["boolq"]) / 8
        assert model["paper_means"] == pytest.approx(expected)
        assert expected["mean"] != pytest.approx(expected["mean_without_boolq"])
        means.append(expected)
    comparison = found["comparison"]
    assert comparison["overall"]["tasks"] == list(TASKS)
    for block, key in (("overall", "mean"), ("without_boolq", "mean_without_boolq")):
        assert comparison[block]["difference"] == pytest.approx(means[1][key] - means[0][key])
    rows = [row for row in csv.DictReader(files[1].open()) if row["metric"] == "mean_without_boolq"]
    assert [row["model"] for row in rows] == ["first", "second", "second - first"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean of nine" in printed and "first 7 samples" in printed


def test_fewer_than_the_nine_tasks_have_no_mean_and_the_missing_ones_are_named(
    folders: tuple[str, str], nine_tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--tasks",
        ",".join(TASKS[2:]),
        "--include-path",
        nine_tasks,
        "--json",
        str(tmp_path / "a.json"),
    ]
    main([*folders, "--parts", "tasks", *options])
    found = json.loads((tmp_path / "a.json").read_text())
    assert [model["paper_means"] for model in found["models"]] == [None, None]
    assert found["comparison"]["without_boolq"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not run: arc_easy, boolq." in printed


def test_a_model_compared_with_itself_under_another_name_differs_by_nothing(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"a={folders[0]}", f"b={folders[0]}", "--limit", "6", "--parts", "tasks", "--json", "-", "--quiet"])
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["models"] == ["a", "b"]
    for found in [*comparison["tasks"].values(), comparison["overall"]]:
        assert (found["difference"], found["interval"], found["p_value"]) == (0, [0, 0], 1)


def test_quiet_says_nothing_and_one_model_has_no_comparison(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The state of the union is measured by its layers.")
    main(
        [
            folders[0],
            "--parts",
            "read-out",
            "--text",
            str(text),
            "--quiet",
            "--json",
            str(tmp_path / "a.json"),
        ]
    )
    assert capsys.readouterr() == ("", "")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["comparison"] is None and found["models"][0]["read_out"]["text"] == str(text)


def test_finished_results_are_written_when_a_later_model_fails(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_toy(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"junk")
    parts = ["--parts", "read-out", "--max-tokens", "16", "--quiet", "--json", tmp_path / "a.json"]
    assert "broken" in refusal(capsys, folders[0], broken, *parts)
    assert [model["name"] for model in json.loads((tmp_path / "a.json").read_text())["models"]] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "taks"], "--parts names 'taks'; the parts are tasks, read-out, layer-drop"),
        (["--parts", ""], "--parts is empty; the parts are tasks, read-out, layer-drop"),
        (["--tasks", ","], "--tasks is empty"),
        (["--max-tokens", "1"], "--max-tokens is 1; it must be at least 2, or 0"),
        (["--limit", "0"], "--limit is 0; it must be >= 1"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--speeches", "1800-Nobody-1"], "--speeches is 1800-Nobody-1, which does not exist"),
        (["--json", "/nowhere/a.json"], "--json is /nowhere/a.json"),
        (["--device", "cuda:77"], "--device is cuda:77"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refusal(capsys, folders[0], *arguments)


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist" in refusal(capsys, tmp_path / "nowhere")


def test_a_text_too_short_to_predict_is_one_line(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a")
    said = refusal(capsys, folders[0], "--parts", "read-out", "--text", text, "--quiet")
    assert "--text" in said


def test_a_missing_harness_is_one_line_that_says_how_to_install_it(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refusal(capsys, folders[0])
    assert "lm_eval" in said and "pip install jreg_megatron[analysis]" in said


def test_three_models_are_evaluated_without_a_comparison(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [*folders, f"third={folders[0]}"]
    main([*models, "--parts", "read-out", "--max-tokens", "16", "--speeches", "1799-Adams-1", "--json", "-"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [model["name"] for model in found["models"]] == ["first", "second", "third"]
    assert found["comparison"] is None
    assert "two models" in printed.err
