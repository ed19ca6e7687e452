"""Compare baseline and JREG on the paper's tasks over training seeds: the paper's test and an interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jreg_megatron.evaluate.table import MEANS, p_text
from jreg_megatron.paper import TASKS, missing_tasks, numbers, over_seeds, task_means
from jreg_megatron.paper.over_seeds import Estimate
from jreg_megatron.report.inputs import Evaluated
from jreg_megatron.report.reading import read
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import print_table


def compare_seeds(files: Sequence[str]) -> dict[str, Any]:
    """Differences in the mean of the paper's tasks, over seeds.

    Args:
        files: one ``evaluate --json`` file per seed, with two models: first the baseline, then JREG.

    Returns:
        The JSON document without its head. Differences are JREG minus baseline in percentage points.
        Intervals are two-sided 95% t intervals of their mean.

    Raises:
        UserError: for fewer than two seeds, a file without two models on all of the paper's tasks, and seeds
            that were evaluated differently or have the same models.
    """
    seeds = [_pair(file) for file in files]
    if len(seeds) < 2:
        raise UserError("--seeds has one evaluation; give the files of at least two seeds")
    for seed in seeds[1:]:
        _check_same(seeds[0], seed)
    seen: dict[Any, str] = {}
    for model in (model for seed in seeds for model in seed):
        scores = tuple(model.tasks[name].value for name in TASKS)
        key = (model.source, model.revision, model.step, scores)
        if key in seen:
            raise UserError(
                f"--seeds: {model.name} is the same model in {seen[key]} and in {model.file}; each "
                "seed has a baseline and a JREG of its own"
            )
        seen[key] = model.file
    percent = [[{name: 100 * score.value for name, score in m.tasks.items()} for m in seed] for seed in seeds]
    means = [[task_means(scores) or {} for scores in seed] for seed in percent]
    paper = numbers()["tasks"]["seeds"]
    assumed = paper["difference"], paper["sd"]
    return {
        "files": [seed[0].file for seed in seeds],
        "models": [model.name for model in seeds[0]],
        "limit": _limit(seeds[0]),
        "confidence": over_seeds.CONFIDENCE,
        "means": {key: _figures([(a[key], b[key]) for a, b in means]) for key in means[0][0]},
        "power": {
            "difference": assumed[0],
            "sd": assumed[1],
            "level": over_seeds.LEVEL,
            "power": over_seeds.power(len(seeds), *assumed),
            "seeds_for_80_percent": over_seeds.seeds_needed(*assumed),
        },
        "paper": paper,
    }


def _pair(file: str) -> list[Evaluated]:
    found = read([Path(file)])
    if len(found.evaluated) != 2 or found.measured or found.runs:
        raise UserError(
            f"--seeds names {file}, which is not an evaluation of two models; make one with: "
            "jreg-megatron evaluate BASELINE JREG --tasks paper --json FILE"
        )
    for model in found.evaluated:
        if missing := missing_tasks(model.tasks):
            raise UserError(
                f"--seeds names {file}, where {model.name} lacks {', '.join(missing)} of the paper's "
                "nine tasks; evaluate it with --tasks paper"
            )
    return found.evaluated


def _check_same(first: Sequence[Evaluated], other: Sequence[Evaluated]) -> None:
    """Refuse seeds that were evaluated differently."""
    files = " and ".join(seed[0].file for seed in (first, other))
    limits = [_limit(seed) for seed in (first, other)]
    if limits[0] != limits[1]:
        raise UserError(
            f"--seeds: --limit was {limits[0] or 'none'} and {limits[1] or 'none'} in {files}; evaluate "
            "both with the same --limit"
        )
    for name in TASKS:
        scores = [model.tasks[name] for model in (*first, *other)]
        if len({(score.metric, score.samples) for score in scores}) > 1:
            raise UserError(
                f"--seeds: {name} has another metric or number of samples in {files}; evaluate both equally"
            )
    names = [[model.name for model in seed] for seed in (first, other)]
    if names[0] == names[1][::-1] != names[1]:
        raise UserError(
            f"--seeds: {files} name the models {' and '.join(names[0])} in different orders; evaluate the "
            "baseline first in both"
        )


def _limit(seed: Sequence[Evaluated]) -> str | None:
    """``--limit`` as text, from the report's reader; None for all samples."""
    found = seed[0].how.get("limit")
    return None if found == "none" else found


def _figures(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    differences = [b - a for a, b in pairs]
    over_all = Estimate.of(differences)
    assert over_all is not None  # there are seeds
    return {
        "first": fmean(a for a, _ in pairs),
        "second": fmean(b for _, b in pairs),
        "differences": differences,
        "difference": over_all.mean,
        "interval": [over_all.low, over_all.high],
        "sd": stdev(differences),
        "p_one_sided": over_seeds.p_one_sided(differences),
    }


def csv_rows(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each seed's difference and for each figure over the seeds, for CSV."""
    for name, found in document["means"].items():
        for file, difference in zip(document["files"], found["differences"], strict=True):
            yield {"mean": name, "seed": file, "figure": "difference", "value": difference}
        figures = {figure: value for figure, value in found.items() if isinstance(value, float)}
        for figure, value in (figures | dict(zip(("low", "high"), found["interval"], strict=True))).items():
            yield {"mean": name, "seed": "all", "figure": figure, "value": value}


def print_tables(console: Any, document: dict[str, Any]) -> None:
    """Print the paper's test over seeds, and its power."""
    first, second = document["models"]
    seeds, power, paper = len(document["files"]), document["power"], document["paper"]
    rows = []
    for key, found in document["means"].items():
        means = [f"{found[model]:.2f}" for model in ("first", "second")]
        differences = [f"{number:+.2f}" for number in (found["difference"], *found["interval"])]
        rows.append([MEANS[key], *means, *differences, f"{found['sd']:.2f}", p_text(found["p_one_sided"])])
    print_table(
        f"The paper's tasks over {seeds} seeds, in percent: {second} - {first}",
        ("mean", first, second, "difference", "from", "to", "sd", "p, one-sided"),
        rows,
        f"From, to: two-sided {document['confidence']:.0%} t interval of the mean difference",
        console=console,
    )
    console.print(
        f"The paper, at 170M over {paper['seeds']} seeds: {paper['difference']:+.2f}, one-sided p "
        f"{paper['p_one_sided']}.\n"
        f"Power: if the paper's difference and sd ({paper['sd']}) are true, {seeds} seeds find the "
        f"difference {power['power']:.0%} of the time at p < {power['level']}; 80% needs "
        f"{power['seeds_for_80_percent']} seeds."
    )
    if document["limit"] is not None:
        console.print(f"Only the first {document['limit']} samples of each task (--limit).")
