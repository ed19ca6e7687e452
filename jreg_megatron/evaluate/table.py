"""An evaluation's tables, and its rows for CSV."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from rich.text import Text

from jreg_megatron.decoder.reference import name_at
from jreg_megatron.paper import TASKS, missing_tasks
from jreg_megatron.runtime.output import print_table

MEANS = {"mean": "mean of nine", "mean_without_boolq": "without BoolQ"}
"""Names of the paper's means."""
_READ_OUT_TITLES = {"loss": "loss read out", "accuracy": "top-1", "agreement": "agrees with L"}
_OF_LAYERS = ("read_out", "lens")
_DEPTH = {"kl": "KL", "top5_overlap": "top 5", "cosine_to_token": "own", "cosine_to_next_token": "next"}
"""Titles of the figures of layers 0..L."""
_TITLES = {"tasks": "Differences by task", "read_out": "Loss read out by layer"}
_TITLES |= {"lens": "Loss through the lens by layer"}


def print_tables(console: Any, document: dict[str, Any]) -> None:
    """Print tasks, layers, differences and notes."""
    models, differences = document["models"], dict[str, list[list[str]]]()
    labels = [name_at(model["name"], model["revision"], model["step"]) for model in models]
    if models[0]["tasks"]:
        _print_tasks(console, models, labels)
    for model, name in zip(models, labels, strict=True):
        if model["read_out"] or model["lens"] or model["layer_drop"]:
            _print_layers(console, model, name)
        if model["depth"]:
            _print_depth(console, model["depth"], name)
    for part, _, _, found, label in _differences(document):
        numbers = [found["difference"], *(found["interval"] or (None, None))]
        cells = ["" if number is None else f"{number:+.4f}" for number in numbers]
        cells += [p_text(found["p_value"]), p_text(found.get("p_adjusted"))]
        differences.setdefault(part, []).extend([[label, *cells]] if label else [])
    for part, rows in differences.items():
        first, second = document["comparison"]["models"]
        columns = (_TITLES[part].rsplit(maxsplit=1)[-1], "difference", "from", "to", "p", "p, adjusted")
        about = f"From, to: {document['comparison']['confidence']:.0%} interval"
        print_table(f"{_TITLES[part]}: {second} - {first}", columns, rows, about, console=console)
    for line in _remarks(document):
        console.print(Text(line))


def _differences(document: dict[str, Any]) -> Iterator[tuple[str, Any, str, dict[str, Any], str]]:
    """Part, item and metric for CSV, the difference, and its name in a table (empty: no row there)."""
    comparison = document["comparison"]
    if comparison is None:
        return
    for name, found in comparison["tasks"].items():
        yield "tasks", name, document["models"][0]["tasks"][name]["metric"], found, name
    if overall := comparison["overall"]:
        words = MEANS["mean"] if comparison["without_boolq"] else "mean of accuracies"
        yield "tasks", "overall", "mean", overall, words if len(overall["tasks"]) > 1 else ""
    if found := comparison["without_boolq"]:
        yield "tasks", "overall", "mean_without_boolq", found, MEANS["mean_without_boolq"]
    for part in _OF_LAYERS:
        columns = dict(comparison[part] or {})
        samples = {"samples": columns.pop("texts", None)}
        for layer, figures in enumerate(zip(*columns.values(), strict=True)):
            found = dict(zip(columns, figures, strict=True)) | samples
            yield part, layer, "loss", found, str(layer)


def csv_rows(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each figure, for CSV."""

    def row(part: str, item: object, metric: str, value: float, found: Any = None) -> dict[str, Any]:
        found = found or {}
        low, high = found.get("interval") or (None, None)
        figures = {"part": part, "item": item, "metric": metric, "value": value, "low": low, "high": high}
        return of | figures | {key: found.get(key) for key in ("samples", "p_value", "p_adjusted")}

    for model in document["models"]:
        of = {"model": model["name"], "step": model["step"], "revision": model["revision"]}
        for name, task in model["tasks"].items():
            yield row("tasks", name, task["metric"], task["value"], task)
            chance = {} if task["chance"] is None else {"chance": task["chance"]}
            for metric, value in (task["other_metrics"] | chance).items():
                yield row("tasks", name, metric, value)
        for name, value in (model["paper_means"] or {}).items():
            yield row("tasks", "paper", name, value)
        for part in _OF_LAYERS:
            for metric in _READ_OUT_TITLES:
                for layer, value in enumerate((model[part] or {}).get(metric, [])):
                    yield row(part, layer, metric, value)
        if drop := model["layer_drop"]:
            for which, value in (*enumerate(drop["loss"], start=1), ("none", drop["unchanged"])):
                yield row("layer_drop", which, "loss", value)
        if depth := model["depth"]:
            for metric in _DEPTH:
                for layer, value in enumerate(depth[metric] or ()):
                    yield row("depth", layer, metric, value)
            for metric, of_layers in depth["skip"].items():
                for layer, figure in enumerate(of_layers, start=1):
                    if not isinstance(figure, list):
                        yield row("depth", layer, f"skip_{metric}", figure)
                        continue
                    for later, value in enumerate(figure, start=1):  # None for earlier layers
                        if value is not None:
                            yield row("depth", layer, f"skip_{metric}_{later}", value)
    for part, item, metric, found, _ in _differences(document):
        first, second = document["comparison"]["models"]
        of = {"model": f"{second} - {first}", "step": None, "revision": None}
        yield row(part, item, metric, found["difference"], found)


def _print_tasks(console: Any, models: list[dict[str, Any]], labels: list[str]) -> None:
    rows = []
    for name, task in models[0]["tasks"].items():
        chance = "" if task["chance"] is None else f"{task['chance']:.3f}"
        cells = [_value(model["tasks"][name]) if name in model["tasks"] else "" for model in models]
        rows.append([f"{name}\n{task['metric']}", task["samples"], chance, *cells])
    if models[0]["paper_means"]:
        for key, words in MEANS.items():
            means = [(model["paper_means"] or {}).get(key) for model in models]
            rows.append([words, "", "", *("" if mean is None else f"{mean:.4f}" for mean in means)])
    print_table("Tasks", ("task", "samples", "chance", *labels), rows, console=console)


def _print_layers(console: Any, model: dict[str, Any], name: str) -> None:
    read_out, layer_drop = model["read_out"] or {}, model["layer_drop"]
    columns = {title: read_out[key] for key, title in _READ_OUT_TITLES.items() if key in read_out}
    columns |= {"loss by lens": model["lens"]["loss"]} if model["lens"] else {}
    columns |= {"loss without it": [None, *layer_drop["loss"]]} if layer_drop else {}
    unchanged = f" Nothing left out: {layer_drop['unchanged']:.4f}" if layer_drop else ""
    _print_by_layer(console, f"Layers of {name}", columns, 4, f"Loss in nats per token.{unchanged}")


def _print_depth(console: Any, depth: dict[str, Any], name: str) -> None:
    skip = depth["skip"]
    columns = {title: depth[metric] for metric, title in _DEPTH.items() if depth[metric] is not None}
    for title, metric, over in (("later mean", "later_mean", fmean), ("later max", "later_largest", max)):
        rows = ([value for value in row if value is not None] for row in skip[metric])
        columns[title] = [None, *(over(row) if row else None for row in rows)]
    columns |= {"prob. mean": [None, *skip["output_mean"]], "prob. max": [None, *skip["output_largest"]]}
    turn = depth["turns_over_at"]
    turned = "" if turn is None else f" The first layer with next above own is {turn}."
    about = (
        "KL: from the layer's read-out to the output, in nats. top 5: the share of its five likeliest tokens "
        "that the output has too. own, next: cosine of the state and the embedding of its own token, and of "
        f"the next token.{turned} later: the relative change of a later layer's contribution if the layer is "
        "skipped. prob.: the norm of the change of the probabilities if the layer is skipped."
    )
    _print_by_layer(console, f"Depth of {name}", columns, 3, about)


def _print_by_layer(
    console: Any, title: str, columns: dict[str, list[float | None]], digits: int, about: str
) -> None:
    """Print columns of layers 0..L, by title."""
    rows = [
        [layer, *("" if cell is None else f"{cell:.{digits if abs(cell) < 100 else 1}f}" for cell in cells)]
        for layer, cells in enumerate(zip(*columns.values(), strict=True))
    ]
    print_table(title, ("layer", *columns), rows, about, console=console)


def _remarks(document: dict[str, Any]) -> list[str]:
    lines = []
    models, comparison = document["models"], document["comparison"]
    if lower := [name for name, task in models[0]["tasks"].items() if not task["higher_is_better"]]:
        lines.append(f"Lower is better: {', '.join(lower)}.")
    if any(name.startswith("speeches_") for name in models[0]["tasks"]):
        lines.append("speeches_* are tasks made of held-out speeches, not a public benchmark.")
    missing, limit = missing_tasks(models[0]["tasks"]), document["limit"]
    if missing and len(TASKS) - len(missing) > 1:
        lines.append(f"No mean of the paper's nine tasks. Not run: {', '.join(missing)}.")
    if not missing:
        lines.append(
            "The means are of the paper's nine tasks, by acc_norm if a task has it, else by acc. The paper "
            "does not say which metric it used."
        )
    if not missing and limit is not None:
        lines.append(f"They are of the first {limit} samples of each task (--limit); the paper used all.")
    if models[0]["tasks"] or (comparison and comparison["read_out"]):
        lines.append("Below a figure: its 95% interval.")
    if comparison:
        lines.append(
            "Intervals and tests are over samples and texts, not over training seeds. Other seeds may give "
            "another difference."
        )
        lines += comparison["notes"]
    elif len(models) > 2:
        lines.append("Differences are computed for two models only.")
    return lines


def _value(task: dict[str, Any]) -> str:
    if task["interval"] is None:
        return f"{task['value']:.3f}"
    low, high = task["interval"]
    return f"{task['value']:.3f}\n{low:.3f}–{high:.3f}"


def p_text(value: float | None) -> str:
    """A p-value for a table."""
    if value is None:
        return ""
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"
