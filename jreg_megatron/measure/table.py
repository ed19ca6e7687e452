"""A measurement's tables, and its rows for CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table

FINAL_STATES = {"pre_norm": "before", "post_norm": "after"}

_BLOCKS = {"kept": "with_first_token", "dropped": "without_first_token"}
_OF_LAYERS = (
    "displacement",
    "displacement_std",
    "jump_rate_from",
    "block_influence",
    "angular_distance",
    "update_ratio",
)
_COLUMNS, _LEAST_BARS = 54, 8
_BARS = "▁▂▃▄▅▆▇█"


def table(title: str, *columns: str, box: Box = HEAVY_HEAD) -> Table:
    """An empty table whose first column holds names and the others numbers."""
    made = Table(title=title, title_justify="left", caption_justify="left", box=box)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    return made


def print_summary(console: Console, models: Sequence[dict[str, Any]]) -> None:
    """Print a line for each checkpoint: jump rate and last displacement, before and after the final norm."""
    steps = ["step"] if any(model["step"] is not None for model in models) else []
    columns = ("model", *steps, "L", "zeta_L", "after", "Psi_L", "after")
    title = "The last layer's jump, before and after the final norm"
    summary = table(title, *columns, box=SIMPLE_HEAD)
    room = console.width - _COLUMNS - max(len(model["name"]) for model in models) - 10 * len(steps)
    if room >= _LEAST_BARS:
        most = max(model["num_layers"] for model in models)
        summary.add_column("Psi from layer 2 on" if room > most else "Psi at the end")
    for model in models:
        rates, psi = model["jump_rate"], model["displacement"]
        step = "" if model["step"] is None else f"{model['step']:,}"
        summary.add_row(
            model["name"],
            *([step] if steps else []),
            str(model["num_layers"]),
            *(_number(rates.get(state), 3) for state in FINAL_STATES),
            *(_number(psi[state][-1] if state in psi else None, 4) for state in FINAL_STATES),
            *([_bars(psi["pre_norm"][1:], room)] if room >= _LEAST_BARS else []),
        )
    console.print(summary)


def print_layers(console: Console, model: dict[str, Any]) -> None:
    """Print a line for each layer."""
    at = "" if model["step"] is None else f" at step {model['step']:,}"
    columns = ("layer", "Psi", "std", "zeta", "angle/pi", "norm", "largest", "update")
    layers = table(f"{model['name']}{at}", *columns, box=SIMPLE_HEAD)
    norms = [_number(model[kind]["pre_norm"][0], 2) for kind in ("norm", "norm_largest")]
    layers.add_row("0", "", "", "", "", *norms, "")
    last = model["num_layers"] - 1
    for index in range(model["num_layers"]):
        states = ["pre_norm"] if index < last else list(model["displacement"])
        for state in states:
            note = f" ({FINAL_STATES[state]} norm)" if index == last and len(states) > 1 else ""
            layers.add_row(
                f"{index + 1}{note}",
                _number(model["displacement"][state][index], 4),
                _number(model["displacement_std"][state][index], 4),
                _number(model["jump_rate_from"][state][index], 2),
                _number(model["angular_distance"][state][index], 4),
                _number(model["norm"][state][index + 1], 2),
                _number(model["norm_largest"][state][index + 1], 2),
                _number(model["update_ratio"][state][index], 4),
            )
    console.print(layers)


def print_beside(console: Console, rows: Sequence[tuple[dict[str, Any], float]]) -> None:
    """Print zeta_L of entries of the document, each beside the paper's."""
    columns = ("model", "revision", "paper", "before the final norm", "after it")
    beside = table("zeta_L: the paper's and ours", *columns)
    for model, printed in rows:
        ours = [_number(model["jump_rate"].get(state), 2) for state in FINAL_STATES]
        beside.add_row(model["name"], model["revision"] or "", f"{printed:g}", *ours)
    console.print(beside)


def csv_rows(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each checkpoint, with and without first token, final state and layer."""
    return [row for model in models for row in _rows(model)]


def _rows(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    head = {key: model[key] for key in ("name", "source", "revision", "step")}
    for first_token, block in _BLOCKS.items():
        figures = model[block]
        for state in figures["displacement"] if figures else ():
            for index in range(model["num_layers"]):
                yield {
                    **head,
                    **{"first_token": first_token, "final_state": state, "layer": index + 1},
                    **{key: figures[key][state][index] for key in _OF_LAYERS},
                    **{key: figures[key][state][index + 1] for key in ("norm", "norm_rms", "norm_largest")},
                }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _bars(values: Sequence[float], width: int) -> str:
    """A bar for each value, from 0 to the largest; only the last ``width`` values."""
    shown = values[-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in shown)
