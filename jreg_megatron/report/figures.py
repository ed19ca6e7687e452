"""The figures of a report: pure functions of its models. Each has a caption and a table of its numbers."""

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
    """A choice of the reader: which rows of a figure are shown."""

    field: str
    title: str
    options: dict[str, str]
    """The text of each value; the first value is the default."""

    @property
    def first(self) -> str:
        """The default."""
        return next(iter(self.options))


@dataclass(frozen=True)
class Figure:
    """A picture with its title, caption, table and choices."""

    name: str
    """For files and links: small letters, digits and underscores."""
    title: str
    caption: str
    chart: Chart
    table: Table
    models: tuple[tuple[str, Style], ...] = ()
    """The legend; may be empty."""
    choices: tuple[Choice, ...] = ()
    convention: str = ""
    """The subtitle of the picture as a file: how it was measured; may be empty."""


Looks = Mapping[str, Style]
Columns = dict[str, dict[Any, Cell]]
"""A figure's numbers by column and row of its table."""


def figures(
    models: Sequence[Model],
    comparisons: Sequence[tuple[Comparison, str, str]] = (),
    first: str = "kept",
    paper: PaperProfiles | None = None,
) -> list[Figure]:
    """All figures with numbers.

    Args:
        models: with their labels.
        comparisons: each with the labels of its two models.
        first: the first token: ``kept`` or ``dropped``.
        paper: profiles to draw under the displacement per layer.
    """
    looks = {model.label: Style.of(index) for index, model in enumerate(models)}
    found = [
        displacement(models, looks, first, paper),
        displacement_in_training(models, looks, paper),
        jump_rate(models, looks, first),
        *in_training(models, looks),
        *heat_maps(models, first),
        *by_layer(models, looks),
        *(read_out_difference(*compared, index) for index, compared in enumerate(comparisons)),
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
    """A line for each model; a logarithmic axis can be switched to linear. None without rows.

    Args:
        name, title, caption, table, convention: see :class:`Figure`.
        rows: see :func:`~jreg_megatron.report.charts.lines`; so are ``band`` and ``rule``.
        looks: by label, in order; may have more models.
        x, y: the axes.
        choices: of rows.
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
        found: values by label and horizontal place. Values that are not finite are in the table only.
        x, y: the axes.
        looks: by label; by default in order.
        table: the table's caption; by default the title.
        form: the format of the table's numbers.
        band: show the intervals over seeds.
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
    """Measured displacement per layer, with its spread over tokens."""
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
        # The first lines lie under the others.
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
    pick = ". Pick a model to see its band." if len({row["model"] for row in rows}) > BANDS else "."
    without_norm = _without_norm(last_ones.items())
    choices = [_states(rows)]
    if len(kinds) > 1:
        choices.append(Choice("first", "first token of each text", {kind: kind for kind in kinds}))
    return drawn(
        "displacement",
        "How far each layer turns the state",
        "Displacement Ψ is (1 - cosine) / 2 between a layer's input and its output: 0 is the same direction, "
        "0.5 is a right angle. The jump is a last point far above the point before."
        + (f" The band is one standard deviation over tokens, cut at the axis{pick}" if band else "")
        + (" Only the last of several checkpoints is shown." if any(m.is_series for m in models) else "")
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
        "Displacement Ψ of each layer in the log of the last validation. The last layer's output is taken "
        f"{_of_runs(models)}.{words}",
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
        "Jump rate ζ: the displacement of the last layer minus that of the layer before it, times 100; 0 if "
        f"that is negative. Measured on checkpoints. {said}" + _one_only(series, (first,)) + without_norm,
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
            "The last layer's jump, in the training log",
            "Jump rate ζ on validation data: the displacement of the last layer minus that of the layer "
            f"before it, times 100; 0 if negative. The last layer's output is taken {_of_runs(models)}.",
            {label: dict(zip(run.iterations, run.jump_rate, strict=True)) for label, run in runs.items()},
            STEP,
            _RATE,
            looks=looks,
            table="Jump rate ζ at each validation",
        ),
        curves(
            "validation_loss",
            "Validation loss over training",
            "Cross-entropy on held-out text. Lower is better.",
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
    """Displacement over layers and steps: one map for each model with several measured steps."""
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
        f"How far each layer turns the state, over training: {model.label}",
        "Each column is a checkpoint. Each row is a layer, the last layer on top. A brighter layer turns the "
        f"state further. Colours are logarithmic, and the same in all maps of this page. {said}"
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


def by_layer(models: Sequence[Model], looks: Looks) -> list[Figure | None]:
    """What each layer knows and is needed for, in the last evaluation of each model that has it."""
    return [
        _by_layer(models, looks, pick, name, title, caption, axis)
        for name, pick, title, caption, axis in _OF_LAYERS
    ]


def _behind(part: str, what: str) -> Callable[[Evaluated], dict[int, float]]:
    return lambda evaluated: dict(enumerate(getattr(getattr(evaluated, part), what, None) or ()))


def _without(evaluated: Evaluated) -> dict[int, float]:
    drop = evaluated.layer_drop
    return {layer: loss - drop.unchanged for layer, loss in enumerate(drop.loss, start=1)} if drop else {}


_READ_OUT = "The final norm and the head read the state behind each layer, as if the model ended there."
_OF_LAYERS: tuple[tuple[str, Callable[[Evaluated], dict[int, float]], str, str, Axis], ...] = (
    (
        "read_out_loss",
        _behind("read_out", "loss"),
        "What the middle layers already know",
        f"{_READ_OUT} A lower loss in the middle: the model knows more there. Layer 0 is the embedding.",
        _LOSS,
    ),
    (
        "lens_loss",
        _behind("lens", "loss"),
        "What the middle layers know, through a fitted lens",
        "An affine map first brings the state behind each layer near to the last layer's state. It was "
        "fitted on other texts. The remaining loss is what the layer does not know.",
        _LOSS,
    ),
    (
        "early_exit_accuracy",
        _behind("read_out", "accuracy"),
        "Right predictions at an exit after each layer",
        f"{_READ_OUT} The share of next tokens that are predicted right. Higher is better.",
        Axis("accuracy", zero=True),
    ),
    (
        "early_exit_agreement",
        _behind("read_out", "agreement"),
        "Final predictions at an exit after each layer",
        f"{_READ_OUT} The share of tokens with the prediction of the whole model.",
        Axis("agreement", zero=True),
    ),
    (
        "layer_drop",
        _without,
        "What each layer is needed for",
        "The rise of the loss without this one layer. Near 0 the layer does little.",
        Axis("rise of the loss (nats per token)", scale="auto"),
    ),
)


def _by_layer(
    models: Sequence[Model],
    looks: Looks,
    pick: Callable[[Evaluated], dict[int, float]],
    name: str,
    title: str,
    caption: str,
    axis: Axis,
) -> Figure | None:
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
        table=f"{title}: {axis.title}",
        form=LOSS if axis is _LOSS else "#.4g",
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
        f"Loss behind each layer of {b} minus that of {a}. Below 0, {b} is better. The band is the "
        f"{comparison.confidence:.0%} interval over texts. Where it excludes 0, other texts would hardly "
        "change the sign. Another training seed might.",
        rows,
        {"difference": Style.of(0)},
        LAYER,
        Axis("difference in loss"),
        Table.of("Difference in loss behind each layer", "layer", columns),
        band=True,
        rule=0,
    )


def _place(layer: int, state: State, entry: Measured) -> float | str:
    """The row of a layer in a table; the last layer has one row for each of its two states."""
    return f"{layer}, {STATE_WORDS[state]}" if layer == entry.num_layers else layer


def _named(name: str, entry: Measured, first: str) -> str:
    """The name of a column; it says so if the first token is not as wanted."""
    counted = entry.first_for(first)
    return name if counted == first else f"{name}, first token {counted}"


def _one_only(entries: Iterable[tuple[str, Measured]], order: Sequence[str]) -> str:
    """The sentences of a caption about models that were measured in one way only."""
    found: dict[str, list[str]] = {}
    for label, entry in entries:
        for kind in order:
            counted = entry.first_for(kind)
            if counted != kind and label not in found.setdefault(counted, []):
                found[counted].append(label)
    return "".join(
        f" Measured and shown only with the first token {counted}: {', '.join(labels)}."
        for counted, labels in found.items()
    )


def _without_norm(entries: Iterable[tuple[str, Measured]]) -> str:
    """The sentence of a caption about models without a final norm."""
    found = dict.fromkeys(label for label, entry in entries if STATES[1] not in entry.states)
    return f" No final norm, so no numbers after it: {', '.join(found)}." if found else ""


def _texts_measured(entries: Iterable[Measured]) -> str:
    """The sentence of a caption about models that were measured on different texts."""
    texts = {
        tuple(item for item in entry.conditions.items() if item[0].startswith("text ")) for entry in entries
    }
    return " The models read different texts; see the files at the end." if len(texts) > 1 else ""


def _other_texts(used: dict[str, Evaluated]) -> str:
    """The sentence of a caption about models that were evaluated on different texts."""
    texts: dict[str, list[str]] = {}
    for label, entry in used.items():
        read_out = entry.read_out or entry.lens
        words = [shortened(read_out.text, 80)] if read_out and read_out.text else []
        words += [f"{read_out.tokens:,} tokens"] if read_out and read_out.tokens is not None else []
        words += [f"max_tokens {entry.how['max tokens']}"] if "max tokens" in entry.how else []
        texts.setdefault(", ".join(words) or "unknown text", []).append(label)
    if len(texts) < 2:
        return ""
    each = "; ".join(f"{', '.join(labels)}: {words}" for words, labels in texts.items())
    return f" Not comparable, since the texts differ: {each}."


def _states(rows: list[Row]) -> Choice:
    there = {row["state"] for row in rows}
    return Choice("state", "last layer", {state: STATE_WORDS[state] for state in STATES if state in there})


def _of_runs(models: Sequence[Model]) -> str:
    states = dict.fromkeys(model.run.final_state for model in models if model.run)
    if len(states) == 1:
        return STATE_WORDS[next(iter(states))]
    named = {state: [m.label for m in models if m.run and m.run.final_state == state] for state in states}
    return " and ".join(f"{STATE_WORDS[state]} in {', '.join(labels)}" for state, labels in named.items())
