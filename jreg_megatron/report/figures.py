"""The figures of a report, as pure functions of its models. Each has a caption and a table of its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jreg_megatron.paper.over_seeds import INTERVAL, Estimate
from jreg_megatron.report.charts import BANDS, Axis, Chart, Row, Style, heat_map, lines
from jreg_megatron.report.inputs import STATE_WORDS, STATES, Comparison, Evaluated, Measured
from jreg_megatron.report.models import Model
from jreg_megatron.report.paper_profiles import PaperProfiles
from jreg_megatron.report.tables import LOSS, Cell, Table, p_value
from jreg_megatron.runtime.documents import shortened

STEP, LAYER = Axis("training step", whole=True, scale="auto"), Axis("layer", whole=True)
PSI = Axis("displacement Ψ", scale="auto")
_RATE = Axis("jump rate ζ", zero=True)
_LOSS = Axis("loss (nats per token)", format=".5~g")
_MAP_ROW, _MAP_LEAST, _MAP_MOST = 9, 150, 600

Looks = dict[str, Style]
Entries = Sequence[tuple[str, Measured]]
"""Measurements, each with the label of its model."""


@dataclass(frozen=True)
class Choice:
    """A choice of the reader: the value that a field has in the shown rows.

    ``options`` has the text of each value. The first value is the default.
    """

    field: str
    title: str
    options: dict[str, str]


@dataclass(frozen=True)
class Figure:
    """A picture with its table. The name is for files and links: small letters, digits and underscores."""

    name: str
    title: str
    caption: str
    chart: Chart
    table: Table
    looks: Looks
    """The legend, by label; may be empty."""
    choices: tuple[Choice, ...] = ()
    convention: str = ""
    """How the numbers were measured: the subtitle of the picture file."""


def figures(
    models: Sequence[Model],
    comparisons: Sequence[tuple[Comparison, str, str]] = (),
    first: str = "kept",
    paper: PaperProfiles | None = None,
) -> list[Figure]:
    """All figures that have numbers. Comparisons come with the labels of their models.

    ``first`` is ``kept`` or ``dropped``, for first tokens. ``paper`` is drawn under the displacement.
    """
    looks = {model.label: Style.of(index) for index, model in enumerate(models)}
    found = [
        _displacement(models, looks, first, paper),
        _jump_rate(models, looks, first),
        *(_curve(models, looks, first, paper, *curve) for curve in _CURVES),
        *_heat_maps(models, first),
        *(_read_out_difference(*compared, number) for number, compared in enumerate(comparisons, start=1)),
    ]
    return [figure for figure in found if figure is not None]


def drawn(
    name: str,
    title: str,
    caption: str,
    rows: Iterable[Row],
    x: Axis,
    y: Axis,
    *,
    looks: Looks | None = None,
    table: Table | str = "",
    form: str = "#.4g",
    convention: str = "",
    band: bool = False,
    rule: float | None = None,
) -> Figure | None:
    """A line for each model. The reader can make a logarithmic axis linear. None without a finite number.

    Args:
        rows: as for :func:`~.charts.lines`. Values that are not finite are only in the table. A value's place
            in the table is ``column`` and ``row``, by default its model and its ``x``. With None for ``row``
            it is not in the table. The reader chooses a value of ``state``, and of ``first`` if there are
            several.
        looks: by label, in order. It may have more models.
        table: the table, or its caption; by default the title. ``form`` is the format of its numbers.
    """
    rows = list(rows)
    values = [row.get("y", row.get("seed")) for row in rows]
    found = [
        {key: cell for key, cell in row.items() if key not in ("column", "row")}
        for row, value in zip(rows, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if not (means := [row for row in found if "y" in row]):
        return None
    labels = dict.fromkeys(row["model"] for row in found)
    looks = looks or {label: Style.of(0) for label in labels}
    shown = {label: style for label, style in looks.items() if label in labels}
    found.sort(key=lambda row: not shown[row["model"]].thin)  # later lines are drawn over earlier ones
    x, y = x.fitted(means, "x"), y.fitted(means, "y")
    choices = _choices(rows)
    chosen = {choice.field: next(iter(choice.options)) for choice in choices}
    if y.scale == "log":
        caption += " The axis is logarithmic: equal distances are equal factors."
        choices.append(Choice("scale", "axis", {"log": "logarithmic", "linear": "linear"}))
        floor = min((row["y"] for row in means if row["y"] > 0), default=1e-9) / 2
        for row in means:
            if row.get("low") is not None:
                row["low"] = max(floor, row["low"])
    chart = lines(found, shown, x, y, choices=chosen, band=band, rule=rule)
    if not isinstance(table, Table):
        table = _numbers(table or title, x.title.removeprefix("training "), rows, form)
    return Figure(name, title, caption, chart, table, shown, tuple(choices), convention.strip())


def _numbers(caption: str, corner: str, rows: Iterable[Row], form: str = "#.4g") -> Table:
    """The table of a figure's rows."""
    columns: dict[Any, dict[Any, Cell]] = {}
    for row in rows:
        if "y" in row and (place := row.get("row", row["x"])) is not None:
            columns.setdefault(row.get("column", row["model"]), {})[place] = row["y"]
    return Table.of(caption, corner, columns, form)


def curves(
    name: str,
    title: str,
    caption: str,
    found: Mapping[str, Mapping[Any, Estimate | float] | Sequence[tuple[Any, float]]],
    x: Axis,
    y: Axis,
    *,
    seeds: Sequence[Row] = (),
    **more: Any,
) -> Figure | None:
    """:func:`drawn` for points by label: the mean over seeds of the values at each place.

    With ``band`` its interval is drawn too. ``seeds`` are rows of single seeds.
    """
    rows: list[Row] = []
    looks: Looks = {}
    for label, points in found.items():
        at: dict[Any, list[Any]] = {}
        for place, value in points.items() if isinstance(points, Mapping) else points:
            at.setdefault(place, []).append(value)
        looks |= {label: Style.of(len(looks))} if at else {}
        for place, values in sorted(at.items()):
            of = values[0] if isinstance(values[0], Estimate) else Estimate.of(values)
            assert of is not None  # there are values
            ends = {
                "low": of.mean if of.low is None else of.low,
                "high": of.mean if of.high is None else of.high,
            }
            rows.append({"model": label, "x": place, "y": of.mean} | (ends if more.get("band") else {}))
    caption += f" The band is the {INTERVAL}." if more.get("band") else ""
    return drawn(name, title, caption, [*rows, *seeds], x, y, **{"looks": looks} | more)


def _displacement(
    models: Sequence[Model], looks: Looks, first: str, paper: PaperProfiles | None
) -> Figure | None:
    """Measured displacement per layer, with its spread over tokens."""
    entries = [(model.label, model.measured[-1]) for model in models if model.measured]
    if not entries:
        return None
    kinds = sorted({kind for _, entry in entries for kind in entry.blocks}, key=lambda kind: kind != first)
    depth = max(entry.num_layers for _, entry in entries)
    rows: list[Row] = []
    for kind in kinds:
        of_kind = list(_turns(entries, kind))
        of_kind += paper.rows(depth, f", {STATE_WORDS[STATES[0]]}", state=STATES[0]) if paper else []
        rows += [row | {"first": kind} | ({} if kind == kinds[0] else {"row": None}) for row in of_kind]
    band = any(row["low"] is not None for row in rows)
    pick = ". Pick a model to see its band." if len({row["model"] for row in rows}) > BANDS else "."
    about, convention = _about(entries, kinds)
    return drawn(
        "displacement",
        "How far each layer turns the state",
        "Displacement Ψ is (1 - cosine) / 2 between a layer's input and its output: 0 is the same direction, "
        "0.5 is a right angle. The jump is a last point far above the point before."
        + (f" The band is one standard deviation over tokens, cut at the axis{pick}" if band else "")
        + (_LAST if any(m.is_series for m in models) else "")
        + about
        + (paper.words(depth, any(row["state"] == STATES[1] for row in rows)) if paper else ""),
        rows,
        LAYER,
        PSI,
        looks=looks | paper.looks if paper else looks,
        table=f"Displacement Ψ of each layer, mean over tokens, first token {kinds[0]}",
        convention=convention + (f" {paper.origin(depth)}" if paper else ""),
        band=band,
    )


def _jump_rate(models: Sequence[Model], looks: Looks, first: str) -> Figure | None:
    """zeta_L over training, for models that were measured at several steps."""
    entries = [(model.label, entry) for model in models if model.is_series for entry in model.measured]
    rows: list[Row] = [
        {"model": label, "x": entry.step, "y": rate, "state": state}
        | {"column": f"{label}, {STATE_WORDS[state]}"}
        for label, entry in entries
        for state in entry.states
        if entry.step is not None and (rate := entry.blocks[first].jump_rate.get(state)) is not None
    ]
    about, convention = _about(entries, (first,))
    return drawn(
        "jump_rate",
        "The last layer's jump over training",
        "Jump rate ζ: the displacement of the last layer minus that of the layer before it, times 100; 0 if "
        "that is negative. Measured on checkpoints." + about,
        rows,
        STEP,
        _RATE,
        looks=looks,
        table=f"Jump rate ζ at each step, first token {first}",
        convention=convention,
    )


def _heat_maps(models: Sequence[Model], first: str) -> Iterator[Figure]:
    """Displacement over layers and steps: one map for each model with several measured steps."""
    series = {
        model: [(f"step {entry.step:,}", entry) for entry in model.measured if entry.step is not None]
        for model in models
        if model.is_series
    }
    turns = {model: list(_turns(entries, first)) for model, entries in series.items()}
    values = [row["y"] for rows in turns.values() for row in rows if row["y"] > 0]
    low, high = min(values, default=1e-3), max(values, default=1.0)
    low = low / 2 if low == high else low
    for number, (model, entries) in enumerate(series.items(), start=1):
        steps = {label: entry.step for label, entry in entries}
        rows = [
            {"step": steps[row["model"]], "layer": row["x"], "state": row["state"], "value": row["y"]}
            for row in turns[model]
        ]
        height = min(max(_MAP_LEAST, _MAP_ROW * (model.num_layers or 1)), _MAP_MOST)
        about, convention = _about([(model.label, entry) for _, entry in entries], (first,))
        yield Figure(
            f"heat_map_{number}",
            f"How far each layer turns the state, over training: {model.label}",
            "Each column is a checkpoint. Each row is a layer, the last layer on top. A brighter layer turns "
            "the state further. Colours are logarithmic, and the same in all maps of this page." + about,
            heat_map(rows, low=low, high=high, height=height),
            _numbers(f"Displacement Ψ by layer and step, first token {first}", "layer", turns[model]),
            {},
            choices=tuple(_choices(rows)),
            convention=convention,
        )


_LAST = " Only the last of several checkpoints is shown."
_READ_OUT = "The final norm and the head read the state after each layer, as if the model ended there."
_ADDED = {"attention": "attention", "mlp": "MLP", "layer": "both"}
_SIGNED = ("depth_cosines", "depth_alignment")
_TABLES = {
    "displacement": "Displacement Ψ of each layer at the last validation",
    "jump_rate": "Jump rate ζ at each validation",
    "validation_loss": "Validation loss, nats per token",
}
# Name, number of a model (or several, with texts among which the reader chooses), title, caption and axes.
# {first}: "kept" or "dropped". {taken}: before or after the final norm.
_CURVES = (
    (
        "displacement_in_training",
        "displacement",
        "How far each layer turns the state, at the end of training",
        "Displacement Ψ of each layer in the log of the last validation. The last layer's output is taken "
        "{taken}.",
        (LAYER, PSI),
    ),
    (
        "jump_rate_in_training",
        "jump_rate",
        "The last layer's jump, in the training log",
        "Jump rate ζ on validation data: the displacement of the last layer minus that of the layer "
        "before it, times 100; 0 if negative. The last layer's output is taken {taken}.",
        (STEP, _RATE),
    ),
    (
        "validation_loss",
        "validation_loss",
        "Validation loss over training",
        "Cross-entropy on held-out text. Lower is better.",
        (STEP, _LOSS),
    ),
    (
        "read_out_loss",
        "read_out.loss",
        "Next-token loss at each layer",
        f"{_READ_OUT} A lower loss in the middle: the model knows more there. Layer 0 is the embedding.",
        (LAYER, _LOSS),
    ),
    (
        "lens_loss",
        "lens.loss",
        "With a fitted lens: next-token loss at each layer",
        "An affine map first brings the state after each layer near to the last layer's state. It was "
        "fitted on other texts. The remaining loss is what the layer does not know.",
        (LAYER, _LOSS),
    ),
    (
        "early_exit_accuracy",
        "read_out.accuracy",
        "Right predictions at an exit after each layer",
        f"{_READ_OUT} The share of next tokens that are predicted right. Higher is better.",
        (LAYER, Axis("accuracy", zero=True)),
    ),
    (
        "early_exit_agreement",
        "read_out.agreement",
        "Final predictions at an exit after each layer",
        f"{_READ_OUT} The share of tokens with the prediction of the whole model.",
        (LAYER, Axis("agreement", zero=True)),
    ),
    (
        "layer_drop",
        "layer_drop",
        "Loss without one layer",
        "The rise of the loss without this one layer. Near 0 the layer does little.",
        (LAYER, Axis("rise of the loss (nats per token)", scale="auto")),
    ),
    (
        "depth_voids",
        "{first}.void_share",
        "Void layers",
        "The share of tokens for which a layer is void (LAC): the state's norm grows by less than 0.8 of the "
        "spread of its growth in the layers before.",
        (LAYER, Axis("share of tokens", zero=True)),
    ),
    (
        "depth_contributions",
        {f"{{first}}.{key}_ratio": words for key, words in _ADDED.items()},
        "How much attention and MLP add",
        "The norm of what is added, relative to that of the state to which it is added; mean over tokens.",
        (LAYER, Axis("relative norm", scale="auto")),
    ),
    (
        "depth_cosines",
        {f"{{first}}.{key}_cosine": words for key, words in _ADDED.items()},
        "Whether attention and MLP erase or amplify",
        "The cosine of what is added to the state to which it is added; mean over tokens. Below 0 it erases, "
        "above 0 it amplifies.",
        (LAYER, Axis("cosine")),
    ),
    (
        "depth_entropy",
        "{first}.matrix_entropy",
        "How many directions the states take",
        "Matrix entropy of a sequence's states after each layer, minus their mean: 0 if all are equal, 1 if "
        "they are spread evenly over all directions. States on a line may have more than 0, since negative "
        "entries of the Gram matrix count as 0. Layer 0 is the embedding.",
        (LAYER, Axis("matrix entropy")),
    ),
    (
        "depth_curvature",
        "{first}.curvature",
        "How sharply the states turn from token to token",
        "Mean angle of the steps from one token's state to the next one's, as lines: arccos of the absolute "
        "cosine, in [0, π/2]. A step straight back counts as 0. The states are centred and of norm 1. "
        "Layer 0 is the embedding.",
        (LAYER, Axis("curvature (radians)")),
    ),
    (
        "depth_kl",
        "depth.kl",
        "How far each layer's prediction is from the final one",
        f"{_READ_OUT} KL divergence of its distribution over tokens from that of the whole model.",
        (LAYER, Axis("KL divergence (nats)", scale="auto")),
    ),
    (
        "depth_top5",
        "depth.top5_overlap",
        "How many of its likeliest tokens are among the final ones",
        f"{_READ_OUT} The share of its five likeliest tokens that are among the whole model's five.",
        (LAYER, Axis("top-5 overlap", zero=True)),
    ),
    (
        "depth_alignment",
        "depth.alignment",
        "Where states begin to point to the next token",
        "Mean cosine of the state and the input embedding of the next token, minus that of the state and its "
        "own token's. Above 0 the state points to the next token.",
        (LAYER, Axis("difference of cosines")),
    ),
    (
        "depth_skipping",
        {"depth.skip_output": "of the output", "depth.skip_later": "of later layers"},
        "Change without one layer",
        "Of the output: norm of the change of the probabilities. Of later layers: relative change of what "
        "they add, mean over these layers. Means over tokens. A sequence's first token keeps the layer.",
        (LAYER, Axis("change", scale="auto")),
    ),
)


def _curve(
    models: Sequence[Model],
    looks: Looks,
    first: str,
    paper: PaperProfiles | None,
    name: str,
    what: str | Mapping[str, str],
    *about: Any,
) -> Figure | None:
    """Numbers over training or by layer, from each model's last measurement, evaluation or run with them."""
    title, caption, axes = about
    named = {what: ""} if isinstance(what, str) else what
    parts = {key.format(first=first): words for key, words in named.items()}
    every = [(m.label, each) for m in models for each in (*m.measured[-1:], *m.evaluated, m.run) if each]
    found = {label: each for label, each in every if any(map(each.by_layer, parts))}
    rows: list[Row] = [
        {"model": label, "x": place, "y": value}
        | ({"part": words, "column": f"{label}, {words}"} if words else {})
        for label, entry in found.items()
        for key, words in parts.items()
        for place, value in entry.by_layer(key).items()
    ]
    other = _other_texts({label: entry for label, entry in found.items() if isinstance(entry, Evaluated)})
    convention = "The models read different texts." if other else ""
    measured = {label: entry for label, entry in found.items() if isinstance(entry, Measured)}
    if measured:  # before the final norm
        other, convention = _about([*measured.items()], (first,), after_norm=False)
        other += _LAST if any(m.is_series and m.label in measured for m in models) else ""
    if paper and what == "displacement" and any(row["y"] is not None for row in rows):
        depth = max(row["x"] for row in rows)
        rows += paper.rows(depth)
        looks, other, convention = looks | paper.looks, paper.words(depth), paper.origin(depth)
    return drawn(
        name,
        title,
        caption.format(taken=_of_runs(models)) + other,
        rows,
        *axes,
        looks=looks,
        table=_TABLES.get(next(iter(parts)), f"{title}: {axes[1].title}"),
        form=LOSS if axes[1] is _LOSS else "#.4g",
        convention=convention,
        rule=0 if name in _SIGNED else None,
    )


def _read_out_difference(comparison: Comparison, a: str, b: str, number: int) -> Figure | None:
    """Difference of the loss after each layer between two models, with its interval."""
    found = comparison.read_out
    if found is None:
        return None
    intervals = [interval or (None, None) for interval in found.interval or [None] * len(found.difference)]
    lows, highs = zip(*intervals, strict=True) if intervals else ((), ())
    columns: dict[str, Sequence[Any]] = {"difference": found.difference, "from": lows, "to": highs}
    for name, values in {"p": found.p_value, "p, adjusted": found.p_adjusted}.items():
        columns |= {name: list(map(p_value, values))} if values and set(values) != {None} else {}
    numbers = {name: dict(enumerate(values)) for name, values in columns.items()}
    return drawn(
        f"read_out_difference{f'_{number}' if number > 1 else ''}",
        "Which model's middle layers know more",
        f"Loss after each layer of {b} minus that of {a}. Below 0, {b} is better. The band is the "
        f"{comparison.confidence:.0%} interval over texts. Where it excludes 0, other texts would hardly "
        "change the sign. Another training seed might.",
        [
            {"model": "difference", "x": layer, "y": value, "low": lows[layer], "high": highs[layer]}
            for layer, value in enumerate(found.difference)
        ],
        LAYER,
        Axis("difference in loss"),
        table=Table.of("Difference in loss after each layer", "layer", numbers),
        band=True,
        rule=0,
    )


def _turns(entries: Entries, kind: str) -> Iterator[Row]:
    """Psi of each layer and state: rows for :func:`drawn`, with the spread over tokens as band.

    In a table the last layer has one row for each of its two states.
    """
    for label, block in ((label, entry.blocks[kind]) for label, entry in entries if kind in entry.blocks):
        for state in block.states:
            turns = block.displacement[state]
            spreads = block.displacement_std[state] if block.displacement_std else [None] * len(turns)
            for layer, (psi, spread) in enumerate(zip(turns, spreads, strict=True), start=1):
                low, high = (None, None) if spread is None else (psi - spread, psi + spread)
                row = f"{layer}, {STATE_WORDS[state]}" if layer == len(turns) else layer
                found = {"model": label, "x": layer, "y": psi, "low": low, "high": high}
                yield found | {"state": state, "row": row}


def _about(entries: Entries, kinds: Sequence[str], *, after_norm: bool = True) -> tuple[str, str]:
    """How the models were measured: the sentences for a caption, and those for a picture file.

    They name the kind of first token, models without a final norm (if the figure has numbers ``after_norm``),
    and different texts. With several ``kinds`` of first token the reader chooses one.
    """
    texts = {tuple(item for item in e.conditions.items() if item[0].startswith("text ")) for _, e in entries}
    differ = " The models read different texts." if len(texts) > 1 else ""
    said = f"First token of each text {kinds[0]}."
    none_after = (label for label, entry in entries if STATES[1] not in entry.states)
    without = dict.fromkeys(none_after if after_norm else ())
    norm = f" No final norm, so no numbers after it: {', '.join(without)}." if without else ""
    caption = (f" {said}" if len(kinds) == 1 else "") + norm + differ
    return caption + (" See the files at the end." if differ else ""), said + norm + differ


def _other_texts(used: Mapping[str, Evaluated]) -> str:
    """A caption's sentence on models that were evaluated on different texts; empty if the texts are equal."""
    texts: dict[str, list[str]] = {}
    for label, entry in used.items():
        read_out = entry.read_out or entry.lens or entry.depth
        words = [shortened(read_out.text, 80)] if read_out and read_out.text else []
        words += [f"{read_out.tokens:,} tokens"] if read_out and read_out.tokens is not None else []
        words += [f"max_tokens {entry.how['max tokens']}"] if "max tokens" in entry.how else []
        texts.setdefault(", ".join(words) or "unknown text", []).append(label)
    each = "; ".join(f"{', '.join(labels)}: {words}" for words, labels in texts.items())
    return f" Not comparable, since the texts differ: {each}." if len(texts) > 1 else ""


def _choices(rows: Sequence[Row]) -> list[Choice]:
    """The reader's choices of fields that select rows. The first row has the defaults."""
    found = []
    for name, title in {"state": "last layer", "first": "first token of each text", "part": "shown"}.items():
        values = dict.fromkeys(row[name] for row in rows if name in row)
        options = {value: STATE_WORDS.get(value, value) for value in values}
        found += [Choice(name, title, options)] if options and (name == "state" or len(options) > 1) else []
    return found


def _of_runs(models: Sequence[Model]) -> str:
    named: dict[str | None, list[str]] = {}
    for model in models:
        if model.run:
            named.setdefault(model.run.final_state, []).append(model.label)
    if len(named) == 1:
        return STATE_WORDS[next(iter(named))]
    return " and ".join(f"{STATE_WORDS[state]} in {', '.join(labels)}" for state, labels in named.items())
