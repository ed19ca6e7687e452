"""The tables of a report. Each cell is text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jreg_megatron.report.check import shortened
from jreg_megatron.report.inputs import STATE_WORDS, STATES, Comparison, Difference, Score
from jreg_megatron.report.models import Model

Cell = float | str | None

NOTHING = "–"
HEADLINE = "The last state of each model"
LOSS = "#.5g"
"""Five digits, since differences are small."""
_CELL, _LONG_CELL = 160, 300
_ABREAST, _NAMED = 8, 4
_THRESHOLDS = (0.001, 0.01, 0.05, 0.1)
"""The usual thresholds of p values; rounding moves no p value over them."""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    """Whether its cells are words, not numbers."""

    @classmethod
    def of(
        cls, caption: str, corner: str, columns: Mapping[str, Mapping[Any, Cell]], form: str = "#.4g"
    ) -> Table:
        """A table by column and row; ``form`` formats its numbers.

        Rows are numbers, or texts such as ``30, before the final norm``; they are sorted.
        """

        def place(row: float | str) -> tuple[float, bool]:
            return (int(row.partition(",")[0]), "after" in row) if isinstance(row, str) else (row, False)

        def shown(cell: Cell) -> str:
            return cell if isinstance(cell, str) else number(cell, form)

        rows = sorted(dict.fromkeys(row for column in columns.values() for row in column), key=place)
        names = [
            row if isinstance(row, str) else f"{row:,}" if isinstance(row, int) else number(row)
            for row in rows
        ]
        cells = [[shown(column.get(row)) for column in columns.values()] for row in rows]
        table = tuple((name, *found) for name, found in zip(names, cells, strict=True))
        return cls(caption, (corner, *columns), table)


def number(value: float | None, form: str = "#.4g") -> str:
    """A number with four digits, or in the format ``form``."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    shown = format(value, form)
    return f"{value:,.0f}" if "e+" in shown else shown.rstrip(".")


def known(value: float) -> float | None:
    """None for a value that is not finite."""
    return value if math.isfinite(value) else None


def headline(models: Sequence[Model], first: str) -> Table:
    """The main numbers, one row for each model; ``first``: first tokens are ``kept`` or ``dropped``."""
    caption = HEADLINE
    if any(model.measured for model in models):
        caption += f"; measurements with the first token of each text {first}"
    return _of_rows(caption, [{"model": model.label} | _headline_row(model, first) for model in models])


def _headline_row(model: Model, first: str) -> dict[str, str]:
    step, run, entry = model.step, model.run, model.measured[-1] if model.measured else None
    row = {
        "step": NOTHING if step is None else f"{step:,}",
        "layers L": NOTHING if model.num_layers is None else str(model.num_layers),
    }
    words = {"pre_norm": ("ζ before the final norm", "last Ψ before the final norm")}
    words["post_norm"] = ("ζ after it", "last Ψ after it")
    # All jump rates stand before the displacements.
    row |= {words[state][place]: NOTHING for place in (0, 1) for state in STATES}
    if entry:
        counted = entry.first_for(first)
        mark = "" if counted == first else f" (first token {counted})"
        for state in entry.states:
            (rate, turn), block = words[state], entry.block(first)
            jump = block.jump_rate.get(state)
            row[rate] = NOTHING if jump is None else number(jump) + mark
            row[turn] = number(block.displacement[state][-1]) + mark
    loss_cell = NOTHING
    if run:
        at = run.iterations.index(step) if step in run.iterations else -1
        loss_cell = number(run.validation_loss[at], LOSS) + _mark(run.iterations[at], step)
        if not entry and run.final_state:
            rate, turn = words[run.final_state]
            row[rate] = number(run.jump_rate[at]) + _mark(run.iterations[at], step)
            if run.displacement and known(run.displacement[-1]) is not None:
                row[turn] = number(run.displacement[-1]) + _mark(run.iterations[-1], step)
    return row | {
        "validation loss": loss_cell,
        "λ": _setting(model, "jreg_coeff"),
        "α": _setting(model, "jreg_alpha"),
    }


def _mark(step: int, of_row: int | None) -> str:
    """The remark beside a value of another step than that of its row."""
    return "" if step == of_row else f" (step {step:,})"


def _setting(model: Model, name: str) -> str:
    plain = _plain(model.settings.get(name, NOTHING))
    return shortened(plain, 24) if isinstance(plain, str) else f"{plain:g}"


def tasks(models: Sequence[Model]) -> Table | None:
    """Each task's score for each model, with its interval."""
    scores = {
        model.label: {name: score for entry in model.evaluated for name, score in entry.tasks.items()}
        for model in models
    }
    scores = {label: found for label, found in scores.items() if found}
    rows = []
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        # A row holds scores of one metric on one number of samples.
        for way in dict.fromkeys(_way(found[name]) for found in scores.values() if name in found):
            metric, higher, samples, chance = way
            row = {
                "task": shortened(name, _CELL),
                "metric": shortened(metric, 24),
                "better": "higher" if higher else "lower",
                "samples": NOTHING if samples is None else f"{samples:,}",
                "chance": number(chance),
            }
            for label, found in scores.items():
                score = found.get(name)
                same = score is not None and _way(score) == way
                # The mark keeps a model's name apart from the columns above.
                row[f"\0{label}"] = (
                    f"{number(score.value)}{_interval(score.interval)}" if score and same else NOTHING
                )
            rows.append(row)
    return _of_rows("Tasks; intervals in brackets", rows) if rows else None


def _way(score: Score) -> tuple[str, bool, int | None, float | None]:
    return score.metric, score.higher_is_better is not False, score.samples, score.chance


def comparison(compared: Comparison, a: str, b: str) -> Table | None:
    """The paired differences of two models in tasks."""
    found: dict[str, Difference] = {shortened(name, _CELL): task for name, task in compared.tasks.items()}
    if compared.overall is not None:
        among = compared.overall.tasks
        found["mean of tasks" if among is None else f"mean of tasks ({len(among)})"] = compared.overall
    if compared.without_boolq is not None:
        found["mean without BoolQ"] = compared.without_boolq
    rows = [
        {
            "task": name,
            "difference": number(difference.difference, "+#.3g"),
            f"{compared.confidence:.0%} interval": _interval(difference.interval, "+#.3g").strip(" ()")
            or NOTHING,
            "p": p_value(difference.p_value),
            "p, adjusted": p_value(difference.p_adjusted),
            "samples": NOTHING if difference.samples is None else f"{difference.samples:,}",
        }
        for name, difference in found.items()
    ]
    return _of_rows(f"{b} minus {a}, on the same samples", rows) if rows else None


def _of_rows(caption: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """A table without its empty columns."""
    names = [name for name in rows[0] if any(row[name] != NOTHING for row in rows)]
    cells = tuple(tuple(row[name] for name in names) for row in rows)
    return Table(caption, tuple(name.removeprefix("\0") for name in names), cells)


def p_value(value: float | None) -> str:
    """A p value with three digits, or with enough digits to stay on its side of the thresholds."""
    if value is None:
        return NOTHING
    if value < 0.001:
        return "< 0.001"
    shown = [f"{value:#.{digits}g}" for digits in range(3, 18)]
    sides = [value < threshold for threshold in _THRESHOLDS]
    return next(text for text in shown if [float(text) < threshold for threshold in _THRESHOLDS] == sides)


def settings(models: Sequence[Model]) -> tuple[Table | None, Table | None]:
    """Tables of training settings: those that differ, and all."""
    known = [model for model in models if model.settings]
    names = sorted(dict.fromkeys(name for model in known for name in model.settings))
    # 3 and 3.0 are equal.
    values = {name: {_plain(m.settings[name]) for m in known if name in m.settings} for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    return (
        _side_by_side("Settings that differ", known, differing) if differing else None,
        _side_by_side("All settings", known, names) if names else None,
    )


def _side_by_side(caption: str, models: Sequence[Model], names: Sequence[str]) -> Table:
    """A column for each model; or a column for each setting, if there are too many models."""
    grid = [
        (shortened(name, 80), *(shortened(model.settings.get(name, NOTHING), _CELL) for model in models))
        for name in names
    ]
    table = [("setting", *(model.label for model in models)), *grid]
    if len(names) < _ABREAST < len(models):
        table = [("model", *(row[0] for row in grid)), *list(zip(*table, strict=True))[1:]]
    return Table(caption, table[0], tuple(table[1:]), is_text=True)


def _plain(text: str) -> int | float | str:
    """A setting as a number, if it is one. Integers keep all their digits."""
    for kind in (int, float):
        try:
            plain = kind(text)
        except ValueError:
            continue
        return plain if math.isfinite(plain) and "_" not in text else text.lower()
    return text


def files(models: Sequence[Model]) -> Table:
    """The content of each file, and how it was measured."""
    labels: dict[tuple[str, str, str, str], dict[str, None]] = {}

    def add(model: Model, file: str, what: str, how: str, versions: Mapping[str, str]) -> None:
        labels.setdefault((file, what, how, _pairs(versions)), {})[model.label] = None

    for model in models:
        for entry in model.measured:
            how = _pairs({"first token": entry.first_token} | entry.how)
            add(model, entry.file, "measurement", how, entry.versions)
        for evaluated in model.evaluated:
            add(model, evaluated.file, "evaluation", _pairs(evaluated.how), evaluated.versions)
        if run := model.run:
            how = f"last layer {STATE_WORDS[run.final_state]}"
            add(model, run.file, "training run", how, run.versions)
    rows = []
    for (file, what, how, versions), found in labels.items():
        named = ", ".join(found) if len(found) <= _NAMED else f"{len(found)} models"
        cut = [shortened(text, _LONG_CELL) for text in (file, how, versions)]
        rows.append((cut[0], what, named, *cut[1:]))
    return Table("Files", ("file", "what", "models", "how", "versions"), tuple(rows), is_text=True)


def sources(models: Sequence[Model]) -> Table | None:
    """The source of each measured or evaluated model."""
    rows = []
    for model in models:
        for source, kind in dict.fromkeys((origin.source, origin.kind) for origin in model.origins):
            origins = [origin for origin in model.origins if (origin.source, origin.kind) == (source, kind)]
            revisions = [origin.revision for origin in origins if origin.revision]
            steps = sorted({origin.step for origin in origins if origin.step is not None})
            cells = (source, kind.replace("_", " "), _from_to(revisions), _from_to([f"{s:,}" for s in steps]))
            rows.append((model.label, *(shortened(cell, _LONG_CELL) for cell in cells)))
    columns = ("model", "source", "kind", "revision", "step")
    return Table("Models", columns, tuple(rows), is_text=True) if rows else None


def _from_to(values: Sequence[str]) -> str:
    if len(values) < 2:
        return values[0] if values else NOTHING
    return f"{values[0]} to {values[-1]} ({len(values)})"


def _pairs(values: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in values.items()) or NOTHING


def _interval(interval: tuple[float, float] | None, form: str = "#.4g") -> str:
    return "" if interval is None else f" ({number(interval[0], form)} to {number(interval[1], form)})"
