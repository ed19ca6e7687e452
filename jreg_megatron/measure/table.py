"""A measurement's tables, and its rows for CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console

from jreg_megatron.measure.measurement import BLOCKS
from jreg_megatron.runtime.output import print_table

FINAL_STATES = {"pre_norm": "before", "post_norm": "after"}

_OF_LAYERS = (
    *("displacement", "displacement_std", "jump_rate_from", "block_influence", "angular_distance"),
    *("update_ratio", "norm", "norm_rms", "norm_largest"),
)
_LINES = {"displacement": "Psi", "displacement_std": "std", "jump_rate_from": "zeta"}
_LINES |= {
    "angular_distance": "angle\n/ pi",
    "norm": "norm",
    "norm_largest": "largest",
    "update_ratio": "update",
}
"""The figures in a layer's line, and their titles."""
_FINE = ("displacement", "displacement_std", "angular_distance", "update_ratio")
"""Figures with four digits; the others have two."""
_DEPTH = {"void_share": "void", "attention_ratio": "a", "mlp_ratio": "m", "layer_ratio": "a+m"}
_DEPTH |= {"attention_cosine": "cos\na", "mlp_cosine": "cos\nm", "layer_cosine": "cos\na+m"}
_DEPTH |= {"matrix_entropy": "entr.", "curvature": "curv."}
_ABOUT_STATES = "before, after: the last layer's output before the final norm, and after it."
_ABOUT_DEPTH = (
    "void: share of tokens. a, m, a+m: |a|/|h| of attention, |m|/|h+a| of the MLP, |a+m|/|h|; cos: the "
    "cosines of the same pairs. entr.: matrix entropy, curv.: curvature in radians, both of the layer's "
    "output."
)


def print_summary(console: Console, models: Sequence[dict[str, Any]]) -> None:
    """Print a line for each checkpoint: jump rate and last displacement, before and after the final norm."""
    has_steps = any(model["step"] is not None for model in models)
    columns = ["model", *(["step"] if has_steps else []), "L", "zeta_L", "after", "Psi_L", "after"]
    rows = []
    for model in models:
        rates, psi = model["jump_rate"], model["displacement"]
        step = "" if model["step"] is None else f"{model['step']:,}"
        row = [model["name"], *([step] if has_steps else []), model["num_layers"]]
        row += [_number(rates.get(state), 3) for state in FINAL_STATES]
        row += [_number(psi[state][-1] if state in psi else None, 4) for state in FINAL_STATES]
        rows.append(row)
    title = "The jump, before and after the final norm"
    print_table(title, columns, rows, console=console, box=SIMPLE_HEAD)


def print_layers(console: Console, model: dict[str, Any], depth: bool = False) -> None:
    """Print a line per layer with the metrics of depth, or with the others. 0 is the embedding's output."""
    title, titles, about = ("Use of depth: ", _DEPTH, _ABOUT_DEPTH) if depth else ("", _LINES, "")
    rows, last = [], model["num_layers"]
    for layer in range(last + 1):
        states = list(model["displacement"]) if layer == last and not depth else ["pre_norm"]
        for state in states:
            note = f" {FINAL_STATES[state]}" if len(states) > 1 else ""
            about = about or (_ABOUT_STATES if note else "")
            values = ((what, _of_layer(model, what, state, layer - last)) for what in titles)
            cells = [_number(value, 4 if what in _FINE else 2) for what, value in values]
            rows.append([f"{layer}{note}", *cells])
    title += f"{model['name']}{_step(model)}"
    print_table(title, ("layer", *titles.values()), rows, about, console=console, box=SIMPLE_HEAD)


def print_comparison(console: Console, rows: Sequence[tuple[dict[str, Any], float]]) -> None:
    """Print zeta_L of entries of the document, each beside the paper's number."""
    columns = ("model", "revision", "paper", "before the final norm", "after it")
    found = [
        [model["name"], model["revision"] or "", f"{printed:g}"]
        + [_number(model["jump_rate"].get(state), 2) for state in FINAL_STATES]
        for model, printed in rows
    ]
    print_table("zeta_L: the paper's and ours", columns, found, console=console)


def csv_rows(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each checkpoint, block (with or without first token), final state and layer."""
    return [
        {key: model[key] for key in ("name", "source", "revision", "step")}
        | {"first_token": first_token, "final_state": state, "layer": index + 1}
        | {
            key: _of_layer(model[block], key, state, index + 1 - model["num_layers"])
            for key in (*_OF_LAYERS, *_DEPTH)
            if key in model[block]
        }
        for model in models
        for first_token, block in BLOCKS.items()
        for state in (model[block] or {"displacement": ()})["displacement"]
        for index in range(model["num_layers"])
    ]


def _of_layer(block: dict[str, Any], what: str, state: str, offset: int) -> float | None:
    """A figure of layer ``L + offset``; None if there is none.

    A figure's list begins with layer 1 or with the embedding's output, and ends with layer L.
    """
    row = block[what].get(state) or []
    value: float | None = row[offset - 1] if len(row) >= 1 - offset else None
    return value


def _step(model: dict[str, Any]) -> str:
    return "" if model["step"] is None else f" at step {model['step']:,}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
