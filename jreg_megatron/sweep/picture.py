"""A sweep's result as a picture: loss and jump rate over lambda, and the displacement of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import batched, pairwise
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
    """The title of picture and table: recipe, length, last state, seeds."""
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
    """Rows of charts with titles: loss and jump rate over lambda, then one chart of layers per alpha."""
    losses, rates = results.baseline.losses.values(), results.baseline.jump_rates.values()
    mean = math.fsum(losses) / max(1, len(losses))
    over_lambda = {
        "Validation loss against the baseline of the same seed": _over_lambda(
            results, Axis(_LOSS), [loss - mean for loss in losses], lambda setting: setting.differences
        ),
        "The last layer's jump, at the end": _over_lambda(
            results, Axis("jump rate ζ (validation)", zero=True), [*rates], lambda setting: setting.jump_rates
        ),
    }
    first = [(name, chart) for name, chart in over_lambda.items() if chart is not None]
    return [row for row in (first, *map(list, batched(_by_layer(results), _PANELS_A_ROW))) if row]


def _over_lambda(
    results: Results, axis: Axis, baseline: list[float], by_seed: Callable[[Setting], Mapping[int, float]]
) -> Chart | None:
    """One line per alpha: mean over seeds with interval; and the baseline with the range of its seeds."""
    coeffs, alphas = results.coeffs, results.alphas
    if not coeffs:
        return None
    spacing = min((b / a for a, b in pairwise(coeffs)), default=3.0)
    found: dict[str, dict[float, Estimate]] = {}
    seeds = []
    if (middle := Estimate.of(baseline)) is not None:
        ends = coeffs[0] / spacing**0.5, coeffs[-1] * spacing**0.5
        found[_BASELINE] = dict.fromkeys(ends, replace(middle, low=min(baseline), high=max(baseline)))
    for setting in results.settings:
        values = list(by_seed(setting).values())
        if setting.alpha is not None and (value := Estimate.of(values)) is not None:
            label = f"α = {setting.alpha:g}"
            place = setting.coeff * spacing ** (
                _BESIDE * (alphas.index(setting.alpha) - (len(alphas) - 1) / 2)
            )
            found.setdefault(label, {})[place] = value
            seeds += [{"model": label, "x": place, "seed": one} for one in values if len(values) > 1]
    looks = _looks([f"α = {alpha:g}" for alpha in alphas])
    lambdas = Axis("λ", scale="log", ticks=tuple(coeffs))
    figure = curves("over_lambda", "", "", found, lambdas, axis, looks=looks, band=True)
    return None if figure is None else with_seeds(figure.chart, seeds)


def _by_layer(results: Results) -> list[tuple[str, Chart]]:
    """One chart per alpha: displacement of each layer at the end, mean over seeds, one line per lambda."""
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
    """The subtitle: missing runs, and the meaning of bars, bands and points."""
    count = len(results.left_out)
    said = [f"{count} of {len(results.sweep.runs)} runs not finished or left out"] if count else []
    if results.has_intervals:
        said.append(f"bars: {interval_name()}; faint: single seeds; grey: the baseline, range of its seeds")
    return "; ".join([*said, "below: at the end, mean over seeds"])
