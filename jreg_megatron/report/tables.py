"""The tables of a report. Each cell is text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from jreg_megatron.report.inputs import STATE_WORDS, STATES, Comparison, Score
from jreg_megatron.report.models import Model
from jreg_megatron.runtime.documents import shortened

Cell = float | str | None

NOTHING = "–"
HEADLINE = "The last state of each model"
LOSS = "#.5g"
"""Five digits, because differences are small."""
_CELL, _LONG_CELL = 160, 300
_ABREAST, _NAMED = 8, 4
_THRESHOLDS = (0.001, 0.01, 0.05, 0.1)
"""The usual thresholds of p values. Rounding must not move a p value over one of them."""


@dataclass(frozen=True)
class Table:
    """A table. Its first column has the rows' names."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    """Whether its cells are words, not numbers."""

    @classmethod
    def of(
        cls, caption: str, corner: str, columns: Mapping[str, Mapping[Any, Cell]], form: str = "#.4g"
    ) -> Table:
        """A table from cells by column and row. ``form`` is the format of its numbers.

        Rows are numbers, or texts such as ``30, before the final norm``. They are sorted.
        """

        def place(row: float | str) -> tuple[float, bool]:
            return (int(row.partition(",")[0]), "after" in row) if isinstance(row, str) else (row, False)

        def shown(cell: Cell) -> str:
            return cell if isinstance(cell, str) else number(cell, form)

        places = sorted({row for column in columns.values() for row in column}, key=place)
        rows = tuple(
            (
                f"{row:,}" if isinstance(row, int) else shown(row),
                *(shown(c.get(row)) for c in columns.values()),
            )
            for row in places
        )
        return cls(caption, (corner, *columns), rows)

    @classmethod
    def of_rows(cls, caption: str, rows: Sequence[Mapping[Any, str]], is_text: bool = False) -> Table:
        """A table without its empty columns. A column's key is its name, or a tuple with its name."""
        names = [name for name in rows[0] if is_text or any(row[name] != NOTHING for row in rows)]
        cells = tuple(tuple(row[name] for name in names) for row in rows)
        return cls(caption, tuple(n if isinstance(n, str) else n[0] for n in names), cells, is_text)


def number(value: float | None, form: str = "#.4g") -> str:
    """A number with four digits, or in the format ``form``."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    shown = format(value, form)
    return f"{value:,.0f}" if "e+" in shown else shown.rstrip(".")


def interval(ends: tuple[float | None, float | None] | None, form: str = "#.4g") -> str:
    """An interval as ``0.1 to 0.2``, or a dash."""
    if ends is None or None in ends:
        return NOTHING
    return " to ".join(number(end, form) for end in ends)


def headline(models: Sequence[Model], first: str) -> Table:
    """The main numbers, one row for each model. ``first`` is ``kept`` or ``dropped``, for first tokens."""
    caption = HEADLINE
    if any(model.measured for model in models):
        caption += f"; measurements with the first token of each text {first}"
    return Table.of_rows(caption, [_headline_row(model, first) for model in models])


def _headline_row(model: Model, first: str) -> dict[str, str]:
    step, run, entry = model.step, model.run, model.measured[-1] if model.measured else None
    row = {"model": model.label, "step": whole(step), "layers L": whole(model.num_layers)}
    rates = dict(zip(STATES, ("ζ before the final norm", "ζ after it"), strict=True))
    turns = dict(zip(STATES, ("last Ψ before the final norm", "last Ψ after it"), strict=True))
    row |= dict.fromkeys((*rates.values(), *turns.values(), "validation loss"), NOTHING)

    def put(column: str, value: float | None, mark: str = "") -> None:
        row[column] = NOTHING if value is None else number(value, LOSS if "loss" in column else "#.4g") + mark

    def at_step(value: int) -> str:
        """The remark after a value whose step differs from the row's."""
        return "" if value == step else f" (step {value:,})"

    if entry:
        for state in entry.states:
            put(rates[state], entry.blocks[first].jump_rate.get(state))
            put(turns[state], entry.blocks[first].displacement[state][-1])
    if run:
        at = run.iterations.index(step) if step in run.iterations else -1
        put("validation loss", run.validation_loss[at], at_step(run.iterations[at]))
        if not entry and (logged := run.final_state):
            put(rates[logged], run.jump_rate[at], at_step(run.iterations[at]))
            if run.displacement and math.isfinite(run.displacement[-1]):
                put(turns[logged], run.displacement[-1], at_step(run.iterations[-1]))
    for column, name in {"λ": "jreg_coeff", "α": "jreg_alpha"}.items():
        plain = _plain(model.settings.get(name, NOTHING))
        row[column] = shortened(plain, 24) if isinstance(plain, str) else f"{float(plain):g}"
    return row


def tasks(models: Sequence[Model]) -> list[Table]:
    """Each task's score for each model, with its interval."""
    scores = {
        model.label: {name: score for entry in model.evaluated for name, score in entry.tasks.items()}
        for model in models
        if any(entry.tasks for entry in model.evaluated)
    }
    # The scores in a row have the same metric and number of samples.
    ways = {
        (name, _way(found[name])): None
        for name in dict.fromkeys(name for found in scores.values() for name in found)
        for found in scores.values()
        if name in found
    }
    rows: list[dict[Any, str]] = []
    for name, way in ways:
        metric, higher, samples, chance = way
        row: dict[Any, str] = {
            "task": shortened(name, _CELL),
            "metric": shortened(metric, 24),
            "better": "higher" if higher else "lower",
            "samples": whole(samples),
            "chance": number(chance),
        }
        for label, found in scores.items():
            score = found.get(name)
            # A tuple keeps a model's name apart from the columns above.
            row[label,] = NOTHING
            if score is not None and _way(score) == way:
                ends = f" ({interval(score.interval)})" if score.interval else ""
                row[label,] = number(score.value) + ends
        rows.append(row)
    return [Table.of_rows("Tasks; intervals in brackets", rows)] if rows else []


def _way(score: Score) -> tuple[str, bool, int | None, float | None]:
    return score.metric, score.higher_is_better is not False, score.samples, score.chance


def comparison(compared: Comparison, a: str, b: str) -> list[Table]:
    """The paired differences of two models in tasks."""
    found = {shortened(name, _CELL): task for name, task in compared.tasks.items()}
    if compared.overall is not None:
        among = compared.overall.tasks
        found["mean of tasks" if among is None else f"mean of tasks ({len(among)})"] = compared.overall
    if compared.without_boolq is not None:
        found["mean without BoolQ"] = compared.without_boolq
    rows = [
        {
            "task": name,
            "difference": number(difference.difference, "+#.3g"),
            f"{compared.confidence:.0%} interval": interval(difference.interval, "+#.3g"),
            "p": p_value(difference.p_value),
            "p, adjusted": p_value(difference.p_adjusted),
            "samples": whole(difference.samples),
        }
        for name, difference in found.items()
    ]
    return [Table.of_rows(f"{b} minus {a}, on the same samples", rows)] if rows else []


def p_value(value: float | None) -> str:
    """A p value with three digits, or with enough digits to stay on its side of the thresholds."""
    if value is None:
        return NOTHING
    if value < 0.001:
        return "< 0.001"
    shown = [f"{value:#.{digits}g}" for digits in range(3, 18)]
    sides = [value < threshold for threshold in _THRESHOLDS]
    return next(text for text in shown if [float(text) < threshold for threshold in _THRESHOLDS] == sides)


def settings(models: Sequence[Model]) -> list[list[Table]]:
    """Tables of training settings: those that differ, and all. Each may be missing."""
    known = [model for model in models if model.settings]
    names = sorted({name for model in known for name in model.settings})
    # 3 and 3.0 are equal.
    values = {name: {_plain(m.settings[name]) for m in known if name in m.settings} for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    wanted = {"Settings that differ": differing, "All settings": names}
    return [[_side_by_side(caption, known, of)] if of else [] for caption, of in wanted.items()]


def _side_by_side(caption: str, models: Sequence[Model], names: Sequence[str]) -> Table:
    """A column for each model, or a column for each setting if there are too many models."""
    grid = [
        (shortened(name, 80), *(shortened(model.settings.get(name, NOTHING), _CELL) for model in models))
        for name in names
    ]
    table = [("setting", *(model.label for model in models)), *grid]
    if len(names) < _ABREAST < len(models):
        table = [("model", *(row[0] for row in grid)), *list(zip(*table, strict=True))[1:]]
    return Table(caption, table[0], tuple(table[1:]), is_text=True)


def _plain(text: str) -> Decimal | str:
    """A setting as an exact number, if it is one."""
    with suppress(InvalidOperation):
        if (plain := Decimal(text)).is_finite():
            return plain
    return text.lower()


def files(models: Sequence[Model]) -> Table:
    """The content of each file, and how it was measured."""

    def content(model: Model) -> Iterator[tuple[str, str, Mapping[str, str], Mapping[str, str]]]:
        for entry in model.measured:
            yield entry.file, "measurement", {"first token": entry.first_token} | entry.how, entry.versions
        for evaluated in model.evaluated:
            yield evaluated.file, "evaluation", evaluated.how, evaluated.versions
        if run := model.run:
            yield run.file, "training run", {"last layer": STATE_WORDS[run.final_state]}, run.versions

    labels: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for model in models:
        for file, what, *pairs in content(model):
            how, versions = ("; ".join(f"{name} {value}" for name, value in of.items()) for of in pairs)
            labels.setdefault((file, what, how, versions), {})[model.label] = None
    rows = [
        {
            "file": shortened(file, _LONG_CELL),
            "what": what,
            "models": ", ".join(found) if len(found) <= _NAMED else f"{len(found)} models",
            "how": shortened(how or NOTHING, _LONG_CELL),
            "versions": shortened(versions or NOTHING, _LONG_CELL),
        }
        for (file, what, how, versions), found in labels.items()
    ]
    return Table.of_rows("Files", rows, is_text=True)


def sources(models: Sequence[Model]) -> list[Table]:
    """The source of each measured or evaluated model, if there is one."""
    rows = []
    for model in models:
        for source, kind in dict.fromkeys((origin.source, origin.kind) for origin in model.origins):
            origins = [origin for origin in model.origins if (origin.source, origin.kind) == (source, kind)]
            revisions = [origin.revision for origin in origins if origin.revision]
            steps = sorted({origin.step for origin in origins if origin.step is not None})
            row = {"source": source, "kind": kind.replace("_", " "), "revision": _from_to(revisions)}
            row |= {"step": _from_to([f"{step:,}" for step in steps])}
            cut = {name: shortened(cell, _LONG_CELL) for name, cell in row.items()}
            rows.append({"model": model.label} | cut)
    return [Table.of_rows("Models", rows, is_text=True)] if rows else []


def _from_to(values: Sequence[str]) -> str:
    if len(values) < 2:
        return values[0] if values else NOTHING
    return f"{values[0]} to {values[-1]} ({len(values)})"


def whole(value: int | None) -> str:
    """A whole number with a comma at each thousand, or a dash."""
    return NOTHING if value is None else f"{value:,}"
