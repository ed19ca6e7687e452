"""A measurement's tables, and its rows for CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console

from jreg_megatron.measure.depth import OF_LAYERS
from jreg_megatron.measure.measurement import BLOCKS
from jreg_megatron.runtime.output import print_table

FINAL_STATES = {"pre_norm": "before", "post_norm": "after"}

_OF_LAYERS = (
    *("displacement", "displacement_std", "jump_rate_from", "block_influence", "angular_distance"),
    *("update_ratio", "norm", "norm_rms", "norm_largest"),
)
_IN_LINES = {"displacement": 4, "displacement_std": 4, "jump_rate_from": 2, "angular_distance": 4}
_IN_LINES |= {"norm": 2, "norm_largest": 2, "update_ratio": 4}
"""The figures in a layer's line, each with its digits."""
_DEPTH = {"void_share": "void", "attention_ratio": "a", "mlp_ratio": "m", "layer_ratio": "a+m"}
_DEPTH |= {"attention_cosine": "cos a", "mlp_cosine": "cos m", "layer_cosine": "cos a+m"}
_DEPTH |= {"matrix_entropy": "entropy", "curvature": "curv."}
_COLUMNS, _LEAST_BARS = 54, 8
_BAR_COLUMNS = ("Psi from layer 2 on", "Psi at the end")
_BARS = "▁▂▃▄▅▆▇█"


def print_summary(console: Console, models: Sequence[dict[str, Any]]) -> None:
    """Print a line for each checkpoint: jump rate and last displacement, before and after the final norm."""
    has_steps = any(model["step"] is not None for model in models)
    columns = ["model", *(["step"] if has_steps else []), "L", "zeta_L", "after", "Psi_L", "after"]
    room = console.width - _COLUMNS - max(len(model["name"]) for model in models) - 10 * has_steps
    if room >= _LEAST_BARS:
        most = max(model["num_layers"] for model in models)
        columns.append(_BAR_COLUMNS[room <= most])
    rows = []
    for model in models:
        rates, psi = model["jump_rate"], model["displacement"]
        step = "" if model["step"] is None else f"{model['step']:,}"
        row = [model["name"], *([step] if has_steps else []), model["num_layers"]]
        row += [_number(rates.get(state), 3) for state in FINAL_STATES]
        row += [_number(psi[state][-1] if state in psi else None, 4) for state in FINAL_STATES]
        rows.append(row + ([_bars(psi["pre_norm"][1:], room)] if room >= _LEAST_BARS else []))
    title = "The last layer's jump, before and after the final norm"
    print_table(title, columns, rows, console=console, words=_BAR_COLUMNS, box=SIMPLE_HEAD)


def print_layers(console: Console, model: dict[str, Any]) -> None:
    """Print a line for each layer."""
    norms = [_number(model[kind]["pre_norm"][0], 2) for kind in ("norm", "norm_largest")]
    rows = [["0", "", "", "", "", *norms, ""]]
    last = model["num_layers"] - 1
    for index in range(model["num_layers"]):
        states = ["pre_norm"] if index < last else list(model["displacement"])
        for state in states:
            note = f" ({FINAL_STATES[state]} norm)" if index == last and len(states) > 1 else ""
            cells = [
                _number(model[what][state][index + what.startswith("norm")], digits)
                for what, digits in _IN_LINES.items()
            ]
            rows.append([f"{index + 1}{note}", *cells])
    columns = ("layer", "Psi", "std", "zeta", "angle/pi", "norm", "largest", "update")
    print_table(f"{model['name']}{_step(model)}", columns, rows, console=console, box=SIMPLE_HEAD)


def print_depth(console: Console, model: dict[str, Any]) -> None:
    """Print a line for each layer, of the metrics of depth; 0 is the embedding's output."""
    rows = [
        [str(layer), *(_number(_of_layer(model, what, "pre_norm", layer), 2) for what in _DEPTH)]
        for layer in range(model["num_layers"] + 1)
    ]
    about = (
        "void: share of tokens. a, m, a+m: |a|/|h| of attention, |m|/|h+a| of the MLP, |a+m|/|h|; then the "
        "cosines of the same pairs. entropy: matrix entropy, curv.: curvature in radians, both of the "
        "layer's output."
    )
    title = f"Use of depth: {model['name']}{_step(model)}"
    print_table(title, ("layer", *_DEPTH.values()), rows, about, console=console, box=SIMPLE_HEAD)


def print_beside(console: Console, rows: Sequence[tuple[dict[str, Any], float]]) -> None:
    """Print zeta_L of entries of the document, each beside the paper's."""
    columns = ("model", "revision", "paper", "before the final norm", "after it")
    found = [
        [model["name"], model["revision"] or "", f"{printed:g}"]
        + [_number(model["jump_rate"].get(state), 2) for state in FINAL_STATES]
        for model, printed in rows
    ]
    print_table("zeta_L: the paper's and ours", columns, found, console=console)


def csv_rows(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each checkpoint, with and without first token, final state and layer."""
    return [
        {key: model[key] for key in ("name", "source", "revision", "step")}
        | {"first_token": first_token, "final_state": state, "layer": index + 1}
        | {key: model[block][key][state][index + key.startswith("norm")] for key in _OF_LAYERS}
        | {key: _of_layer(model[block], key, state, index + 1) for key in _DEPTH if key in model[block]}
        for model in models
        for first_token, block in BLOCKS.items()
        for state in (model[block] or {"displacement": ()})["displacement"]
        for index in range(model["num_layers"])
    ]


def _of_layer(figures: dict[str, Any], what: str, state: str, layer: int) -> float | None:
    """A metric of depth of layer 1..L, or of the state h_0; None where there is none."""
    of_layers = figures[what].get(state)
    if of_layers is None or layer < (what in OF_LAYERS):
        return None
    value: float = of_layers[layer - (what in OF_LAYERS)]
    return value


def _step(model: dict[str, Any]) -> str:
    return "" if model["step"] is None else f" at step {model['step']:,}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _bars(values: Sequence[float], width: int) -> str:
    """A bar for each value, from 0 to the largest; only the last ``width`` values."""
    shown = values[-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in shown)
