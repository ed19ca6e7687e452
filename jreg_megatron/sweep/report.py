"""A sweep's result: a table, and ``summary.json``, ``sweep.png`` and ``sweep.svg``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import batched, pairwise
from statistics import fmean

from jreg_megatron.paper.over_seeds import INTERVAL, Estimate
from jreg_megatron.report.charts import Axis, Chart, Style, pictures
from jreg_megatron.report.figures import LAYER, PSI, curves
from jreg_megatron.report.inputs import STATE_WORDS
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.output import print_table, write_bytes, write_json
from jreg_megatron.sweep.grid import Sweep
from jreg_megatron.sweep.results import BASELINE, DIFFERENCE, LOSS, RATE, Results

_LAYERS_SHOWN = 4
_NAMES_SHOWN = 4
_PANELS_A_ROW = 4
_GREY = Style("#767676", "circle", (6, 3), thin=True)
_OVER_LAMBDA = {
    DIFFERENCE: (
        "Validation loss against the baseline of the same seed",
        Axis("loss less the baseline's (nats per token); below 0 is better"),
    ),
    RATE: ("The last layer's jump, at the end", Axis("jump rate ζ (validation)", zero=True)),
}
_OFFSET = 0.09
"""Distance between the points of two alphas at one lambda, as a share of that between two lambdas."""


def report(sweep: Sweep) -> None:
    """Write the files for what is finished, and print the table and the conclusions.

    Raises:
        UserError: if no run is finished.
    """
    # Several tasks of an array may end at once.
    with lock(sweep.output / ".report.lock", "the report is being drawn", "name another --output", wait=True):
        results = Results.read(sweep)
        write_json(str(sweep.output / "summary.json"), results.summary())
        svg, png = pictures(_title(results), compose(results), _about(results), width=360)
        drawn = {sweep.output / "sweep.png": png, sweep.output / "sweep.svg": svg.encode()}
        for file, data in drawn.items():
            write_bytes(str(file), data)
    _print(results)
    print(f"Picture: {', '.join(map(str, drawn))}. Numbers: {sweep.output / 'summary.json'}")


def compose(results: Results) -> list[list[tuple[str, Chart]]]:
    """Rows of charts with titles: loss and jump rate over lambda, then one chart of layers per alpha."""
    first = [
        (title, chart)
        for what, (title, axis) in _OVER_LAMBDA.items()
        if (chart := _over_lambda(results, axis, what)) is not None
    ]
    return [row for row in (first, *map(list, batched(_by_layer(results), _PANELS_A_ROW))) if row]


def _over_lambda(results: Results, axis: Axis, what: str) -> Chart | None:
    """One line per alpha: mean over seeds with interval; and the baseline with the range of its seeds."""
    coeffs, alphas = results.coeffs, results.alphas
    if not coeffs:
        return None
    spacing = min((b / a for a, b in pairwise(coeffs)), default=3.0)
    base = list(results.baseline.by_seed[LOSS if what == DIFFERENCE else what].values())
    if what == DIFFERENCE and base:
        base = [loss - fmean(base) for loss in base]
    found: dict[str, dict[float, Estimate]] = {}
    seeds = []
    if (middle := Estimate.of(base)) is not None:
        ends = coeffs[0] / spacing**0.5, coeffs[-1] * spacing**0.5
        found[BASELINE] = dict.fromkeys(ends, replace(middle, low=min(base), high=max(base)))
    for setting in results.settings:
        value, values = setting.over_seeds[what], list(setting.by_seed[what].values())
        if value is not None and setting.alpha is not None:
            label, aside = f"α = {setting.alpha:g}", alphas.index(setting.alpha) - (len(alphas) - 1) / 2
            place = setting.coeff * spacing ** (_OFFSET * aside)
            found.setdefault(label, {})[place] = value
            seeds += [{"model": label, "x": place, "seed": one} for one in values if len(values) > 1]
    looks = _looks([f"α = {alpha:g}" for alpha in alphas])
    lambdas = Axis("λ", scale="log", ticks=tuple(coeffs))
    figure = curves("over_lambda", "", "", found, lambdas, axis, looks=looks, band=True, seeds=seeds)
    return None if figure is None else figure.chart


def _by_layer(results: Results) -> list[tuple[str, Chart]]:
    """One chart per alpha: displacement of each layer at the end, mean over seeds, one line per lambda."""
    looks = _looks([f"λ = {coeff:g}" for coeff in results.coeffs])
    drawn = []
    for alpha in results.alphas or (None,):
        found = {
            f"λ = {setting.coeff:g}" if setting.coeff else BASELINE: dict(enumerate(setting.displacement, 1))
            for setting in (results.baseline, *results.settings)
            if setting.alpha in (None, alpha)
        }
        figure = curves("by_layer", "", "", found, LAYER, Axis(PSI.title, scale="log"), looks=looks)
        where = "" if alpha is None else f", α = {alpha:g}"
        drawn += [] if figure is None else [(f"How far each layer turns the state{where}", figure.chart)]
    return drawn


def _looks(labels: Sequence[str]) -> dict[str, Style]:
    return {BASELINE: _GREY} | {label: Style.of(number) for number, label in enumerate(labels)}


def _title(results: Results) -> str:
    """The title of picture and table: recipe, length, last state, seeds."""
    sweep, state = results.sweep, results.final_state
    toy = "" if sweep.smoke is None else " as a toy (--smoke)"
    return (
        f"{sweep.recipe.stem}{toy}, {results.iterations:,} iterations, "
        f"last state {STATE_WORDS.get(state, state)}, {_seeds(len({run.seed for run in results.histories}))}"
    )


def _about(results: Results) -> str:
    """The subtitle: missing runs, and the meaning of bars, bands and points."""
    count = len(results.left_out)
    said = [f"{count} of {len(results.sweep.runs)} runs not finished or left out"] if count else []
    if results.has_intervals:
        said.append(f"bars: {INTERVAL}; faint: single seeds; grey: the baseline, range of its seeds")
    return "; ".join([*said, "below: at the end, mean over seeds"])


def _print(results: Results) -> None:
    """Print the last validation of each setting, and :func:`_conclusions`."""
    settings = [*([results.baseline] if results.baseline.histories else []), *results.settings]
    layers = len(settings[0].displacement)
    first = max(1, layers - _LAYERS_SHOWN + 1)
    columns = ["lambda", "alpha", "seeds", "loss", "against the baseline", "jump rate"]
    rows = [
        (
            f"{setting.coeff:g}",
            "" if setting.alpha is None else f"{setting.alpha:g}",
            len(setting.histories),
            "" if (loss := setting.over_seeds[LOSS]) is None else f"{loss.mean:.4f}",
            "" if setting.alpha is None else _with_interval(setting.over_seeds[DIFFERENCE], "+.4f"),
            _with_interval(setting.over_seeds[RATE], ".3f"),
            *([" ".join(f"{100 * psi:.3g}" for psi in setting.displacement[first - 1 :])] if layers else []),
        )
        for setting in settings
    ]
    psi = f"Psi {first} to {layers}, x 100"
    columns += [psi] if layers else []
    best = [number for number, setting in enumerate(settings) if setting in results.as_often_tried[:1]]
    print_table(_title(results), columns, rows, words=(psi,), bold=best)
    for line in _conclusions(results):
        print(line)


def _conclusions(results: Results) -> list[str]:
    """The best setting, the intervals, the runs that do not count, and arguments that differ."""
    lines = [_of_the_best(results)]
    if results.has_intervals:
        lines.append(f"In brackets: {INTERVAL}. The loss is compared between runs of the same seed.")
    for why in dict.fromkeys(results.left_out.values()):
        names = [name for name, reason in results.left_out.items() if reason == why]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        lines.append(f"Not counted: {', '.join(names[:_NAMES_SHOWN])}{more}: {why}.")
    for name, values in results.disagreements.items():
        lines.append(f"Compare with care: {name} differs between runs: {', '.join(values)}.")
    return lines


def _of_the_best(results: Results) -> str:
    tried = results.as_often_tried
    if not tried or (difference := tried[0].over_seeds[DIFFERENCE]) is None:
        return "Nothing to compare yet: a run and the baseline of its seed must both be finished."
    among = f" among {len(tried)} settings with {_seeds(difference.n)}" if len(tried) > 1 else ""
    found = (
        f"Lowest loss against the baseline{among}: lambda {tried[0].coeff:g}, alpha {tried[0].alpha:g}, "
        f"{_with_interval(difference, '+.4f')}."
    )
    if difference.mean >= 0:
        return f"{found} No setting is below the baseline."
    if difference.low is None or difference.high is None:
        return f"{found} One seed does not show how much of it is chance: add --seeds."
    if difference.low <= 0 <= difference.high:
        return f"{found} The interval contains 0: the data show no difference to the baseline."
    chosen = " It was chosen as the best, so it looks too good. Confirm it with new seeds." if among else ""
    return f"{found} The interval does not contain 0.{chosen}"


def _seeds(count: int) -> str:
    return f"{count} seed" + ("" if count == 1 else "s")


def _with_interval(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "no pair yet"
    if estimate.low is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
