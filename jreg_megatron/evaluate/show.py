"""An evaluation's tables, and its rows for CSV."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from rich.text import Text

from jreg_megatron.decoder.load import name_at
from jreg_megatron.paper import TASKS, missing_tasks
from jreg_megatron.runtime.output import print_table

MEANS = {"mean": "mean of nine", "mean_without_boolq": "without BoolQ"}
"""Names of the paper's means."""
_READ_OUT_TITLES = {"loss": "loss read out", "accuracy": "top-1", "agreement": "agrees with L"}
_OF_LAYERS = {"read_out": "Loss read out by layer", "lens": "Loss through the lens by layer"}


def print_tables(console: Any, document: dict[str, Any]) -> None:
    """Print tasks, layers, differences and notes."""
    models, comparison = document["models"], document["comparison"]
    labels = [name_at(model["name"], model["revision"], model["step"]) for model in models]
    if models[0]["tasks"]:
        _print_tasks(console, models, labels)
        if comparison:
            _print_differences(console, comparison, "Differences by task", _by_task(comparison))
    if any(model["read_out"] or model["lens"] or model["layer_drop"] for model in models):
        for model, name in zip(models, labels, strict=True):
            _print_layers(console, model, name)
        for part, title in _OF_LAYERS.items():
            if comparison and comparison[part]:
                by_layer = dict(zip(map(str, count()), _by_layer(comparison[part]), strict=False))
                _print_differences(console, comparison, title, by_layer)
    for line in _remarks(document):
        console.print(Text(line))


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
    comparison = document["comparison"]
    if comparison is None:
        return
    first, second = comparison["models"]
    of = {"model": f"{second} - {first}", "step": None, "revision": None}
    for name, found in comparison["tasks"].items():
        yield row("tasks", name, document["models"][0]["tasks"][name]["metric"], found["difference"], found)
    for key, metric in (("overall", "mean"), ("without_boolq", "mean_without_boolq")):
        if found := comparison[key]:
            yield row("tasks", "overall", metric, found["difference"], found)
    for part in _OF_LAYERS:
        for layer, found in enumerate(_by_layer(comparison[part])):
            yield row(part, layer, "loss", found["difference"], found)


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
    rows = [
        [layer, *("" if cell is None else f"{cell:.4f}" for cell in cells)]
        for layer, cells in enumerate(zip(*columns.values(), strict=True))
    ]
    unchanged = f" Nothing left out: {layer_drop['unchanged']:.4f}" if layer_drop else ""
    about = f"Loss in nats per token.{unchanged}"
    print_table(f"Layers of {name}", ("layer", *columns), rows, about, console=console)


def _print_differences(
    console: Any, comparison: dict[str, Any], title: str, found: dict[str, dict[str, Any]]
) -> None:
    rows = []
    for name, difference in found.items():
        numbers = [difference["difference"], *(difference["interval"] or (None, None))]
        cells = ["" if number is None else f"{number:+.4f}" for number in numbers]
        rows.append([name, *cells, p_text(difference["p_value"]), p_text(difference.get("p_adjusted"))])
    first, second = comparison["models"]
    columns = (title.rsplit(maxsplit=1)[-1], "difference", "from", "to", "p", "p, adjusted")
    about = f"From, to: {comparison['confidence']:.0%} interval"
    print_table(f"{title}: {second} - {first}", columns, rows, about, console=console)


def _remarks(document: dict[str, Any]) -> list[str]:
    lines = []
    models, comparison = document["models"], document["comparison"]
    if lower := [name for name, task in models[0]["tasks"].items() if not task["higher_is_better"]]:
        lines.append(f"Lower is better: {', '.join(lower)}.")
    if any(name.startswith("speeches_") for name in models[0]["tasks"]):
        lines.append("speeches_* are tasks made of held-out speeches, and no public benchmark.")
    lines += _about_means(models[0], document["limit"])
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


def _about_means(model: dict[str, Any], limit: int | None) -> list[str]:
    """Remarks on the paper's means, or the tasks that they lack; none if fewer than two tasks were run."""
    missing = missing_tasks(model["tasks"])
    if missing:
        few = len(TASKS) - len(missing) < 2
        return [] if few else [f"No mean of the paper's nine tasks. Not run: {', '.join(missing)}."]
    lines = [
        "The means are of the paper's nine tasks, by acc_norm if a task has it, else by acc. The paper does "
        "not say which it took."
    ]
    if limit is not None:
        lines.append(f"They are of the first {limit} samples of each task (--limit); the paper took all.")
    return lines


def _by_task(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = dict(comparison["tasks"])
    if comparison["overall"] and len(comparison["overall"]["tasks"]) > 1:
        whole = comparison["without_boolq"] is not None
        found[MEANS["mean"] if whole else "mean of accuracies"] = comparison["overall"]
        found |= {MEANS["mean_without_boolq"]: comparison["without_boolq"]} if whole else {}
    return found


def _by_layer(read_out: dict[str, Any] | None) -> list[dict[str, Any]]:
    if read_out is None:
        return []
    keys = ("difference", "interval", "p_value", "p_adjusted")
    columns = zip(*(read_out[key] for key in keys), strict=True)
    return [dict(zip(keys, column, strict=True)) | {"samples": read_out["texts"]} for column in columns]


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
