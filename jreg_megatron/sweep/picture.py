"""A sweep's result as a picture: loss and jump rate over lambda, and where the jump went."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jreg_megatron.paper.over_seeds import Estimate, interval_name
from jreg_megatron.sweep.results import Results, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MARKERS = ("o", "s", "^", "D", "v", "P")
_PANELS_A_ROW = 4
_FINAL_STATES = {
    "pre_norm": "last state before the final norm",
    "post_norm": "last state after the final norm",
}


def title(results: Results) -> str:
    """The recipe, its length, the convention and the seeds, for the head of picture and table."""
    sweep = results.sweep
    toy = "" if sweep.smoke is None else " as a toy (--smoke)"
    seeds = len({run.seed for run in results.histories})
    return (
        f"{sweep.recipe.stem}{toy}, {results.iterations:,} iterations, "
        f"{_FINAL_STATES.get(results.final_state, results.final_state)}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def draw(results: Results, path: Path) -> list[Path]:
    """Draw into ``path`` with ``.png`` and with ``.svg``; returns both."""
    figure = compose(results)
    drawn = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for file in drawn:
        part = file.with_name(f".{file.name}")
        figure.savefig(part, format=file.suffix[1:], dpi=160)
        part.replace(file)
    return drawn


def compose(results: Results) -> Figure:
    """The picture: validation loss, jump rate, and for each alpha the displacement of all layers."""
    from matplotlib.figure import Figure

    alphas = results.alphas
    columns = min(_PANELS_A_ROW, max(1, len(alphas)))
    rows = max(1, math.ceil(len(alphas) / columns))
    figure = Figure(figsize=(10.5, 4.3 + 3.4 * rows), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=(4.0, 3.4 * rows))
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    figure.suptitle(title(results) + _missing(results), fontsize=11)

    loss, rate = top.subplots(1, 2)
    losses = list(results.baseline.losses.values())
    mean = math.fsum(losses) / max(1, len(losses))
    _baseline(loss, [value - mean for value in losses])
    _baseline(rate, list(results.baseline.jump_rates.values()))
    _over_lambda(loss, results, lambda s: s.differences, lambda s: s.difference)
    _over_lambda(rate, results, lambda s: s.jump_rates, lambda s: s.jump_rate)
    loss.set(title="Validation loss against the baseline of the same seed")
    loss.set_ylabel("difference (nats per token)\nbelow 0: better than the baseline")
    rate.set(title="The last layer's jump, at the end", ylabel=r"jump rate $\zeta_L$ (validation)")
    rate.set_ylim(bottom=-0.03 * rate.get_ylim()[1])  # a marker at 0 is seen whole
    handles, labels = rate.get_legend_handles_labels()
    if handles:
        top.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)

    by_layer = bottom.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    _by_layer(bottom, list(by_layer), results)
    return figure


def _over_lambda(
    axes: Axes,
    results: Results,
    singles: Callable[[Setting], dict[int, float]],
    estimate: Callable[[Setting], Estimate | None],
) -> None:
    """A line per alpha over lambda: single seeds faint, the mean with its interval."""
    from matplotlib.ticker import NullLocator

    coeffs = sorted({setting.coeff for setting in results.settings})
    for number, (alpha, style) in enumerate(zip(results.alphas, _styles(), strict=False)):
        settings = [s for s in results.settings if s.alpha == alpha and estimate(s) is not None]
        # Beside each other, where several alphas share a lambda.
        shift = _spacing(coeffs) ** (0.09 * (number - (len(results.alphas) - 1) / 2))
        places = [setting.coeff * shift for setting in settings]
        found = [e for setting in settings if (e := estimate(setting)) is not None]
        axes.plot(places, [e.mean for e in found], label=rf"$\alpha$ = {alpha:g}", **style)
        for place, e, setting in zip(places, found, settings, strict=True):
            if e.low is None or e.high is None:
                continue
            values = list(singles(setting).values())
            axes.plot([place] * e.n, values, ".", color=style["color"], alpha=0.35, markersize=7, zorder=1)
            ends = ([e.mean - e.low], [e.high - e.mean])
            axes.errorbar([place], [e.mean], yerr=ends, color=style["color"], capsize=3, linewidth=1.2)
    axes.set_xscale("log")
    if coeffs:
        axes.set_xticks(coeffs, [f"{coeff:g}" for coeff in coeffs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(coeffs[0] / _spacing(coeffs) ** 0.5, coeffs[-1] * _spacing(coeffs) ** 0.5)
    axes.set_xlabel(r"$\lambda$")
    axes.margins(y=0.1)
    _plain(axes)


def _baseline(axes: Axes, values: list[float]) -> None:
    """The mean of the baseline's seeds as a line, and all of them as a band."""
    if values:
        middle = math.fsum(values) / len(values)
        axes.axhline(middle, color="black", linestyle="--", linewidth=1.2, label="baseline", zorder=0)
    if len(values) > 1:
        ends = min(values), max(values)
        axes.axhspan(*ends, color="black", alpha=0.08, linewidth=0, label="spread of its seeds")


def _by_layer(figure: SubFigure, panels: list[Axes], results: Results) -> None:
    """A panel per alpha: displacement of each layer, a line per lambda."""
    import matplotlib
    from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter

    coeffs = sorted({setting.coeff for setting in results.settings})
    shades = matplotlib.colormaps["viridis_r"]
    colour = {c: shades(0.12 + 0.88 * (n + 1) / len(coeffs)) for n, c in enumerate(coeffs)}
    handles: dict[str, Any] = {}

    def plot(axes: Axes, setting: Setting, label: str, **style: Any) -> None:
        psi = [100 * value for value in setting.displacement]
        (line,) = axes.plot(range(1, len(psi) + 1), psi, label=label, markersize=4, **style)
        handles.setdefault(label, line)

    for axes, alpha in itertools.zip_longest(panels, results.alphas):
        if alpha is None and results.alphas:
            axes.set_visible(False)
            continue
        if results.baseline.histories:
            plot(axes, results.baseline, "baseline", color="black", linestyle="--", marker=".")
        for setting in (s for s in results.settings if s.alpha == alpha):
            plot(axes, setting, _lambda(setting.coeff), color=colour[setting.coeff], marker="o")
        if alpha is not None:
            axes.set_title(rf"$\alpha$ = {alpha:g}", fontsize=10)
        # The first layer turns the embedding much further than any other; linear axes would hide the rest.
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _plain(axes)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel(r"displacement $\Psi_l$ x 100", fontsize=10)
    figure.suptitle("How far each layer turns the state, at the end (mean over seeds)", fontsize=12)
    order = [label for label in ("baseline", *map(_lambda, coeffs)) if label in handles]
    figure.legend([handles[label] for label in order], order, loc="outside right center", frameon=False)


def _styles() -> Any:
    """Colours of the Okabe-Ito palette, told apart in every kind of colour vision, and markers."""
    import matplotlib

    palette = matplotlib.color_sequences["okabe_ito"]
    colours = [palette[n] for n in (5, 6, 3, 7, 1, 2)]
    pairs = itertools.cycle(zip(colours, _MARKERS, strict=True))
    return ({"color": colour, "marker": marker, "markersize": 5} for colour, marker in pairs)


def _lambda(coeff: float) -> str:
    return rf"$\lambda$ = {coeff:g}"


def _spacing(coeffs: list[float]) -> float:
    """The least ratio of two neighbours."""
    return min((b / a for a, b in itertools.pairwise(coeffs)), default=3.0)


def _missing(results: Results) -> str:
    count = len(results.left_out)
    text = "" if not count else f"\n{count} of {len(results.sweep.runs)} runs not finished or left out"
    if any(s.loss is not None and s.loss.n > 1 for s in (results.baseline, *results.settings)):
        text += f"{'; ' if text else chr(10)}bars: {interval_name()}, faint: single seeds"
    return text


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
