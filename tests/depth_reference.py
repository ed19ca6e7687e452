"""Metrics of depth as the papers and their authors' code define them: loops over tokens, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

CONTRIBUTIONS = {
    "attention_ratio": lambda h, a, m: length(a) / length(h),
    "mlp_ratio": lambda h, a, m: length(m) / length(h + a),
    "layer_ratio": lambda h, a, m: length(a + m) / length(h),
    "attention_cosine": lambda h, a, m: cosine(a, h),
    "mlp_cosine": lambda h, a, m: cosine(m, h + a),
    "layer_cosine": lambda h, a, m: cosine(a + m, h),
}


def length(v: Any) -> float:
    return math.sqrt(float((v * v).sum()))


def cosine(u: Any, v: Any) -> float:
    return float((u * v).sum()) / (length(u) * length(v))


def void_rows(states: Any) -> list[list[float]]:
    """For layers 1..L and tokens whether the layer is void; states are h_0 .. h_L, ``[L + 1, n, h]``."""
    found: list[list[float]] = [[] for _ in range(len(states) - 1)]
    for token in range(states.shape[1]):
        changes: list[float] = []
        for layer in range(1, len(states)):
            change = length(states[layer, token]) - length(states[layer - 1, token])
            threshold = 0.8 * (max(changes) - min(changes)) if changes else 0.0
            found[layer - 1].append(float(change < threshold))
            changes.append(change)
    return found


def contribution_rows(before: Any, middle: Any, after: Any) -> dict[str, list[float]]:
    """Each token's, of one layer; ``[n, h]`` each."""
    found: dict[str, list[float]] = {name: [] for name in CONTRIBUTIONS}
    for h, between, out in zip(before, middle, after, strict=True):
        for name, of_token in CONTRIBUTIONS.items():
            found[name].append(of_token(h, between - h, out - between))
    return found


def unit_rows(states: Any) -> Any:
    centred = states - states.mean(axis=0)
    return numpy.stack([row / length(row) for row in centred])


def entropy(states: Any) -> float:
    """Of a sequence's states ``[n, h]``, by the eigenvalues of the smaller matrix without entries below 0."""
    rows = unit_rows(states)
    count, width = rows.shape
    matrix = rows.T @ rows if count > width else rows @ rows.T
    matrix = numpy.maximum(matrix, 0)
    values = numpy.linalg.eigvals(matrix / matrix.trace()).real
    shares = [value / sum(v for v in values if v > 0) for value in values if value > 0]
    return -sum(share * math.log(share) for share in shares) / min(math.log(count), math.log(width))


def bend(states: Any) -> float:
    """The curvature of a sequence's states ``[n, h]``."""
    rows = unit_rows(states)
    angles = []
    for at in range(1, len(rows) - 1):
        back, on = rows[at] - rows[at - 1], rows[at + 1] - rows[at]
        angles.append(math.acos(min(1.0, abs(float(on @ back)) / (length(on) * length(back)))))
    return sum(angles) / len(angles)


def figures(of_sequences: Sequence[tuple[Any, Any, Any]], drop: int = 0) -> dict[str, Any]:
    """The mean over texts of one sequence each.

    Args:
        of_sequences: of each h_0 .. h_L ``[L + 1, n, h]``, the states between attention and MLP
            ``[L, n, h]``, and the normed last state ``[n, h]``.
        drop: how many first tokens do not count.
    """
    texts: list[dict[str, Any]] = []
    for of_one in of_sequences:
        states, middles, normed = (numpy.asarray(each, dtype=float) for each in of_one)
        layers = [
            contribution_rows(states[layer], middles[layer], states[layer + 1])
            for layer in range(len(middles))
        ]
        text = {name: [numpy.mean(layer[name][drop:]) for layer in layers] for name in CONTRIBUTIONS}
        text["void_share"] = [numpy.mean(row[drop:]) for row in void_rows(states)]
        for name, of_sequence in {"matrix_entropy": entropy, "curvature": bend}.items():
            text[name] = [of_sequence(state[drop:]) for state in states]
            text[f"{name} normed"] = [*text[name][:-1], of_sequence(normed[drop:])]
        texts.append(text)
    return {name: numpy.mean([text[name] for text in texts], axis=0).tolist() for name in texts[0]}
