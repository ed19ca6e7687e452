"""A sweep's result as a table, and all of its files: ``summary.json``, ``sweep.png``, ``sweep.svg``."""

from __future__ import annotations

import json

from jreg_megatron.paper.over_seeds import Estimate, interval_name
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.output import write_text
from jreg_megatron.sweep import picture
from jreg_megatron.sweep.grid import Sweep
from jreg_megatron.sweep.results import Results

_WIDTH = 118
_LAYERS_SHOWN = 4
_NAMES_SHOWN = 4


def report(sweep: Sweep) -> None:
    """Write the files for what is finished, and print the table.

    Raises:
        UserError: if no run is finished.
    """
    # Several tasks of an array may end at once.
    with lock(sweep.output / ".report.lock", "the report is being drawn", "name another --output", wait=True):
        results = Results.read(sweep)
        write_text(str(sweep.output / "summary.json"), json.dumps(results.summary(), indent=2) + "\n")
        drawn = picture.draw(results, sweep.output / "sweep")
    print_table(results)
    print(f"Picture: {', '.join(map(str, drawn))}. Numbers: {sweep.output / 'summary.json'}")


def print_table(results: Results) -> None:
    """Print the last validation of each setting, and :func:`conclusions`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=_WIDTH, markup=False)
    table = Table(title=picture.title(results), title_justify="left", caption_justify="left")
    layers = len(
        results.baseline.displacement or (results.settings[0].displacement if results.settings else [])
    )
    first = max(1, layers - _LAYERS_SHOWN + 1)
    for column in ("lambda", "alpha", "seeds", "loss", "against the baseline", "jump rate"):
        table.add_column(column, justify="right", no_wrap=True)
    if layers:
        table.add_column(f"Psi {first} to {layers}, x 100", no_wrap=True)
    for setting in ([results.baseline] if results.baseline.histories else []) + results.settings:
        psi = " ".join(f"{100 * value:.3g}" for value in setting.displacement[first - 1 :])
        table.add_row(
            "0" if setting.alpha is None else f"{setting.coeff:g}",
            "" if setting.alpha is None else f"{setting.alpha:g}",
            str(len(setting.histories)),
            "" if setting.loss is None else f"{setting.loss.mean:.4f}",
            "" if setting.alpha is None else _with_interval(setting.difference, "+.4f"),
            _with_interval(setting.jump_rate, ".3f"),
            *([psi] if layers else []),
            style="bold" if setting is results.best else None,
        )
    console.print(table)
    for line in conclusions(results):
        console.print(Text(line))


def conclusions(results: Results) -> list[str]:
    """The best setting, the intervals, the runs that do not count, and arguments that differ."""
    lines = [_of_the_best(results)]
    if results.has_intervals:
        lines.append(f"In brackets: {interval_name()}. The loss is compared between runs of the same seed.")
    for why in dict.fromkeys(results.left_out.values()):
        names = [name for name, reason in results.left_out.items() if reason == why]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        lines.append(f"Not counted: {', '.join(names[:_NAMES_SHOWN])}{more}: {why}.")
    for name, values in results.disagreements.items():
        lines.append(f"Compare with care: {name} differs between runs: {', '.join(values)}.")
    return lines


def _of_the_best(results: Results) -> str:
    best = results.best
    if best is None or best.difference is None:
        return "Nothing to compare yet: a run and the baseline of its seed must both be finished."
    difference, tried = best.difference, results.as_often_tried
    seeds = f"{difference.n} seed" + ("" if difference.n == 1 else "s")
    among = f" among {len(tried)} settings with {seeds}" if len(tried) > 1 else ""
    found = (
        f"Lowest loss against the baseline{among}: lambda {best.coeff:g}, alpha {best.alpha:g}, "
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


def _with_interval(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "no pair yet"
    if estimate.low is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"
