"""The figures of a report: pure functions of its models, each with its caption and its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from jreg_megatron.paper.over_seeds import Estimate, interval_name
from jreg_megatron.report.charts import BANDS, Axis, Chart, Row, Style, heat_map, lines
from jreg_megatron.report.check import shortened
from jreg_megatron.report.inputs import STATE_WORDS, STATES, Comparison, Evaluated, Measured, State
from jreg_megatron.report.models import Model
from jreg_megatron.report.paper_profiles import PaperProfiles
from jreg_megatron.report.tables import LOSS, Cell, Table, known, p_value

STEP, LAYER = Axis("training step", whole=True, scale="auto"), Axis("layer", whole=True)
PSI = Axis("displacement Ψ", scale="auto")
_RATE = Axis("jump rate ζ", zero=True)
_LOSS = Axis("loss (nats per token)", format=".5~g")
_MAP_ROW, _MAP_LEAST, _MAP_MOST = 9, 150, 600


@dataclass(frozen=True)
class Choice:
    """Which of a figure's rows are shown, for the reader to choose."""

    field: str
    title: str
    options: dict[str, str]
    """What is shown on the page for each value; the first is chosen at first."""

    @property
    def first(self) -> str:
        """The value chosen at first."""
        return next(iter(self.options))


@dataclass(frozen=True)
class Figure:
    """A picture with all that is said about it."""

    name: str
    """For files and addresses; of small letters, digits and underscores."""
    title: str
    caption: str
    chart: Chart
    table: Table
    models: tuple[tuple[str, Style], ...] = ()
    """Of its legend; empty if it has none."""
    choices: tuple[Choice, ...] = ()
    convention: str = ""
    """What a picture outside of the page says of how it was measured; empty if nothing."""


Looks = Mapping[str, Style]
Columns = dict[str, dict[Any, Cell]]
"""A figure's numbers by column and row of its table."""


def figures(
    models: Sequence[Model],
    comparisons: Sequence[tuple[Comparison, str, str]] = (),
    first: str = "kept",
    paper: PaperProfiles | None = None,
) -> list[Figure]:
    """All figures that there are numbers for.

    Args:
        models: with their labels.
        comparisons: each with the labels of its two models.
        first: whether the numbers are with the first token kept or dropped.
        paper: what to lay under the displacement per layer.
    """
    looks = {model.label: Style.of(index) for index, model in enumerate(models)}
    found = [
        displacement(models, looks, first, paper),
        displacement_in_training(models, looks, paper),
        jump_rate(models, looks, first),
        *in_training(models, looks),
        *heat_maps(models, first),
        *read_outs(models, looks),
        *(read_out_difference(*compared, index) for index, compared in enumerate(comparisons)),
        layer_drop(models, looks),
    ]
    return [figure for figure in found if figure is not None]


def drawn(
    name: str,
    title: str,
    caption: str,
    rows: list[Row],
    looks: Looks,
    x: Axis,
    y: Axis,
    table: Table,
    *,
    choices: Sequence[Choice] = (),
    convention: str = "",
    band: bool = False,
    rule: float | None = None,
) -> Figure | None:
    """A line for each model, with a choice of the axis where it is logarithmic; None without rows.

    Args:
        name, title, caption, table, convention: see :class:`Figure`.
        rows: see :func:`~jreg_megatron.report.charts.lines`; so are ``band`` and ``rule``.
        looks: of the models, by label, in order; there may be more.
        x, y: the axes.
        choices: between rows.
    """
    if not rows:
        return None
    x, y = x.fitted(rows, "x"), y.fitted(rows, "y")
    labels = {row["model"] for row in rows}
    shown = tuple((label, style) for label, style in looks.items() if label in labels)
    chart = lines(rows, shown, x, y, choices={c.field: c.first for c in choices}, band=band, rule=rule)
    if y.scale == "log":
        caption += " The axis is logarithmic: equal distances are equal factors."
        choices = [*choices, Choice("scale", "axis", {"log": "logarithmic", "linear": "linear"})]
    return Figure(name, title, caption, chart, table, shown, tuple(choices), convention.strip())


def curves(
    name: str,
    title: str,
    caption: str,
    found: Mapping[str, Mapping[Any, float | Estimate | None]],
    x: Axis,
    y: Axis,
    *,
    looks: Looks | None = None,
    table: str = "",
    form: str = "#.4g",
    convention: str = "",
    band: bool = False,
    rule: float | None = None,
) -> Figure | None:
    """A line for each label through its values; see :func:`drawn`.

    Args:
        name, title, caption, convention, rule: see there.
        found: values by label and place on the horizontal axis. What is not finite is in the table alone.
        x, y: the axes.
        looks: by label; by default one after the other.
        table: its caption, if it is not the title.
        form: of its numbers.
        band: show the intervals of values over seeds.
    """
    rows: list[Row] = []
    columns: Columns = {label: {} for label, values in found.items() if values}
    for label in columns:
        for place, value in sorted(found[label].items()):
            mean, *ends = (value.mean, value.low, value.high) if isinstance(value, Estimate) else (value,)
            columns[label][place] = mean
            if mean is not None and math.isfinite(mean):
                low, high = (mean if end is None else end for end in ends or (None, None))
                low = max(low, mean / 10) if y.scale == "log" else low
                rows.append(
                    {"model": label, "x": place, "y": mean, **({"low": low, "high": high} if band else {})}
                )
    caption += f" The band is the {interval_name()}." if band else ""
    looks = looks or {label: Style.of(index) for index, label in enumerate(columns)}
    numbers = Table.of(table or title, x.title.removeprefix("training "), columns, form)
    return drawn(
        name, title, caption, rows, looks, x, y, numbers, convention=convention, band=band, rule=rule
    )


def displacement(
    models: Sequence[Model], looks: Looks, first: str, paper: PaperProfiles | None = None
) -> Figure | None:
    """Displacement per layer as measured, with its spread over tokens."""
    last_ones = {model.label: model.measured[-1] for model in models if model.measured}
    if not last_ones:
        return None
    kinds = sorted({kind for entry in last_ones.values() for kind in entry.blocks}, key=lambda k: k != first)
    rows: list[Row] = []
    columns: Columns = {}
    for (label, entry), kind, state in product(last_ones.items(), kinds, STATES):
        if state not in entry.states:
            continue
        block = entry.block(kind)
        spreads = block.displacement_std[state] if block.displacement_std else [None] * entry.num_layers
        for layer, (psi, spread) in enumerate(zip(block.displacement[state], spreads, strict=True), start=1):
            rows.append(
                {"model": label, "x": layer, "y": psi, "state": state, "first": kind, "spread": spread}
            )
            if kind == kinds[0]:
                columns.setdefault(_named(label, entry, kind), {})[_place(layer, state, entry)] = psi
    depth = max(entry.num_layers for entry in last_ones.values())
    said, words = f"First token of each text {kinds[0]}.", ""
    if paper is not None:
        # Drawn first, they lie under the others.
        rows = [
            row for kind in kinds for row in paper.rows(depth, state=STATES[0], first=kind, spread=None)
        ] + rows
        columns |= paper.columns(f", {STATE_WORDS[STATES[0]]}")
        looks = {**looks, **paper.looks}
        words = paper.words(depth, any(row["state"] == STATES[1] for row in rows))
    floor = min((row["y"] for row in rows if row["y"] > 0), default=1e-9) / 2
    for row in rows:
        psi, spread = row["y"], row["spread"]
        row["low"], row["high"] = (None, None) if spread is None else (max(floor, psi - spread), psi + spread)
    band = any(row["spread"] is not None for row in rows)
    pick = ": pick a model to see its own." if len({row["model"] for row in rows}) > BANDS else "."
    without_norm = _without_norm(last_ones.items())
    choices = [_states(rows)]
    if len(kinds) > 1:
        choices.append(Choice("first", "first token of each text", {kind: kind for kind in kinds}))
    return drawn(
        "displacement",
        "How far each layer turns the state",
        "Displacement Ψ is half of one minus the cosine between a layer's input and its output: 0 leaves the "
        "direction as it is, 0.5 is a right angle. A last point far above the one before is the jump."
        + (f" The band is one standard deviation over tokens, cut off at the axis{pick}" if band else "")
        + (" Of several checkpoints the last is shown." if any(m.is_series for m in models) else "")
        + (f" {said}" if len(kinds) == 1 else "")
        + _one_only(last_ones.items(), kinds)
        + without_norm
        + _texts_measured(last_ones.values())
        + words,
        rows,
        looks,
        LAYER,
        PSI,
        Table.of(f"Displacement Ψ of each layer, mean over tokens, first token {kinds[0]}", "layer", columns),
        choices=choices,
        convention=said + without_norm + (f" {paper.origin(depth)}" if paper else ""),
        band=band,
    )


def displacement_in_training(
    models: Sequence[Model], looks: Looks, paper: PaperProfiles | None = None
) -> Figure | None:
    """Displacement per layer at the last validation of runs."""
    runs = {model.label: model.run for model in models if model.run and model.run.displacement}
    columns: Columns = {
        label: {layer: known(psi) for layer, psi in enumerate(run.displacement, start=1)}
        for label, run in runs.items()
    }
    rows: list[Row] = [
        {"model": label, "x": layer, "y": psi}
        for label, column in columns.items()
        for layer, psi in column.items()
        if psi is not None
    ]
    words = convention = ""
    if paper is not None and rows:
        depth = max(len(run.displacement) for run in runs.values())
        rows = paper.rows(depth) + rows
        columns |= paper.columns()
        looks = {**looks, **paper.looks}
        words, convention = paper.words(depth), paper.origin(depth)
    return drawn(
        "displacement_in_training",
        "How far each layer turns the state, at the end of training",
        "Displacement Ψ of each layer as training logged it at the last validation. The last layer's output "
        f"is taken {_of_runs(models)}.{words}",
        rows,
        looks,
        LAYER,
        PSI,
        Table.of("Displacement Ψ of each layer at the last validation", "layer", columns),
        convention=convention,
    )


def jump_rate(models: Sequence[Model], looks: Looks, first: str) -> Figure | None:
    """zeta_L of models that were measured at several steps."""
    rows: list[Row] = []
    columns: Columns = {}
    series = [(model.label, entry) for model in models if model.is_series for entry in model.measured]
    for label, entry in series:
        for state in entry.states:
            rate = entry.block(first).jump_rate.get(state)
            if entry.step is not None and rate is not None:
                rows.append({"model": label, "x": entry.step, "y": rate, "state": state})
                name = f"{_named(label, entry, first)}, {STATE_WORDS[state]}"
                columns.setdefault(name, {})[entry.step] = rate
    said, without_norm = f"First token of each text {first}.", _without_norm(series)
    return drawn(
        "jump_rate",
        "The last layer's jump over training",
        "Jump rate ζ: how much further the last layer turns the state than the layer before it, in "
        f"hundredths of displacement. Measured on checkpoints; 0 is no jump. {said}"
        + _one_only(series, (first,))
        + without_norm,
        rows,
        looks,
        STEP,
        _RATE,
        Table.of(f"Jump rate ζ at each step, first token {first}", "step", columns),
        choices=(_states(rows),),
        convention=said + without_norm,
    )


def in_training(models: Sequence[Model], looks: Looks) -> list[Figure | None]:
    """zeta_L and validation loss as runs logged them."""
    runs = {model.label: model.run for model in models if model.run}
    return [
        curves(
            "jump_rate_in_training",
            "The last layer's jump, as training logged it",
            "Jump rate ζ on validation data: how much further the last layer turns the state than the layer "
            f"before it, in hundredths of displacement. The last layer's output is taken {_of_runs(models)}.",
            {label: dict(zip(run.iterations, run.jump_rate, strict=True)) for label, run in runs.items()},
            STEP,
            _RATE,
            looks=looks,
            table="Jump rate ζ at each validation",
        ),
        curves(
            "validation_loss",
            "Validation loss over training",
            "Cross-entropy on held-out text; lower is better.",
            {
                label: dict(zip(run.iterations, run.validation_loss, strict=True))
                for label, run in runs.items()
            },
            STEP,
            _LOSS,
            looks=looks,
            table="Validation loss, nats per token",
            form=LOSS,
        ),
    ]


def heat_maps(models: Sequence[Model], first: str) -> list[Figure]:
    """Displacement over layers and steps, one map for each model that was measured at several."""
    series = [model for model in models if model.is_series]
    values = [
        psi
        for model in series
        for entry in model.measured
        for state in entry.states
        for psi in entry.block(first).displacement[state]
        if psi > 0
    ]
    low, high = min(values, default=1e-3), max(values, default=1.0)
    if low == high:
        low /= 2
    return [
        _heat_map(model, first, f"heat_map_{index}", low, high) for index, model in enumerate(series, start=1)
    ]


def _heat_map(model: Model, first: str, name: str, low: float, high: float) -> Figure:
    rows: list[Row] = []
    columns: Columns = {}
    entries = [(model.label, entry) for entry in model.measured]
    for _, entry in entries:
        for state in entry.states if entry.step is not None else ():
            for layer, psi in enumerate(entry.block(first).displacement[state], start=1):
                row: Row = {"step": entry.step, "layer": layer, "state": state}
                rows.append(row | {"value": max(psi, low), "exact": psi})
                column = columns.setdefault(_named(f"step {entry.step:,}", entry, first), {})
                column[_place(layer, state, entry)] = psi
    said, without_norm = f"First token of each text {first}.", _without_norm(entries)
    return Figure(
        name,
        f"Where the turning is, over training: {model.label}",
        "Each column is a checkpoint, each row a layer, the last one on top; brighter turns the state "
        f"further. The colours are logarithmic and the same in all maps of this page. {said}"
        + _one_only(entries, (first,))
        + without_norm,
        heat_map(
            rows,
            low=low,
            high=high,
            height=min(max(_MAP_LEAST, _MAP_ROW * (model.num_layers or 1)), _MAP_MOST),
        ),
        Table.of(f"Displacement Ψ by layer and step, first token {first}", "layer", columns),
        choices=(_states(rows),),
        convention=said + without_norm,
    )


def read_outs(models: Sequence[Model], looks: Looks) -> list[Figure | None]:
    """Loss, accuracy and agreement behind each layer."""
    about = (
        "The state behind each layer goes through the final norm and the head, as if the model ended there"
    )

    def figure(name: str, part: str, what: str, title: str, caption: str, axis: Axis) -> Figure | None:
        def pick(evaluated: Evaluated) -> dict[int, float]:
            return dict(enumerate(getattr(getattr(evaluated, part), what, None) or ()))

        form = LOSS if axis is _LOSS else "#.4g"
        return _by_layer(models, looks, pick, name, title, caption, axis, f"{title}: {axis.title}", form)

    return [
        figure(
            "read_out_loss",
            "read_out",
            "loss",
            "What the middle layers already know",
            f"{about}. Lower loss in the middle means more is known earlier. Layer 0 is the embedding.",
            _LOSS,
        ),
        figure(
            "lens_loss",
            "lens",
            "loss",
            "What the middle layers know, read out through a fitted lens",
            "The state behind each layer first goes through the affine map that brings it nearest to the "
            "last layer's, fitted on other texts. What is left is what the layer does not know.",
            _LOSS,
        ),
        figure(
            "early_exit_accuracy",
            "read_out",
            "accuracy",
            "Right predictions, leaving after each layer",
            f"{about}: the share of next tokens predicted right. Higher is better.",
            Axis("accuracy", zero=True),
        ),
        figure(
            "early_exit_agreement",
            "read_out",
            "agreement",
            "Predictions that are final, leaving after each layer",
            f"{about}: the share of tokens for which it predicts what the whole model predicts.",
            Axis("agreement", zero=True),
        ),
    ]


def layer_drop(models: Sequence[Model], looks: Looks) -> Figure | None:
    """How much worse a model gets without one of its layers."""

    def pick(evaluated: Evaluated) -> dict[int, float]:
        drop = evaluated.layer_drop
        return {layer: loss - drop.unchanged for layer, loss in enumerate(drop.loss, start=1)} if drop else {}

    return _by_layer(
        models,
        looks,
        pick,
        "layer_drop",
        "What each layer is needed for",
        "How much the loss rises when this one layer is left out; near 0 the layer does little.",
        Axis("rise of the loss (nats per token)", scale="auto"),
        "Rise of the loss without each layer, nats per token",
    )


def _by_layer(
    models: Sequence[Model],
    looks: Looks,
    pick: Callable[[Evaluated], dict[int, float]],
    name: str,
    title: str,
    caption: str,
    axis: Axis,
    table: str,
    form: str = "#.4g",
) -> Figure | None:
    """What ``pick`` finds by layer in the last evaluation of each model that has it."""
    used = {model.label: [entry for entry in model.evaluated if pick(entry)][-1:] for model in models}
    entries = {label: found[0] for label, found in used.items() if found}
    other = _other_texts(entries)
    return curves(
        name,
        title,
        caption + other,
        {label: pick(entry) for label, entry in entries.items()},
        LAYER,
        axis,
        looks=looks,
        table=table,
        form=form,
        convention="The models read different texts." if other else "",
    )


def read_out_difference(comparison: Comparison, a: str, b: str, index: int = 0) -> Figure | None:
    """Difference of the loss behind each layer between two models, with its interval."""
    found = comparison.read_out
    if found is None:
        return None
    nothing = [None] * len(found.difference)
    intervals = [interval or (None, None) for interval in found.interval or nothing]
    values = list(zip(found.difference, *zip(*intervals, strict=True), strict=True))
    rows: list[Row] = [
        {"model": "difference", "x": layer, "y": value, "low": low, "high": high}
        for layer, (value, low, high) in enumerate(values)
    ]
    columns: Columns = {
        name: dict(enumerate(column))
        for name, column in zip(("difference", "from", "to"), zip(*values, strict=True), strict=True)
    }
    for name, column in {"p": found.p_value, "p, adjusted": found.p_adjusted}.items():
        if column and set(column) != {None}:
            columns[name] = {layer: p_value(value) for layer, value in enumerate(column)}
    return drawn(
        f"read_out_difference{f'_{index + 1}' if index else ''}",
        "Which model's middle layers know more",
        f"Loss behind each layer of {b} less that of {a}; below 0, {b} is better. The band is the "
        f"{comparison.confidence:.0%} interval over texts: where it does not touch 0, other texts "
        "would hardly change the sign. Training anew, with another seed, might.",
        rows,
        {"difference": Style.of(0)},
        LAYER,
        Axis("difference in loss"),
        Table.of("Difference in loss behind each layer", "layer", columns),
        band=True,
        rule=0,
    )


def _place(layer: int, state: State, entry: Measured) -> float | str:
    """A row of a table of layers; the last layer's two states stand in rows of their own."""
    return f"{layer}, {STATE_WORDS[state]}" if layer == entry.num_layers else layer


def _named(name: str, entry: Measured, first: str) -> str:
    """A column's name, which says where its numbers are not of the convention that was asked for."""
    counted = entry.first_for(first)
    return name if counted == first else f"{name}, first token {counted}"


def _one_only(entries: Iterable[tuple[str, Measured]], order: Sequence[str]) -> str:
    """What a caption says of those that were not measured in both ways."""
    found: dict[str, list[str]] = {}
    for label, entry in entries:
        for kind in order:
            counted = entry.first_for(kind)
            if counted != kind and label not in found.setdefault(counted, []):
                found[counted].append(label)
    return "".join(
        f" Measured only with the first token {counted}, and shown so: {', '.join(labels)}."
        for counted, labels in found.items()
    )


def _without_norm(entries: Iterable[tuple[str, Measured]]) -> str:
    """What a caption says of models that are not among the numbers after the final norm."""
    found = dict.fromkeys(label for label, entry in entries if STATES[1] not in entry.states)
    return f" No final norm, so shown before it alone: {', '.join(found)}." if found else ""


def _texts_measured(entries: Iterable[Measured]) -> str:
    """What a caption says where not all models were measured on the same text."""
    texts = {
        tuple(item for item in entry.conditions.items() if item[0].startswith("text ")) for entry in entries
    }
    return " Not all models read the same text; the files at the end say which." if len(texts) > 1 else ""


def _other_texts(used: dict[str, Evaluated]) -> str:
    """What a caption says where not all models read the same text."""
    texts: dict[str, list[str]] = {}
    for label, entry in used.items():
        read_out = entry.read_out or entry.lens
        words = [shortened(read_out.text, 80)] if read_out and read_out.text else []
        words += [f"{read_out.tokens:,} tokens"] if read_out and read_out.tokens is not None else []
        words += [f"max_tokens {entry.how['max tokens']}"] if "max tokens" in entry.how else []
        texts.setdefault(", ".join(words) or "a text that the file does not name", []).append(label)
    if len(texts) < 2:
        return ""
    each = "; ".join(f"{', '.join(labels)}: {words}" for words, labels in texts.items())
    return f" Not comparable as they stand, for the texts differ: {each}."


def _states(rows: list[Row]) -> Choice:
    """Between the last layer's states that there are numbers for."""
    there = {row["state"] for row in rows}
    return Choice("state", "last layer", {state: STATE_WORDS[state] for state in STATES if state in there})


def _of_runs(models: Sequence[Model]) -> str:
    states = dict.fromkeys(model.run.final_state for model in models if model.run)
    if len(states) == 1:
        return STATE_WORDS[next(iter(states))]
    named = {state: [m.label for m in models if m.run and m.run.final_state == state] for state in states}
    return " and ".join(f"{STATE_WORDS[state]} in {', '.join(labels)}" for state, labels in named.items())
