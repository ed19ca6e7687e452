"""A sweep's result as a picture: loss and jump rate over lambda, and where the jump went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jreg_megatron.paper.over_seeds import Estimate, interval_name
from jreg_megatron.report.charts import Axis, Chart, Style, pictures, with_seeds
from jreg_megatron.report.figures import LAYER, PSI, curves
from jreg_megatron.report.inputs import STATE_WORDS
from jreg_megatron.runtime.output import write_bytes
from jreg_megatron.sweep.results import Results, Setting

_PANELS_A_ROW = 4
_BASELINE = "baseline"
_GREY = Style("#767676", "circle", (6, 3), thin=True)
_LOSS = "loss less the baseline's (nats per token); below 0 is better"
_BESIDE = 0.09
"""Of the distance of two lambdas, between alphas that share a lambda."""


def title(results: Results) -> str:
    """The recipe, its length, the convention and the seeds, for the head of picture and table."""
    sweep, state = results.sweep, results.final_state
    toy = "" if sweep.smoke is None else " as a toy (--smoke)"
    seeds = len({run.seed for run in results.histories})
    return (
        f"{sweep.recipe.stem}{toy}, {results.iterations:,} iterations, "
        f"last state {STATE_WORDS.get(state, state)}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def draw(results: Results, path: Path) -> list[Path]:
    """Draw into ``path`` with ``.png`` and with ``.svg``; returns both."""
    svg, png = pictures(title(results), compose(results), _about(results), width=360)
    drawn = {path.with_suffix(".png"): png, path.with_suffix(".svg"): svg.encode()}
    for file, data in drawn.items():
        write_bytes(str(file), data)
    return list(drawn)


def compose(results: Results) -> list[list[tuple[str, Chart]]]:
    """Rows of charts with their titles: loss and jump rate over lambda, then the layers, a chart an alpha."""
    losses = list(results.baseline.losses.values())
    mean = math.fsum(losses) / max(1, len(losses))
    over_lambda = [
        (name, chart)
        for name, axis, baseline, estimate, by_seed in (
            (
                "Validation loss against the baseline of the same seed",
                Axis(_LOSS),
                [loss - mean for loss in losses],
                lambda setting: setting.difference,
                lambda setting: setting.differences,
            ),
            (
                "The last layer's jump, at the end",
                Axis("jump rate ζ (validation)", zero=True),
                list(results.baseline.jump_rates.values()),
                lambda setting: setting.jump_rate,
                lambda setting: setting.jump_rates,
            ),
        )
        if (chart := _over_lambda(results, axis, baseline, estimate, by_seed)) is not None
    ]
    by_layer = list(itertools.batched(_by_layer(results), _PANELS_A_ROW))
    return [row for row in (over_lambda, *map(list, by_layer)) if row]


def _over_lambda(
    results: Results,
    axis: Axis,
    baseline: Sequence[float],
    estimate: Callable[[Setting], Estimate | None],
    by_seed: Callable[[Setting], Mapping[int, float]],
) -> Chart | None:
    """A line for each alpha, the mean over seeds with its interval; the baseline with its seeds' spread."""
    coeffs = results.coeffs
    if not coeffs:
        return None
    spacing = min((b / a for a, b in itertools.pairwise(coeffs)), default=3.0)
    found: dict[str, dict[float, Estimate]] = {}
    seeds = []
    if baseline:
        middle = math.fsum(baseline) / len(baseline)
        spread = Estimate(middle, min(baseline), max(baseline), len(baseline))
        ends = coeffs[0] / spacing**0.5, coeffs[-1] * spacing**0.5
        found[_BASELINE] = dict.fromkeys(ends, spread)
    for number, alpha in enumerate(results.alphas):
        shift = spacing ** (_BESIDE * (number - (len(results.alphas) - 1) / 2))
        label = f"α = {alpha:g}"
        for setting in results.settings:
            if setting.alpha == alpha and (value := estimate(setting)) is not None:
                found.setdefault(label, {})[setting.coeff * shift] = value
                seeds += [
                    {"model": label, "x": setting.coeff * shift, "seed": one}
                    for one in (by_seed(setting).values() if value.n > 1 else ())
                ]
    looks = _looks([f"α = {alpha:g}" for alpha in results.alphas])
    lambdas = Axis("λ", scale="log", ticks=tuple(coeffs))
    figure = curves("over_lambda", "", "", found, lambdas, axis, looks=looks, band=True)
    return None if figure is None else with_seeds(figure.chart, seeds)


def _by_layer(results: Results) -> list[tuple[str, Chart]]:
    """For each alpha the displacement of each layer at the end, mean over seeds, a line per lambda."""
    looks = _looks([_lambda(coeff) for coeff in results.coeffs])
    drawn = []
    for alpha in results.alphas or (None,):
        found = {_BASELINE: dict(enumerate(results.baseline.displacement, start=1))}
        for setting in results.settings:
            if setting.alpha == alpha:
                found[_lambda(setting.coeff)] = dict(enumerate(setting.displacement, start=1))
        figure = curves("by_layer", "", "", found, LAYER, Axis(PSI.title, scale="log"), looks=looks)
        where = "" if alpha is None else f", α = {alpha:g}"
        drawn += [] if figure is None else [(f"How far each layer turns the state{where}", figure.chart)]
    return drawn


def _looks(labels: Sequence[str]) -> dict[str, Style]:
    return {_BASELINE: _GREY} | {label: Style.of(number) for number, label in enumerate(labels)}


def _lambda(coeff: float) -> str:
    return f"λ = {coeff:g}"


def _about(results: Results) -> str:
    """What is missing, and what bars, bands and points are."""
    count = len(results.left_out)
    said = [f"{count} of {len(results.sweep.runs)} runs not finished or left out"] if count else []
    if results.has_intervals:
        said.append(f"bars: {interval_name()}; faint: single seeds; grey: the baseline and its seeds' spread")
    return "; ".join([*said, "below: at the end, mean over seeds"])
