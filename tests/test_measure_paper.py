"""``measure --paper``: the paper's models by its names, its text, its figure beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluate_toy import save_toy

from jreg_megatron.measure.__main__ import main
from jreg_megatron.measure.paper_models import LAMBADA, paper_models
from jreg_megatron.paper import numbers
from jreg_megatron.runtime.errors import LINE_START

STEPS = (0, 1000, 28000, 29000, 57000, 86000, 114000, 143000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A toy instead of two of the paper's models, and nothing instead of the others."""
    folder = save_toy(tmp_path / "toy", seed=0)
    for name in numbers()["hub"]:
        monkeypatch.setitem(numbers()["hub"], name, str(tmp_path / "nowhere"))
    for name in ("Llama-3.2-1B", "Pythia-1B"):
        monkeypatch.setitem(numbers()["hub"], name, str(folder))
    branches = [SimpleNamespace(name=name) for name in ("main", *(f"step{step}" for step in STEPS))]
    refs = SimpleNamespace(branches=branches)
    monkeypatch.setattr("huggingface_hub.list_repo_refs", lambda _: refs)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith(LINE_START)
    return line.removeprefix(LINE_START)


def test_a_model_that_the_paper_follows_over_training_is_taken_at_the_branches_nearest_to_its_shares(
    hub: Path,
) -> None:
    found = paper_models(["Pythia-1B", "Llama-3.2-1B"])
    steps = ("step29000", "step57000", "step86000", "step114000", "step143000", None)
    assert tuple(reference.revision for reference, _ in found) == steps
    assert [zeta for _, zeta in found] == [1.03, 2.79, 5.37, 10.4, 11.2, 20.6]


def test_the_papers_figure_is_shown_with_ours_and_models_that_cannot_be_loaded_are_left_out_by_name(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "passages.jsonl"
    text.write_text("".join(json.dumps({"text": f"A passage of some words, {n}."}) + "\n" for n in range(6)))
    output = tmp_path / "paper.json"
    main(["--paper", "Llama-3.2-1B", "Gemma-2B", "--text", str(text), "--json", str(output)])
    said = capsys.readouterr()
    assert "Gemma-2B is left out: " in said.err
    (model,) = json.loads(output.read_text())["models"]
    assert model["name"] == "Llama-3.2-1B"
    (row,) = (line.split() for line in said.out.splitlines() if "20.6" in line)
    ours = [f"{model['jump_rate'][state]:.2f}" for state in ("pre_norm", "post_norm")]
    assert [cell for cell in row if cell not in "│┃"] == ["Llama-3.2-1B", "20.6", *ours]


def test_missing_arguments_and_data_are_reported(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refusal(capsys, "--paper", "GPT-5")
    assert "--paper" in said and "GPT-5" in said and "Llama-3.2-1B" in said
    said = refusal(capsys)
    assert "MODEL" in said and "--paper" in said
    said = refusal(capsys, str(hub), "--paper")
    assert "MODEL" in said and str(hub) in said and "--paper" in said
    assert "--last-validation" in refusal(capsys, "--paper", "Llama-3.2-1B", "--last-validation")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    said = refusal(capsys, "--paper", "Llama-3.2-1B")
    assert LAMBADA in said and "no network" in said and "--text" in said
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    said = refusal(capsys, "--paper", "Gemma-2B", "--text", str(text))
    assert "--paper" in said and "--text" not in said, "the models are missing, not the texts"
