"""The promises of ``jreg_megatron.report`` about its input, its numbers and its files."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_toy import (
    HEADLINE,
    LAYERS,
    MODELS,
    PER_LAYER,
    STEPS,
    TASKS,
    Page,
    evaluation,
    measurement,
    psi,
    refusal,
    summary,
    write,
    write_events,
)

from jreg_megatron.report.inputs import STATE_WORDS


def test_every_kind_of_input_has_its_part_of_the_page(report: Callable[..., Page]) -> None:
    page = report(
        write(Path("m.json"), measurement(steps=STEPS)),
        write(Path("e.json"), evaluation()),
        write(Path("summary.json"), summary(("short", "short with jreg"))),
        write_events(Path("big run/tensorboard"), {100: 3.0, 200: 2.5}),
    )
    assert page.sections == [
        *("summary", "layers", "training", "maps", "middle", "depth", "tasks", "settings", "sources")
    ]
    assert page.figures == [
        *(
            "displacement",
            "displacement_in_training",
            "jump_rate",
            "jump_rate_in_training",
            "validation_loss",
        ),
        *(
            "heat_map_1",
            "heat_map_2",
            "read_out_loss",
            "lens_loss",
            "early_exit_accuracy",
            "early_exit_agreement",
        ),
        *("layer_drop", "read_out_difference", "depth_kl"),
    ]
    assert page.column(HEADLINE, "model") == [*MODELS, "short", "short with jreg", "big run"]
    assert page.column("Files", "what") == ["measurement", "evaluation", "training run", "training run"]


@pytest.mark.parametrize(
    ("document", "sections", "figures"),
    [
        (measurement(), {"layers"}, {"displacement"}),
        (summary(), {"layers", "training"}, {"validation_loss"}),
        (evaluation(), {"middle", "depth", "tasks"}, {"read_out_loss", "layer_drop"}),
    ],
    ids=["measurement", "summary", "evaluation"],
)
def test_a_part_without_numbers_is_not_on_the_page(
    report: Callable[..., Page], document: dict[str, Any], sections: set[str], figures: set[str]
) -> None:
    page = report(write(Path("input.json"), document))
    assert set(page.sections) - {"summary", "settings", "sources"} == sections
    assert figures <= set(page.figures)
    assert all(len(rows) > 1 for rows in page.tables.values())


def test_a_model_with_nothing_but_scores_has_no_empty_parts(report: Callable[..., Page]) -> None:
    document = evaluation(("a", "b"))
    for model in document["models"]:
        del model["read_out"], model["lens"], model["layer_drop"], model["depth"]
    document["comparison"] = None
    page = report(write(Path("e.json"), document))
    assert page.sections == ["summary", "tasks", "sources"]
    assert page.figures == []
    assert page.table(HEADLINE)[0] == ["model", "layers L"]


def test_the_tables_hold_the_numbers_of_the_files(report: Callable[..., Page]) -> None:
    document = measurement()
    page = report(
        write(Path("m.json"), document),
        write(Path("e.json"), evaluation()),
        write(Path("summary.json"), summary(("x", "y"))),
    )
    first = document["models"][0]
    before = first["displacement"]["pre_norm"]
    assert float(page.column(HEADLINE, "ζ before the final norm")[0]) == pytest.approx(
        first["jump_rate"]["pre_norm"], rel=1e-3
    )
    assert float(page.column(HEADLINE, "ζ after it")[0]) == pytest.approx(
        first["jump_rate"]["post_norm"], rel=1e-3
    )
    assert page.column(HEADLINE, "λ") == ["0", "0.1", "0", "0.1"]
    assert page.column(HEADLINE, "validation loss") == ["–", "–", "5.5000", "5.5000"]
    assert page.column(f"{PER_LAYER},", "layer") == [
        *map(str, range(1, LAYERS)),
        *(f"{LAYERS}, {when} the final norm" for when in ("before", "after")),
    ]
    cells = [float(cell) for cell in page.column(f"{PER_LAYER},", "baseline")]
    assert cells == pytest.approx([*before, first["displacement"]["post_norm"][-1]], rel=1e-3)
    assert page.column("Tasks; intervals in brackets", "jreg")[0] == "0.5300 (0.5100 to 0.5500)"
    differences = "jreg minus baseline, on the same samples"
    assert page.column(differences, "task") == [*TASKS, "mean of tasks"]
    assert page.column(differences, "95% interval")[-1] == "+0.00400 to +0.0180"
    assert page.column(differences, "p") == ["0.0800"] * len(TASKS) + ["< 0.001"]
    assert page.column("Validation loss, nats per token", "step") == [f"{step:,}" for step in STEPS]
    kl = page.column("How far each layer's prediction", "jreg")
    assert [float(cell) for cell in kl] == pytest.approx(evaluation()["models"][1]["depth"]["kl"], rel=1e-3)


def test_each_metric_of_depth_has_a_figure_and_its_numbers_in_a_table(report: Callable[..., Page]) -> None:
    measured, evaluated = measurement(MODELS[:1]), evaluation(MODELS[:1])
    ends = (f"{part}_{what}" for part in ("attention", "mlp", "layer") for what in ("ratio", "cosine"))
    for place, name in enumerate(("void_share", *ends)):
        values = [
            None,
            *(
                (layer - place) / 90 if "cosine" in name else (layer + place) / 90
                for layer in range(2, LAYERS + 1)
            ),
        ]
        measured["models"][0]["without_first_token"][name] = {"pre_norm": values}
    for name in ("matrix_entropy", "curvature"):
        values = [layer / 50 for layer in range(LAYERS + 1)]
        measured["models"][0]["without_first_token"][name] = {"pre_norm": values, "post_norm": values}
    places = range(LAYERS + 1)
    evaluated["models"][0]["depth"] |= {
        "top5_overlap": [layer / LAYERS for layer in places],
        "cosine_to_token": [0.5 for _ in places],
        "cosine_to_next_token": [layer / 40 for layer in places],
        "skip": {
            "later_mean": [
                [None if later <= skipped else 0.1 * later for later in range(LAYERS)]
                for skipped in range(LAYERS)
            ],
            "output_mean": [layer / 100 for layer in places[1:]],
        },
    }
    page = report(write(Path("m.json"), measured), write(Path("e.json"), evaluated))
    assert [figure for figure in page.figures if figure.startswith("depth")] == [
        *("depth_voids", "depth_contributions", "depth_cosines", "depth_entropy", "depth_curvature"),
        *("depth_kl", "depth_top5", "depth_alignment", "depth_skipping"),
    ]
    added = page.table("How much attention and MLP add")
    assert added[0] == ["layer", "baseline, attention", "baseline, MLP", "baseline, both"]
    assert [float(cell) for cell in added[2][1:]] == pytest.approx([3 / 90, 5 / 90, 7 / 90], rel=1e-3)
    assert page.table("How many directions")[1] == ["0", "0.000"]
    assert float(page.table("Where states begin")[-1][1]) == pytest.approx(LAYERS / 40 - 0.5, rel=1e-3)
    skipped = page.table("Change without one layer")
    assert float(skipped[-2][2]) == pytest.approx(0.1 * (LAYERS - 1), rel=1e-3)
    assert float(skipped[1][2]) == pytest.approx(0.1 * sum(range(1, LAYERS)) / (LAYERS - 1), rel=1e-3)
    assert (skipped[-1][0], float(skipped[-1][1])) == (str(LAYERS), LAYERS / 100)


def test_numbers_of_depth_that_rounding_took_beyond_their_range_are_shown(
    report: Callable[..., Page],
) -> None:
    measured, evaluated, more = measurement(MODELS[:1]), evaluation(MODELS[:1]), 1 + 3e-7
    ranges = {"void_share": 1, "mlp_cosine": -1, "matrix_entropy": 1, "curvature": math.pi / 2}
    for name, most in ranges.items():
        values = [most * more] * (LAYERS + (name in ("matrix_entropy", "curvature")))
        measured["models"][0]["without_first_token"][name] = {"pre_norm": values}
    turned = {"cosine_to_token": [more] * (LAYERS + 1), "cosine_to_next_token": [-more] * (LAYERS + 1)}
    evaluated["models"][0]["depth"] |= turned | {"skip": skip(output=math.sqrt(2) * more)}
    page = report(write(Path("m.json"), measured), write(Path("e.json"), evaluated))
    assert page.column("How sharply", "baseline")[-1] == "1.571"
    assert page.column("Where states begin", "baseline")[-1] == "-2.000"


def test_settings_that_differ_are_in_a_table_of_their_own(report: Callable[..., Page]) -> None:
    document = measurement()
    document["models"][1]["settings"] |= {"jreg_alpha": "3", "seed": "7"}
    page = report(write(Path("m.json"), document))
    assert page.column("Settings that differ", "setting") == ["jreg_coeff"]
    assert page.column("All settings", "setting") == ["jreg_alpha", "jreg_coeff", "lr", "seed"]
    assert page.column("All settings", "baseline") == ["3.0", "0.0", "0.0006", "–"]


def test_a_measurement_and_an_evaluation_of_one_source_are_one_model(report: Callable[..., Page]) -> None:
    page = report(write(Path("m.json"), measurement()), write(Path("e.json"), evaluation()))
    assert page.column(HEADLINE, "model") == list(MODELS)


def test_a_run_belongs_to_the_model_with_its_name_in_the_same_folder(report: Callable[..., Page]) -> None:
    page = report(
        write(Path("m.json"), measurement(("baseline",), (200,), 4, source="{}/checkpoints")),
        write_events(Path("baseline/tensorboard"), {100: 3.0, 200: 2.5}),
        write_events(Path("jreg/tensorboard"), {100: 3.1, 200: 2.6}),
    )
    assert page.column(HEADLINE, "model") == ["baseline", "jreg"]
    assert page.column(HEADLINE, "validation loss") == ["2.5000", "2.6000"]


def test_two_inputs_with_one_name_get_different_names(report: Callable[..., Page]) -> None:
    page = report(
        write(Path("m.json"), measurement(("model",), source="a/model")),
        write(Path("n.json"), measurement(("model",), source="b/model")),
        write_events(Path("east/run/tensorboard"), {100: 3.0}),
        write_events(Path("west/run/tensorboard"), {100: 3.0}),
    )
    assert page.column(HEADLINE, "model") == [
        *("model (a/model)", "model (b/model)"),
        *("run (east/run)", "run (west/run)"),
    ]


def test_one_source_measured_twice_gets_the_names_of_its_files(report: Callable[..., Page]) -> None:
    for folder in ("one", "two"):
        Path(folder).mkdir()
    page = report(
        write(Path("one/m.json"), measurement(("model",))), write(Path("two/m.json"), measurement(("model",)))
    )
    assert page.column(HEADLINE, "model") == ["model (one/m.json)", "model (two/m.json)"]


def test_an_input_given_twice_counts_once(report: Callable[..., Page]) -> None:
    path = write(Path("m.json"), measurement())
    assert report(path, path.resolve()).column(HEADLINE, "model") == list(MODELS)


def test_steps_in_several_files_are_one_series(report: Callable[..., Page]) -> None:
    files = [write(Path(f"{step}.json"), measurement(("a",), (step,))) for step in (900, 100, 500)]
    page = report(*files)
    assert page.column("Jump rate ζ at each step", "step") == ["100", "500", "900"]
    assert page.column(HEADLINE, "step") == ["900"]


def test_checkpoints_of_one_name_that_were_evaluated_are_compared_by_their_step(
    report: Callable[..., Page],
) -> None:
    document = evaluation(("a", "a"))
    for model, step in zip(document["models"], (100, 200), strict=True):
        model["step"] = step
    compared = document["comparison"]
    compared["models"] = ["a@100", "a@200"]
    compared["notes"] = ["Too few <samples>."]
    compared["tasks"]["boolq"] |= {"p_adjusted": 0.16}
    compared["read_out"]["p_value"][3] = compared["read_out"]["interval"][3] = None
    page = report(write(Path("m.json"), measurement(("a",), (100, 200))), write(Path("e.json"), document))
    assert page.column(HEADLINE, "model") == ["a (step 200)", "a (step 100)"]
    assert page.column("a (step 200) minus a (step 100), on the same samples", "p, adjusted") == [
        *("–", "0.160", "–", "–", "–")
    ]
    assert page.column("Difference in loss after each layer", "p")[2:5] == ["0.0400", "–", "0.0400"]
    assert "<li>Too few &lt;samples&gt;.</li>" in Path("report.html").read_text()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "m.json", measurement(steps=(1, 2)))
    write(tmp_path / "summary.json", summary())
    pages = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "jreg_megatron.report", "m.json", "summary.json"]
        command += ["--quiet", "--output", seed]
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == done.stderr == ""
        pages.append((tmp_path / seed).read_bytes())
    assert pages[0] == pages[1]


def test_help_needs_no_heavy_package(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from jreg_megatron.report.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print([p for p in ('torch', 'jinja2', 'vl_convert') if p in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_figures_are_written_as_svg_and_png_on_white(report: Callable[..., Page]) -> None:
    from PIL import Image

    page = report(write(Path("m.json"), measurement(steps=STEPS)), "--figures", "a/b", "--title", "T")
    files = {path.name for path in Path("a/b").iterdir()}
    stems = {f"{name}_{state}" for name in page.figures for state in ("pre_norm", "post_norm")}
    assert files == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    assert {name.rsplit("_", 2)[0] for name in stems} == {
        "displacement",
        "jump_rate",
        "heat_map_1",
        "heat_map_2",
    }
    for path in Path("a/b").glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.find("{http://www.w3.org/2000/svg}rect").get("fill") == "white"  # type: ignore[union-attr]
    for path in Path("a/b").glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 1400 and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    pictures = [Path(f"a/b/displacement_{state}.svg").read_bytes() for state in ("pre_norm", "post_norm")]
    assert pictures[0] != pictures[1]


def test_an_axis_of_few_layers_names_each_once(report: Callable[..., Page]) -> None:
    report(write(Path("m.json"), measurement(layers=3)), "--figures", "f")
    labels = re.findall(r">(\d)</text>", Path("f/displacement_pre_norm.svg").read_text())
    assert labels[:3] == ["1", "2", "3"] and labels.count("2") == 1


@pytest.mark.parametrize("without_norm", [("jreg",), ("baseline", "jreg")])
def test_a_model_without_a_final_norm_has_no_numbers_after_it(
    report: Callable[..., Page], without_norm: tuple[str, ...]
) -> None:
    document = measurement(steps=STEPS[-2:], without_norm=without_norm)
    page = report(write(Path("m.json"), document), "--figures", "a")
    some = len(without_norm) == 1
    head = page.table(HEADLINE)[0]
    for column in ("ζ after it", "last Ψ after it"):
        if some:
            first, second = page.column(HEADLINE, column)
            assert (first, second) != ("–", "–") and second == "–"
        else:
            assert column not in head
    last = document["models"][-1]["displacement"]["pre_norm"][-1]
    assert float(page.column(HEADLINE, "last Ψ before the final norm")[1]) == pytest.approx(last, rel=1e-3)
    cells = page.column(PER_LAYER, "jreg")
    assert float(cells[LAYERS - 1]) == pytest.approx(last, rel=1e-3) and cells[LAYERS:] == ["–"] * some
    assert not any("jreg, after" in column for column in page.table("Jump rate ζ at each step")[0])
    text = Path("report.html").read_text()
    # In the captions of the displacement, the jump rate and each such model's map.
    assert text.count("No final norm") == 2 + len(without_norm)
    assert Path("a/heat_map_1_post_norm.svg").exists() == some
    assert not Path("a/heat_map_2_post_norm.svg").exists()


def test_the_pictures_do_not_depend_on_those_before_them(report: Callable[..., Page]) -> None:
    path = write(Path("m.json"), measurement(("a",), (1, 2), layers=3))
    drawn = []
    for folder in ("one", "two"):
        report(path, "--figures", folder)
        drawn.append(
            {p.name: p.read_bytes() for p in Path(folder).iterdir()} | {"": Path("report.html").read_bytes()}
        )
    assert drawn[0] == drawn[1]


def test_a_run_that_diverged_is_shown_as_far_as_it_went(report: Callable[..., Page]) -> None:
    page = report(write_events(Path("run"), {100: 3.0, 200: float("nan")}))
    assert page.column(HEADLINE, "validation loss") == ["not finite"]
    assert page.column("Validation loss, nats per token", "run") == ["3.0000", "not finite"]


def test_a_run_without_a_named_state_is_in_no_column(
    report: Callable[..., Page],
) -> None:
    page = report(
        write_events(Path("bridge"), {100: 3.0}, settings={"jreg_final_state": ""}),
        write_events(Path("post"), {100: 3.0}, settings={"jreg_final_state": "post_norm"}),
    )
    assert "ζ before the final norm" not in page.table(HEADLINE)[0]
    assert page.column(HEADLINE, "ζ after it") == ["–", "0.1000"]
    unknown, known = page.column("Files", "how")
    of_unknown, of_known = STATE_WORDS[None], STATE_WORDS["post_norm"]
    assert unknown.endswith(of_unknown) and known.endswith(of_known) and not known.endswith(of_unknown)
    text = Path("report.html").read_text()
    assert f"{of_unknown} in bridge" in text and f"{of_known} in post" in text


def test_a_missing_interval_is_not_invented(report: Callable[..., Page]) -> None:
    document = evaluation()
    document["comparison"]["read_out"]["interval"][5] = None
    page = report(write(Path("e.json"), document))
    row = page.table("Difference in loss after each layer")[6]
    assert row[0] == "5" and row[1] != "–" and row[2:4] == ["–", "–"]


def test_a_model_of_one_layer_and_one_that_does_not_turn_are_shown(report: Callable[..., Page]) -> None:
    document = measurement(("still",))
    for block in (document["models"][0]["without_first_token"], document["models"][0]["with_first_token"]):
        for values in block["displacement"].values():
            values[1:] = [0.0] * (LAYERS - 1)
    page = report(write(Path("m.json"), document), write(Path("n.json"), measurement(("one",), layers=1)))
    assert page.column(HEADLINE, "ζ before the final norm")[1] == "–"
    assert page.column(HEADLINE, "last Ψ after it")[0] == "0.000"


MAKE = {"measurement": measurement, "evaluation": evaluation, "summary": summary}
BLOCK, AT = "models.0.without_first_token", "models[0].without_first_token"
PSI = f"{BLOCK}.displacement.pre_norm"
BOOLQ, USE = "models.0.tasks.boolq", "models.0.depth"


def skip(later: Any = None, output: float = 0.1) -> dict[str, Any]:
    usual = [[None] * layer + [0.1] * (LAYERS - layer) for layer in range(1, LAYERS + 1)]
    return {"later_mean": usual if later is None else later, "output_mean": [output] * LAYERS}


# Document, place, value, and message.
WRONG: list[tuple[str, str, Any, str]] = [
    ("measurement", f"{PSI}.3", float("nan"), f"{AT}.displacement.pre_norm[3]"),
    ("measurement", f"{BLOCK}.jump_rate.post_norm", float("inf"), f"{AT}.jump_rate.post_norm"),
    ("measurement", f"{BLOCK}.displacement.post_norm.0", -0.1, "must be greater than or equal to 0"),
    ("measurement", f"{BLOCK}.displacement_std.pre_norm.0", 1.5, "displacement_std.pre_norm[0]"),
    ("measurement", f"{PSI}.0", "0.1", 'pre_norm[0] is "0.1"'),
    ("measurement", f"{PSI}.0", True, "pre_norm[0] is true"),
    ("measurement", f"{PSI}.0", 10**400, "pre_norm[0] is a number too large"),
    ("measurement", PSI, [0.1] * 31, "must be a list of 30 numbers"),
    ("measurement", PSI, {}, "displacement.pre_norm is an object"),
    ("measurement", f"{BLOCK}.displacement", None, f"{AT}.displacement is null"),
    ("measurement", f"{BLOCK}.jump_rate.post_norm", None, "an object with jump_rate.post_norm"),
    ("measurement", BLOCK, None, "object with without_first_token"),
    ("measurement", "models.0.with_first_token", None, "models[0].with_first_token is null"),
    ("measurement", "models.0.with_first_token.displacement.pre_norm.1", 7, "with_first_token."),
    ("measurement", "models.0.num_layers", 0, "num_layers is 0; it must be"),
    ("measurement", "models.0.num_layers", 29.5, "num_layers is 29.5"),
    ("measurement", "models.0.step", "100", 'models[0].step is "100"'),
    ("measurement", "models.0.name", 7, "models[0].name is 7; it must be a text"),
    ("measurement", "models.0.kind", "onnx", 'kind is "onnx"; it must be'),
    ("measurement", "models", [], "models is a list of 0; it must be"),
    ("measurement", "version", 2, "version is 2; it must be 1;"),
    ("measurement", "models.0.settings.a b", [], 'models[0].settings["a b"] is a list'),
    (
        "measurement",
        f"{BLOCK}.void_share",
        {"pre_norm": [1.7] * 30},
        "void_share.pre_norm[0] is 1.7; it must",
    ),
    ("measurement", f"{BLOCK}.void_share", {"pre_norm": [0.1] * 31}, "must be a list of 30 numbers"),
    ("measurement", f"{BLOCK}.mlp_ratio", {"pre_norm": [-0.1] * 30}, "mlp_ratio.pre_norm[0] is -0.1"),
    ("measurement", f"{BLOCK}.layer_cosine", {"pre_norm": [-5.0] * 30}, "must be a number from -1 to 1"),
    ("measurement", f"{BLOCK}.matrix_entropy", {"post_norm": [99] * 31}, "must be a number from 0 to 1"),
    ("measurement", f"{BLOCK}.curvature", {"pre_norm": [1.6] * 31}, "must be a number from 0 to 1.5708"),
    ("evaluation", f"{USE}.cosine_to_token", [7] * 31, "depth.cosine_to_token[0] is 7; it must be a number"),
    ("evaluation", f"{USE}.cosine_to_next_token", [-1.1] * 31, "cosine_to_next_token[0] is -1.1"),
    ("evaluation", f"{USE}.skip", skip(later=[[0.1] * 30] * 30), "entry 1 has 1 null and then 29 numbers"),
    ("evaluation", f"{USE}.skip", skip(later=[[None] * 29] * 30), "entry 1 has 1 null and then 29 numbers"),
    ("evaluation", f"{USE}.skip", skip(later=[[]] * 29), "skip.later_mean is a list of 29; it must be"),
    (
        "evaluation",
        f"{USE}.skip",
        skip(output=1.5),
        "output_mean[0] is 1.5; it must be a number from 0 to 1.41",
    ),
    ("evaluation", f"{BOOLQ}.interval", [2, 1], "boolq.interval is a list of 2"),
    ("evaluation", f"{BOOLQ}.value", None, "models[0].tasks.boolq.value is null"),
    ("evaluation", f"{BOOLQ}.value", float("inf"), "boolq.value is Infinity"),
    ("evaluation", "models.0.read_out.loss", [1.0] * 30, "read_out.loss is a list of 30"),
    ("evaluation", "comparison.overall.p_value", 1.5, "comparison.overall.p_value is 1.5"),
    ("evaluation", "comparison.read_out.p_value", [0.5], "comparison.read_out.p_value is a list of 1"),
    ("evaluation", "comparison.models", ["a"], "comparison.models[1] is missing"),
    ("evaluation", "models.0.layer_drop.loss.2", -1, "layer_drop.loss[2] is -1"),
    ("summary", "runs.jreg.history.1.validation_loss", float("nan"), "runs.jreg.history[1].validation"),
    ("summary", "final_state", "middle", 'final_state is "middle"; it must be'),
    ("summary", "runs.jreg.history", [], "history is a list of 0; it must be"),
]


@pytest.mark.parametrize(("kind", "place", "value", "said"), WRONG)
def test_a_wrong_value_is_named_with_its_file_and_field(
    report: Callable[..., Page],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    place: str,
    value: Any,
    said: str,
) -> None:
    document = copy.deepcopy(MAKE[kind]())
    at: Any = document
    *above, last = [int(key) if key.isdecimal() else key for key in place.split(".")]
    for key in above:
        at = at[key]
    at[last] = value
    Path("report.html").write_text("of yesterday")
    line = refusal(report, capsys, write(Path("wrong.json"), document))
    assert "wrong.json: " in line and said in line
    assert Path("report.html").read_text() == "of yesterday"
    assert sorted(path.name for path in Path().iterdir()) == ["report.html", "wrong.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "JSON"),
        (b'{"format": "jreg_megatron measurement"', "JSON"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"[" * 200_000, "JSON"),
        (b"1" * 5000, "JSON"),
        (b"[]", "list"),
        (b'"text"', '"text"'),
        (b"{}", "--json"),
        (b'{"format": "jreg_megatron measurement"}', "version"),
        (b'{"format": ["jreg_megatron measurement"]}', "--json"),
        (b'{"runs": []}', "--json"),
    ],
)
def test_a_file_of_unknown_format_is_refused_in_one_line(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    Path("x.json").write_bytes(content)
    line = refusal(report, capsys, "x.json")
    assert "x.json" in line and said in line


def test_places_without_input_are_refused_in_one_line(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("events.out.tfevents.1").touch()
    Path("broken").mkdir()
    Path("broken/events.out.tfevents.1").write_bytes(b"no event at all" * 20)
    for place in ("no such\nfile", "empty", "events.out.tfevents.1", "broken"):
        assert place.replace("\n", "\\n") in refusal(report, capsys, place)
    good = write(Path("m.json"), measurement())
    for flag, place in {"--output": "empty", "--figures": "m.json"}.items():
        line = refusal(report, capsys, good, flag, place)
        assert flag in line and place in line
    assert not Path("report.html").exists()


def test_a_folder_of_the_demo_is_read_as_its_summary(report: Callable[..., Page]) -> None:
    Path("demo").mkdir()
    write(Path("demo/summary.json"), summary())
    assert report("demo").column(HEADLINE, "model") == list(MODELS)


def test_the_tool_prints_only_the_path_of_the_page(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(Path("m.json"), measurement())
    report(path)
    assert capsys.readouterr().out == "Page: report.html\n"
    report(path, "--quiet")
    assert capsys.readouterr().out == ""
    assert psi(0, 1)[-1] > psi(1, 1)[-1] and json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize("given", ["own.json", "./sub/../own.json", "link.json"])
def test_an_output_that_is_an_input_is_refused(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str], given: str
) -> None:
    Path("sub").mkdir()
    path = write(Path("own.json"), measurement())
    Path("link.json").symlink_to(path)
    content = path.read_bytes()
    line = refusal(report, capsys, path, "--output", given)
    assert "--output" in line and given in line
    assert path.read_bytes() == content


def test_an_output_within_an_input_folder_is_refused(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("demo").mkdir()
    path = write(Path("demo/summary.json"), summary())
    events = next(write_events(Path("run"), {1: 3.0}).iterdir())
    for folder, file in {"demo": path, "run": events}.items():
        content = file.read_bytes()
        line = refusal(report, capsys, folder, "--output", file)
        assert "--output" in line and str(file) in line
        assert file.read_bytes() == content
    report("demo", "run", "--figures", "demo")
    assert path.is_file() and len(list(Path("demo").glob("*.svg"))) == 3


def test_a_page_on_standard_output_is_nothing_but_the_page(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(Path("m.json"), measurement())
    report(path)
    page = Path("report.html").read_text()
    capsys.readouterr()
    report(path, "--output", "-")
    assert capsys.readouterr().out == page


def test_an_interruption_ends_in_one_line_without_a_page(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jreg_megatron.report.page.render", interrupted)
    with pytest.raises(SystemExit) as stop:
        report(write(Path("m.json"), measurement()))
    assert stop.value.code == 130
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.split("\n")) == 3, (
        "a line, below what the terminal shows of ^C"
    )
    assert sorted(path.name for path in Path().iterdir()) == ["m.json"]


def test_names_that_the_system_cannot_open_are_refused_in_one_line(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    long, good = "n" * 300, write(Path("m.json"), measurement())
    Path("loop").symlink_to("loop")
    Path("folder/events.out.tfevents.1").mkdir(parents=True)
    for place, why in {long: os.strerror(errno.ENAMETOOLONG), "loop": os.strerror(errno.ELOOP)}.items():
        line = refusal(report, capsys, place)
        assert place[:20] in line and why in line
    assert "folder" in refusal(report, capsys, "folder")
    for flag in ("--output", "--figures"):
        assert flag in refusal(report, capsys, good, flag, long)


def test_a_folder_with_a_pictures_name_is_refused_before_the_page_is_written(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f/displacement_post_norm.png").mkdir(parents=True)
    line = refusal(report, capsys, write(Path("m.json"), measurement(layers=3)), "--figures", "f")
    assert "f/displacement_post_norm.png" in line and os.strerror(errno.EISDIR) in line
    assert not Path("report.html").exists()


@pytest.mark.parametrize("content", [b"", b"no event at all" * 300])
def test_event_files_without_events_are_called_damaged_or_empty(
    report: Callable[..., Page], capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    Path("run").mkdir()
    Path("run/events.out.tfevents.1").write_bytes(content)
    line = refusal(report, capsys, "run")
    assert "run" in line and "damaged" in line
