"""The numbers that ``jreg_megatron.report`` joins, and its remarks if their conditions differ."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_toy import (
    HEADLINE,
    LAYERS,
    PER_LAYER,
    Page,
    evaluation,
    measurement,
    summary,
    write,
    write_events,
)


def keep_first_token(document: dict[str, Any]) -> dict[str, Any]:
    """A measurement of a user who chose the figures with the first token."""
    for model in document["models"]:
        model["first_token"] = "kept"
    return document


def captions() -> str:
    """All that the page says outside of its scripts."""
    return Path("report.html").read_text().partition("<script")[0]


def unlike(what: str) -> dict[str, Any]:
    """A later part of the series ``run``, measured under one other condition."""
    document = measurement(("run",), (300, 400))
    if what == "first token":
        return keep_first_token(document)
    if what == "dtype":
        for model in document["models"]:
            model["dtype"] = "bfloat16"
    else:
        document["text"] |= {"source": "other.jsonl"} if what == "text" else {"max_tokens": 4096}
    return document


@pytest.mark.parametrize(
    ("what", "labels"),
    [
        ("first token", ["run (first token dropped)", "run (first token kept)"]),
        ("dtype", ["run (dtype float32)", "run (dtype bfloat16)"]),
        ("text", ["run (text source speeches 1862-Lincoln-1)", "run (text source other.jsonl)"]),
        ("max_tokens", ["run (text max tokens 512)", "run (text max tokens 4096)"]),
    ],
)
def test_measurements_under_other_conditions_are_a_separate_series_that_says_so(
    report: Callable[..., Page], what: str, labels: list[str]
) -> None:
    page = report(
        write(Path("a.json"), measurement(("run",), (100, 200))), write(Path("b.json"), unlike(what))
    )
    assert page.column(HEADLINE, "model") == labels
    assert page.column(HEADLINE, "step") == ["200", "400"]


def test_all_tables_use_one_convention_for_the_first_token_and_name_it(report: Callable[..., Page]) -> None:
    dropped, kept = measurement(("d",), (1, 2)), keep_first_token(measurement(("k",), (1, 2)))
    page = report(write(Path("d.json"), dropped), write(Path("k.json"), kept))
    (caption,) = (caption for caption in page.tables if caption.startswith(HEADLINE))
    assert "first token of each text kept" in caption
    assert caption.count("dropped") == 0
    block = dropped["models"][1]["with_first_token"]
    rate, last = block["jump_rate"]["pre_norm"], block["displacement"]["pre_norm"][-1]
    assert page.column(HEADLINE, "ζ before the final norm")[0] == f"{rate:#.4g}"
    assert page.column(PER_LAYER, "d")[-2] == f"{last:#.4g}"
    assert page.column("Jump rate ζ at each step", "d, before the final norm")[-1] == f"{rate:#.4g}"
    assert page.column("Displacement Ψ by layer and step", "step 2")[-2] == f"{last:#.4g}"
    numbers = [name for name in page.tables if name.startswith((PER_LAYER, "Jump rate", "Displacement"))]
    assert len(numbers) == 3 and all("first token kept" in name for name in numbers)


def test_pictures_without_a_page_name_the_convention(report: Callable[..., Page]) -> None:
    path = write(Path("m.json"), keep_first_token(measurement(("k",), (1, 2), layers=3)))
    report(path, "--figures", "f")
    pictures = [svg.read_text() for svg in Path("f").glob("*.svg")]
    assert len(pictures) == 6 and all("First token of each text kept." in text for text in pictures)


def test_scores_of_other_metrics_or_samples_are_in_rows_of_their_own(report: Callable[..., Page]) -> None:
    document = evaluation(("one", "two", "three"))
    document["models"][1]["tasks"]["boolq"] |= {"metric": "acc_norm", "samples": 10}
    page = report(write(Path("e.json"), document))
    rows = [row for row in page.table("Tasks")[1:] if row[0] == "boolq"]
    assert [row[:4] for row in rows] == [
        ["boolq", "acc", "higher", "2,376"],
        ["boolq", "acc_norm", "higher", "10"],
    ]
    assert [[cell == "–" for cell in row[4:]] for row in rows] == [[False, True, False], [True, False, True]]
    assert page.column("Tasks", "task").count("piqa") == 1


def test_the_text_and_the_limits_of_an_evaluation_are_named(report: Callable[..., Page]) -> None:
    document = evaluation(("one",)) | {"limit": 10, "max_tokens": None}
    page = report(write(Path("e.json"), document))
    (how,) = page.column("Files", "how")
    assert how == "read-out text held-out speeches; read-out tokens 20,000; limit 10; max tokens none"


def test_a_figure_over_other_texts_says_that_they_differ(report: Callable[..., Page]) -> None:
    document = evaluation()
    report(write(Path("e.json"), document))
    assert "the texts differ" not in captions()
    document["models"][1]["read_out"] |= {"text": "tiny.txt", "tokens": 30}
    report(write(Path("e.json"), document))
    said = "the texts differ: baseline: held-out speeches, 20,000 tokens; jreg: tiny.txt, 30 tokens."
    assert captions().count(said) == 6  # three read-outs, the lens, the divergence and the layers left out
    report(Path("e.json"), "--figures", "f")
    pictures = [svg.stem for svg in Path("f").glob("*.svg") if "different texts" in svg.read_text()]
    assert sorted(pictures) == [
        *("depth_kl", "early_exit_accuracy", "early_exit_agreement", "layer_drop", "lens_loss"),
        "read_out_loss",
    ]
    other = measurement(("other",), layers=3)
    other["text"]["source"] = "tiny.txt"
    first = write(Path("m.json"), measurement(("a",), layers=3))
    report(first)
    assert "read different texts" not in captions()
    report(first, write(Path("n.json"), other))
    assert captions().count("read different texts") == 1


def with_depth(document: dict[str, Any]) -> dict[str, Any]:
    """With void layers: 0.1 without the first token, 0.2 with it."""
    for model in document["models"]:
        for block, share in {"without_first_token": 0.1, "with_first_token": 0.2}.items():
            model[block]["void_share"] = {"pre_norm": [share] * model["num_layers"]}
    return document


def test_a_figure_of_depth_says_how_its_models_were_measured_and_draws_them_in_the_same_way(
    report: Callable[..., Page],
) -> None:
    """What a caption says is known by what changes it."""

    def caption(share: float, folder: str, *steps: int, max_tokens: int | None = None, **of_b: Any) -> str:
        """The figure's, for model ``a``, and for ``b`` with the first token if it has steps."""
        files = [write(Path("a.json"), with_depth(measurement(("a",), layers=3)))]
        if steps:
            other = keep_first_token(with_depth(measurement(("b",), steps, layers=3, **of_b)))
            other["text"] |= {} if max_tokens is None else {"max_tokens": max_tokens}
            files.append(write(Path("b.json"), other))
        page = report(*files, "--figures", folder)
        labels = "ab"[: len(files)]
        assert [page.column("Void layers", label) for label in labels] == [[f"{share:.4f}"] * 3] * len(files)
        (said,) = re.findall(
            r'<figure id="depth_voids".*?<figcaption>(.*?)</figcaption>', captions(), re.DOTALL
        )
        return str(said)

    dropped, kept = caption(0.1, "dropped"), caption(0.2, "kept", 2)
    unlike = caption(0.2, "unlike", 2, max_tokens=12)
    last = caption(0.2, "last", 1, 2)
    assert len({dropped, kept, unlike, last}) == 4
    assert caption(0.2, "bare", 2, without_norm=("b",)) == kept, "the figure is before the final norm"
    pictures = [svg.stem for svg in Path("kept").glob("*.svg") if svg.read_text() != same(svg, "unlike")]
    assert sorted(pictures) == ["depth_voids", "displacement_post_norm", "displacement_pre_norm"]


def same(picture: Path, folder: str) -> str:
    """The picture of this name in another folder."""
    return Path(folder, picture.name).read_text()


def test_a_run_of_another_experiment_does_not_join_a_model_of_its_name(report: Callable[..., Page]) -> None:
    page = report(
        write(Path("m.json"), measurement(("baseline",), (100,), 4, source="expA/{}/checkpoints")),
        write_events(Path("expB/baseline/tensorboard"), {100: 5.0, 20_000: 2.0}),
    )
    assert page.column(HEADLINE, "model") == ["baseline (expA/baseline)", "baseline (expB/baseline)"]
    assert page.column(HEADLINE, "validation loss") == ["–", "2.0000"]


@pytest.mark.parametrize(
    ("source", "folder", "settings"),
    [
        ("x/{}/checkpoints", "x/baseline/tensorboard", {}),
        ("x/{}", "x/baseline/tensorboard", {}),
        ("x/{}/checkpoints/iter_0000200", "x/baseline", {}),
        ("elsewhere/ckpt", "x/baseline/tensorboard", {"save": "elsewhere/ckpt"}),
    ],
)
def test_a_run_joins_the_checkpoints_in_its_folder_and_those_that_it_saved(
    report: Callable[..., Page], source: str, folder: str, settings: dict[str, str]
) -> None:
    page = report(
        write(Path("m.json"), measurement(("baseline",), (200,), 4, source=source)),
        write_events(Path(folder), {100: 5.0, 200: 2.0}, settings=settings),
    )
    assert page.column(HEADLINE, "model") == ["baseline"]
    assert page.column(HEADLINE, "validation loss") == ["2.0000"]


def test_a_run_of_a_summary_joins_the_checkpoints_below_its_folder(report: Callable[..., Page]) -> None:
    files = [write(Path("m.json"), measurement(("jreg",), (800,), 8, source="demo/{}/checkpoints"))]
    for name in ("demo", "other"):
        Path(name).mkdir()
        files.append(write(Path(name) / "summary.json", summary(("jreg",))))
    assert report(*files[:2]).column(HEADLINE, "model") == ["jreg"]
    assert len(report(files[0], files[2]).column(HEADLINE, "model")) == 2


def test_a_value_of_another_step_than_its_row_names_the_step(report: Callable[..., Page]) -> None:
    path = write(Path("m.json"), measurement(("run",), (100,), 4, source="{}/checkpoints"))
    later = write_events(Path("run/tensorboard"), {150: 5.0, 20_000: 2.0})
    page = report(path, later)
    assert page.column(HEADLINE, "step") == ["100"]
    assert page.column(HEADLINE, "validation loss") == ["2.0000 (step 20,000)"]
    write_events(Path("run/tensorboard"), {100: 6.0})
    assert report(path, later).column(HEADLINE, "validation loss") == ["6.0000"]


def test_the_step_of_a_row_is_that_of_its_measurement(report: Callable[..., Page]) -> None:
    page = report(
        write(Path("m.json"), measurement(("a",), (100, 400))), write(Path("e.json"), evaluation(("a",)))
    )
    assert page.column(HEADLINE, "model") == ["a"] and page.column(HEADLINE, "step") == ["400"]


def test_stages_of_one_training_are_series_of_their_own(report: Callable[..., Page]) -> None:
    first, second = (measurement(("olmo",), steps) for steps in ((1000, 928_646), (2000, 11_931)))
    for document, stage in ((first, "stage1"), (second, "stage2-ingredient1")):
        for model in document["models"]:
            model |= {"revision": f"{stage}-step{model['step']}-tokens5B", "kind": "hugging_face"}
            model["source"] = "allenai/OLMo"
    first["models"] += second["models"]
    page = report(write(Path("m.json"), first))
    assert page.column(HEADLINE, "model") == ["olmo (stage1)", "olmo (stage2-ingredient1)"]
    assert page.column(HEADLINE, "step") == ["928,646", "11,931"]
    names = [f"olmo ({stage}), before the final norm" for stage in ("stage1", "stage2-ingredient1")]
    columns = [page.column("Jump rate ζ at each step", name) for name in names]
    assert [[cell == "–" for cell in column] for column in columns] == [
        [False, True, True, False],
        [True, False, False, True],
    ]


def test_settings_differ_only_if_their_values_do(report: Callable[..., Page]) -> None:
    document = measurement()
    for index, model in enumerate(document["models"]):
        model["settings"] = {
            **{"a_nan": ("nan", "NaN")[index], "big": str(2**60 + index), "same": ("3", "3.0")[index]},
            **{"tiny": ("1e-08", "0.00000001")[index], "word": "x"},
        }
    page = report(write(Path("m.json"), document))
    assert page.column("Settings that differ", "setting") == ["big"]


def test_rounding_hides_neither_a_threshold_nor_a_difference(report: Callable[..., Page]) -> None:
    document = evaluation()
    for model, loss in zip(document["models"], (0.99996, 1.00004), strict=True):
        model["read_out"]["loss"][-1] = loss
    compared = document["comparison"]
    for task, p_value in zip(compared["tasks"], (0.04996, 0.0499999, 0.05, 0.0123456), strict=True):
        compared["tasks"][task] |= {"p_value": p_value, "p_adjusted": p_value}
    page = report(write(Path("e.json"), document))
    last = page.table("Next-token loss at each layer")[-1]
    assert last == [str(LAYERS), "0.99996", "1.0000"]
    differences = "jreg minus baseline"
    shown = ["0.04996", "0.0499999", "0.0500", "0.0123"]
    assert page.column(differences, "p") == [*shown, "< 0.001"]
    assert page.column(differences, "p, adjusted") == [*shown, "–"]


def test_a_displacement_that_is_no_number_is_left_out_and_the_page_written(
    report: Callable[..., Page],
) -> None:
    for bad in (float("nan"), float("inf")):
        folder = write_events(Path(f"{bad}/run"), {10: 5.0}, displacement=[0.1, 0.2, bad, bad])
        page = report(folder, "--figures", "f")
        assert page.column(f"{PER_LAYER} at the last validation", "run") == ["0.1000", "0.2000", "–", "–"]
        assert "last Ψ before the final norm" not in page.table(HEADLINE)[0]
        data = Path("report.html").read_text().partition('id="figures">')[2].partition("</script>")[0]
        rows = json.loads(data)["displacement_in_training"]["spec"]["datasets"]["rows"]
        assert [row["x"] for row in rows] == [1, 2]
