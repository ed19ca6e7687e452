"""The figures of a report: pure functions of its models, each with its caption and its numbers as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from jreg_megatron.report.charts import BANDS, Axis, Chart, Row, Style, heat_map, lines, log_ticks
from jreg_megatron.report.check import shortened
from jreg_megatron.report.inputs import STATE_WORDS, STATES, Comparison, Evaluated, Measured
from jreg_megatron.report.models import Model
from jreg_megatron.report.paper_profiles import PaperProfiles
from jreg_megatron.report.tables import LOSS, Table, known, p_value

_DWARFS = 8.0
"""The largest displacement over the median one, from which on a linear axis hides most layers."""
_TEXTS_DIFFER = "The models read different texts."
_PSI = "displacement Ψ"
_STEP, _LAYER = Axis("training step", whole=True), Axis("layer", whole=True)
_LOSS = Axis("loss (nats per token)", format=".5~g")
_MAP_ROW, _MAP_LEAST, _MAP_MOST = 9, 150, 600


@dataclass(frozen=True)
class Choice:
    """A few of a figure's rows to be shown at a time."""

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
    """What a picture that stands alone has to say of how it was measured; empty if nothing."""


Looks = dict[str, Style]


def figures(
    models: Sequence[Model],
    comparisons: Sequence[tuple[Comparison, str, str]],
    first: str,
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
    found: list[Figure | None] = [
        displacement(models, looks, first, paper),
        displacement_in_training(models, looks, paper),
        jump_rate(models, looks, first),
        jump_rate_in_training(models, looks),
        *heat_maps(models, first),
        validation_loss(models, looks),
        *read_outs(models, looks),
        *(
            read_out_difference(comparison, a, b, "" if index == 0 else f"_{index + 1}")
            for index, (comparison, a, b) in enumerate(comparisons)
        ),
        layer_drop(models, looks),
    ]
    return [figure for figure in found if figure is not None]


def displacement(
    models: Sequence[Model], looks: Looks, first: str, paper: PaperProfiles | None = None
) -> Figure | None:
    """Displacement per layer as measured, with its spread over tokens."""
    rows: list[Row] = []
    columns: dict[str, dict[str, float | str | None]] = {}
    values: list[float] = []
    last_ones = {model.label: model.measured[-1] for model in models if model.measured}
    there = {kind for entry in last_ones.values() for kind, _ in entry.layers}
    order = sorted(there, key=lambda kind: kind != first)
    for (label, entry), kind, state in product(last_ones.items(), order, STATES):
        if state not in entry.states:
            continue
        block = entry.layers[entry.first_for(kind), state]
        values += [psi for psi in block.displacement if psi > 0]
        numbers = enumerate(zip(block.displacement, block.spread or block.displacement, strict=True), 1)
        for layer, (psi, spread) in numbers:
            row: Row = {"model": label, "x": layer, "y": psi, "state": state, "first": kind}
            row |= {"spread": spread if block.spread else None, "low": None, "high": None}
            rows.append(row)
            if kind == order[0]:
                last = layer == entry.origin.num_layers
                name = f"{layer}, {STATE_WORDS[state]}" if last else str(layer)
                columns.setdefault(_named(label, entry, kind), {})[name] = psi
    if not rows:
        return None
    depth = max(entry.origin.num_layers for entry in last_ones.values())
    if paper is not None:
        none: dict[str, str | None] = dict.fromkeys(("spread", "low", "high"))
        fields = [{"state": STATES[0], "first": kind, **none} for kind in order]
        # Drawn first, they lie under the others.
        rows = [row for own in fields for row in paper.rows(depth, **own)] + rows
        columns |= paper.columns(f", {STATE_WORDS[STATES[0]]}")
        looks = looks | paper.looks
        values += [psi for profile in paper.displacement.values() for psi in profile]
    floor = min(values, default=1e-9) / 2
    for row in rows:
        if isinstance(row["spread"], float) and isinstance(row["y"], float):
            row["low"], row["high"] = max(floor, row["y"] - row["spread"]), row["y"] + row["spread"]
    log = _dwarfed(values)
    choices = [_states(rows)]
    if len(order) > 1:
        choices.append(Choice("first", "first token of each text", {kind: kind for kind in order}))
    if log:
        choices.append(Choice("scale", "axis", {"log": "logarithmic", "linear": "linear"}))
    band = any(row["spread"] is not None for row in rows)
    shown = _shown(rows, looks)
    return Figure(
        "displacement",
        "How far each layer turns the state",
        "Displacement Ψ is half of one minus the cosine between a layer's input and its output: 0 leaves the "
        "direction as it is, 0.5 is a right angle. A last point far above the one before is the jump."
        + (" The band is one standard deviation over tokens, cut off at the axis" if band else "")
        + ((": pick a model to see its own." if len(shown) > BANDS else ".") if band else "")
        + (" The axis is logarithmic: equal distances are equal factors." if log else "")
        + (" Of several checkpoints the last is shown." if any(m.is_series for m in models) else "")
        + (f" {_tokens(order[0])}" if len(order) == 1 else "")
        + _one_only(last_ones.items(), order)
        + _without_norm(last_ones.items())
        + _texts_measured(last_ones.values())
        + ("" if paper is None else paper.words(depth, any(row["state"] == STATES[1] for row in rows))),
        lines(
            rows,
            shown,
            _LAYER,
            _vertical(_PSI, rows, log),
            choices={choice.field: choice.first for choice in choices if choice.field != "scale"},
            band=band,
        ),
        Table.of(f"Displacement Ψ of each layer, mean over tokens, first token {order[0]}", "layer", columns),
        shown,
        tuple(choices),
        _tokens(order[0]) + _without_norm(last_ones.items()) + _grey(paper, depth),
    )


def displacement_in_training(
    models: Sequence[Model], looks: Looks, paper: PaperProfiles | None = None
) -> Figure | None:
    """Displacement per layer at the last validation of runs."""
    rows: list[Row] = []
    columns: dict[str, dict[str, float | str | None]] = {}
    for model in models:
        for layer, psi in enumerate(model.run.displacement if model.run else (), start=1):
            if known(psi) is not None:
                rows.append({"model": model.label, "x": layer, "y": psi})
            columns.setdefault(model.label, {})[str(layer)] = known(psi)
    if not rows:
        return None
    depth = max(len(model.run.displacement) for model in models if model.run)
    if paper is not None:
        rows = paper.rows(depth) + rows
        columns |= paper.columns()
        looks = looks | paper.looks
    log = _dwarfed([float(row["y"] or 0) for row in rows if float(row["y"] or 0) > 0])
    shown = _shown(rows, looks)
    return Figure(
        "displacement_in_training",
        "How far each layer turns the state, at the end of training",
        "Displacement Ψ of each layer as training logged it at the last validation. The last layer's output "
        f"is taken {_of_runs(models)}."
        + (" The axis is logarithmic." if log else "")
        + ("" if paper is None else paper.words(depth)),
        lines(rows, shown, _LAYER, _vertical(_PSI, rows, log)),
        Table.of("Displacement Ψ of each layer at the last validation", "layer", columns),
        shown,
        (Choice("scale", "axis", {"log": "logarithmic", "linear": "linear"}),) if log else (),
        _grey(paper, depth).strip(),
    )


def jump_rate(models: Sequence[Model], looks: Looks, first: str) -> Figure | None:
    """zeta_L of models that were measured at several steps."""
    rows: list[Row] = []
    columns: dict[str, dict[int, float]] = {}
    for model in models:
        for entry in model.measured if model.is_series else ():
            for state in entry.states:
                rate = entry.layers[entry.first_for(first), state].jump_rate
                if entry.origin.step is None or rate is None:
                    continue
                rows.append({"model": model.label, "x": entry.origin.step, "y": rate, "state": state})
                name = f"{_named(model.label, entry, first)}, {STATE_WORDS[state]}"
                columns.setdefault(name, {})[entry.origin.step] = rate
    if not rows:
        return None
    shown, choice = _shown(rows, looks), _states(rows)
    series = [(model.label, entry) for model in models if model.is_series for entry in model.measured]
    return Figure(
        "jump_rate",
        "The last layer's jump over training",
        "Jump rate ζ: how much further the last layer turns the state than the layer before it, in "
        f"hundredths of displacement. Measured on checkpoints; 0 is no jump. {_tokens(first)}"
        + _one_only(series, (first,))
        + _without_norm(series),
        lines(rows, shown, _steps(rows), Axis("jump rate ζ", zero=True), choices={"state": choice.first}),
        _by_step(f"Jump rate ζ at each step, first token {first}", columns),
        shown,
        (choice,),
        _tokens(first) + _without_norm(series),
    )


def jump_rate_in_training(models: Sequence[Model], looks: Looks) -> Figure | None:
    """zeta_L as runs logged it."""
    rows, columns = _of_histories(models, lambda model: model.run.jump_rate if model.run else ())
    if not rows:
        return None
    shown = _shown(rows, looks)
    return Figure(
        "jump_rate_in_training",
        "The last layer's jump, as training logged it",
        "Jump rate ζ on validation data: how much further the last layer turns the state than the layer "
        f"before it, in hundredths of displacement. The last layer's output is taken {_of_runs(models)}.",
        lines(rows, shown, _steps(rows), Axis("jump rate ζ", zero=True)),
        _by_step("Jump rate ζ at each validation", columns),
        shown,
    )


def validation_loss(models: Sequence[Model], looks: Looks) -> Figure | None:
    """Validation loss of runs."""
    rows, columns = _of_histories(models, lambda model: model.run.validation_loss if model.run else ())
    if not rows:
        return None
    shown = _shown(rows, looks)
    return Figure(
        "validation_loss",
        "Validation loss over training",
        "Cross-entropy on held-out text; lower is better.",
        lines(rows, shown, _steps(rows), _LOSS),
        _by_step("Validation loss, nats per token", columns, LOSS),
        shown,
    )


def heat_maps(models: Sequence[Model], first: str) -> list[Figure]:
    """Displacement over layers and steps, one map for each model that was measured at several."""
    series = [model for model in models if model.is_series]
    values = [
        psi
        for model in series
        for entry in model.measured
        for state in entry.states
        for psi in entry.layers[entry.first_for(first), state].displacement
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
    columns: dict[str, dict[str, float | str | None]] = {}
    for entry in model.measured:
        if entry.origin.step is None:
            continue
        step = entry.origin.step
        for state in entry.states:
            for layer, psi in enumerate(entry.layers[entry.first_for(first), state].displacement, start=1):
                row: Row = {"step": step, "layer": layer, "state": state}
                rows.append(row | {"value": max(psi, low), "exact": psi})
                words = f"{layer}, {STATE_WORDS[state]}" if layer == entry.origin.num_layers else str(layer)
                columns.setdefault(_named(f"step {step:,}", entry, first), {})[words] = psi
    return Figure(
        name,
        f"Where the turning is, over training: {model.label}",
        "Each column is a checkpoint, each row a layer, the last one on top; brighter turns the state "
        f"further. The colours are logarithmic and the same in all maps of this page. {_tokens(first)}"
        + _one_only(((model.label, entry) for entry in model.measured), (first,))
        + _without_norm((model.label, entry) for entry in model.measured),
        heat_map(
            rows,
            low=low,
            high=high,
            height=min(max(_MAP_LEAST, _MAP_ROW * (model.num_layers or 1)), _MAP_MOST),
        ),
        Table.of(f"Displacement Ψ by layer and step, first token {first}", "layer", columns),
        (),
        (_states(rows),),
        _tokens(first) + _without_norm((model.label, entry) for entry in model.measured),
    )


def read_outs(models: Sequence[Model], looks: Looks) -> list[Figure | None]:
    """Loss, accuracy and agreement behind each layer."""
    about = (
        "The state behind each layer goes through the final norm and the head, as if the model ended there"
    )
    return [
        _read_out(
            models,
            looks,
            "read_out_loss",
            "What the middle layers already know",
            f"{about}. Lower loss in the middle means more is known earlier. Layer 0 is the embedding.",
            _LOSS,
            lambda evaluated: evaluated.read_out.loss if evaluated.read_out else None,
        ),
        _read_out(
            models,
            looks,
            "lens_loss",
            "What the middle layers know, read out through a fitted lens",
            "The state behind each layer first goes through the affine map that brings it nearest to the "
            "last layer's, fitted on other texts. What is left is what the layer does not know.",
            _LOSS,
            lambda evaluated: evaluated.lens.loss if evaluated.lens else None,
        ),
        _read_out(
            models,
            looks,
            "early_exit_accuracy",
            "Right predictions, leaving after each layer",
            f"{about}: the share of next tokens predicted right. Higher is better.",
            Axis("accuracy", zero=True),
            lambda evaluated: evaluated.read_out.accuracy if evaluated.read_out else None,
        ),
        _read_out(
            models,
            looks,
            "early_exit_agreement",
            "Predictions that are final, leaving after each layer",
            f"{about}: the share of tokens for which it predicts what the whole model predicts.",
            Axis("agreement", zero=True),
            lambda evaluated: evaluated.read_out.agreement if evaluated.read_out else None,
        ),
    ]


def _read_out(
    models: Sequence[Model],
    looks: Looks,
    name: str,
    title: str,
    caption: str,
    axis: Axis,
    pick: Callable[[Evaluated], tuple[float, ...] | None],
) -> Figure | None:
    rows: list[Row] = []
    columns: dict[str, dict[str, float | str | None]] = {}
    used: dict[str, Evaluated] = {}
    for model in models:
        entry = next((e for e in reversed(model.evaluated) if pick(e)), None)
        if entry is not None:
            used[model.label] = entry
        for layer, value in enumerate((pick(entry) or ()) if entry else ()):
            rows.append({"model": model.label, "x": layer, "y": value})
            columns.setdefault(model.label, {})[str(layer)] = value
    if not rows:
        return None
    shown = _shown(rows, looks)
    form = LOSS if axis is _LOSS else "#.4g"
    table = Table.of(f"{title}: {axis.title}", "layer", columns, form=form)
    other = _other_texts(used)
    chart = lines(rows, shown, _LAYER, axis)
    return Figure(
        name, title, caption + other, chart, table, shown, convention=_TEXTS_DIFFER if other else ""
    )


def read_out_difference(comparison: Comparison, a: str, b: str, suffix: str) -> Figure | None:
    """Difference of the loss behind each layer between two models, with its interval."""
    if not comparison.read_out:
        return None
    rows: list[Row] = []
    columns: dict[str, dict[str, float | str | None]] = {}
    label = "difference"
    for layer, difference in enumerate(comparison.read_out):
        low, high = difference.interval or (None, None)
        rows.append({"model": label, "x": layer, "y": difference.value, "low": low, "high": high})
        parts: dict[str, float | str | None] = {"difference": difference.value, "from": low, "to": high}
        parts |= {} if difference.p_value is None else {"p": p_value(difference.p_value)}
        parts |= {} if difference.p_adjusted is None else {"p, adjusted": p_value(difference.p_adjusted)}
        for column, value in parts.items():
            columns.setdefault(column, {})[str(layer)] = value
    return Figure(
        f"read_out_difference{suffix}",
        "Which model's middle layers know more",
        f"Loss behind each layer of {b} less that of {a}; below 0, {b} is better. The band is the "
        f"{comparison.confidence:.0%} interval over texts: where it does not touch 0, other texts "
        "would hardly change the sign. Training anew, with another seed, might.",
        lines(rows, [(label, Style.of(0))], _LAYER, Axis("difference in loss"), band=True, rule=0),
        Table.of("Difference in loss behind each layer", "layer", columns),
    )


def layer_drop(models: Sequence[Model], looks: Looks) -> Figure | None:
    """How much worse a model gets without one of its layers."""
    rows: list[Row] = []
    columns: dict[str, dict[str, float | str | None]] = {}
    used: dict[str, Evaluated] = {}
    for model in models:
        entry = next((e for e in reversed(model.evaluated) if e.layer_drop is not None), None)
        drop = entry.layer_drop if entry else None
        if entry is not None:
            used[model.label] = entry
        for layer, loss in enumerate(drop.loss if drop else (), start=1):
            rise = loss - (drop.unchanged if drop else 0)
            rows.append({"model": model.label, "x": layer, "y": rise})
            columns.setdefault(model.label, {})[str(layer)] = rise
    if not rows:
        return None
    log = _dwarfed([float(row["y"] or 0) for row in rows if float(row["y"] or 0) > 0])
    log = log and all(float(row["y"] or 0) > 0 for row in rows)
    shown = _shown(rows, looks)
    return Figure(
        "layer_drop",
        "What each layer is needed for",
        "How much the loss rises when this one layer is left out; near 0 the layer does little."
        + (" The axis is logarithmic." if log else "")
        + (other := _other_texts(used)),
        lines(rows, shown, _LAYER, _vertical("rise of the loss (nats per token)", rows, log)),
        Table.of("Rise of the loss without each layer, nats per token", "layer", columns),
        shown,
        (Choice("scale", "axis", {"log": "logarithmic", "linear": "linear"}),) if log else (),
        _TEXTS_DIFFER if other else "",
    )


def _of_histories(
    models: Sequence[Model], pick: Callable[[Model], Iterable[float]]
) -> tuple[list[Row], dict[str, dict[int, float]]]:
    rows: list[Row] = []
    columns: dict[str, dict[int, float]] = {}
    for model in models:
        for step, value in zip(model.run.iterations if model.run else (), pick(model), strict=True):
            if math.isfinite(value):
                rows.append({"model": model.label, "x": step, "y": value})
            columns.setdefault(model.label, {})[step] = value
    return rows, columns


def _tokens(first: str) -> str:
    return f"First token of each text {first}."


def _grey(paper: PaperProfiles | None, depth: int) -> str:
    return "" if paper is None else f" {paper.origin(depth)}"


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


def _shown(rows: list[Row], looks: Looks) -> tuple[tuple[str, Style], ...]:
    there = {row["model"] for row in rows}
    return tuple((label, style) for label, style in looks.items() if label in there)


def _dwarfed(values: Sequence[float]) -> bool:
    """Whether a linear axis would hide most of the values."""
    return bool(values) and max(values) > _DWARFS * statistics.median(values)


def _vertical(title: str, rows: list[Row], log: bool) -> Axis:
    if not log:
        return Axis(title)
    values = [float(row.get(key) or 0) for row in rows for key in ("low", "y", "high")]
    return Axis(title, scale="log", ticks=log_ticks(min(value for value in values if value > 0), max(values)))


def _steps(rows: list[Row]) -> Axis:
    """The axis of steps; logarithmic where they were chosen so, as Pythia's."""
    steps = sorted({float(row["x"] or 0) for row in rows})
    if len(steps) < 5 or steps[-1] < 20 * statistics.median(steps):
        return _STEP
    some = [step for step in steps if step > 0]
    ticks = log_ticks(some[0], some[-1])
    if steps[0] > 0:
        return Axis("training step", whole=True, scale="log", ticks=ticks)
    return Axis("training step", whole=True, scale="symlog", ticks=(0, *ticks))


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


def _by_step(caption: str, columns: dict[str, dict[int, float]], form: str = "#.4g") -> Table:
    steps = sorted({step for column in columns.values() for step in column})
    ordered = {
        name: {f"{step:,}": column[step] for step in steps if step in column}
        for name, column in columns.items()
    }
    return Table.of(caption, "step", ordered, order=[f"{step:,}" for step in steps], form=form)
