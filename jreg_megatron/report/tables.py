"""The tables of a report: every cell is text, ready to be shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jreg_megatron.report.check import shortened
from jreg_megatron.report.inputs import STATES, Comparison, Difference
from jreg_megatron.report.models import Model

NOTHING = "–"
_CELL, _LONG_CELL = 160, 300
_ABREAST, _NAMED = 8, 4


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    """Whether it holds words rather than numbers."""

    @classmethod
    def of(
        cls,
        caption: str,
        corner: str,
        columns: Mapping[str, Mapping[str, float]],
        order: Iterable[str] = (),
    ) -> Table:
        """A table of numbers given by column and row."""
        names = dict.fromkeys([*order, *(name for column in columns.values() for name in column)])
        if not order:
            names = dict.fromkeys(sorted(names, key=_natural))
        rows = tuple((name, *(number(column.get(name)) for column in columns.values())) for name in names)
        return cls(caption, (corner, *columns), rows)


def _natural(name: str) -> tuple[int, bool]:
    """Rows such as ``9``, ``10``, ``30, before the final norm`` and ``30, after the final norm`` in order."""
    return int(name.partition(",")[0]), "after" in name


def number(value: float | None, form: str = "#.4g") -> str:
    """A number to four digits."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    shown = format(value, form)
    return f"{value:,.0f}" if "e+" in shown else shown.rstrip(".")


def headline(models: Sequence[Model]) -> Table:
    """What is asked first, a row for each model."""
    columns: dict[str, list[str]] = {}
    for model in models:
        before, after = (model.last(state) for state in STATES)
        run = model.run
        logged = {run.final_state: run.jump_rate[-1]} if run and not model.measured else {}
        turned = (
            {run.final_state: run.displacement[-1]} if run and run.displacement and not model.measured else {}
        )
        step = model.origins[-1].step if model.origins else run.iterations[-1] if run else None
        row = {
            "step": NOTHING if step is None else f"{step:,}",
            "layers L": NOTHING if model.num_layers is None else str(model.num_layers),
            "ζ before the final norm": number(before.jump_rate if before else logged.get("pre_norm")),
            "ζ after it": number(after.jump_rate if after else logged.get("post_norm")),
            "last Ψ before the final norm": number(
                before.displacement[-1] if before else turned.get("pre_norm")
            ),
            "last Ψ after it": number(after.displacement[-1] if after else turned.get("post_norm")),
            "validation loss": number(run.validation_loss[-1] if run else None),
            "λ": _setting(model, "jreg_coeff"),
            "α": _setting(model, "jreg_alpha"),
        }
        for name, cell in row.items():
            columns.setdefault(name, []).append(cell)
    return _without_empty("The last state of each model", {"model": [m.label for m in models]} | columns)


def _setting(model: Model, name: str) -> str:
    plain = _plain(model.settings.get(name, NOTHING))
    return f"{plain:g}" if isinstance(plain, float) else shortened(plain, 24)


def tasks(models: Sequence[Model]) -> Table | None:
    """Each task's score for each model, with its interval."""
    scores = {
        model.label: {name: score for entry in model.evaluated for name, score in entry.tasks.items()}
        for model in models
    }
    scores = {label: found for label, found in scores.items() if found}
    if not scores:
        return None
    columns: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        some = next(found[name] for found in scores.values() if name in found)
        better = "higher" if some.higher_is_better else "lower"
        row = {
            "task": shortened(name, _CELL),
            "metric": f"{shortened(some.metric, 24)}, {better} is better",
            "samples": NOTHING if some.samples is None else f"{some.samples:,}",
            "chance": number(some.chance),
        }
        for column, cell in row.items():
            columns.setdefault(column, []).append(cell)
        for label, found in scores.items():
            score = found.get(name)
            cell = f"{number(score.value)}{_interval(score.interval)}" if score else NOTHING
            # Apart from the columns above, whatever a model is called.
            columns.setdefault(f"\0{label}", []).append(cell)
    return _without_empty("Tasks; intervals in brackets", columns)


def comparison(compared: Comparison, a: str, b: str) -> Table | None:
    """The paired differences of two models in tasks."""
    found: dict[str, Difference] = {shortened(name, _CELL): task for name, task in compared.tasks.items()}
    if compared.overall is not None:
        count = compared.overall_tasks
        found["mean of tasks" if count is None else f"mean of tasks ({count})"] = compared.overall
    columns: dict[str, list[str]] = {}
    for name, difference in found.items():
        row = {
            "task": name,
            "difference": number(difference.value, "+#.3g"),
            f"{compared.confidence:.0%} interval": _interval(difference.interval, "+#.3g").strip(" ()")
            or NOTHING,
            "p value": _p_value(difference.p_value),
            "p value, adjusted": _p_value(difference.p_adjusted),
            "samples": NOTHING if difference.samples is None else f"{difference.samples:,}",
        }
        for column, cell in row.items():
            columns.setdefault(column, []).append(cell)
    return _without_empty(f"{b} less {a}, on the same samples", columns) if found else None


def _without_empty(caption: str, columns: Mapping[str, Sequence[str]]) -> Table:
    """A table of the columns that have something in them."""
    kept = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    names = tuple(name.removeprefix("\0") for name in kept)
    return Table(caption, names, tuple(zip(*kept.values(), strict=True)))


def _p_value(value: float | None) -> str:
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def settings(models: Sequence[Model]) -> tuple[Table | None, Table | None]:
    """Training settings side by side: those that differ, and all of them."""
    known = [model for model in models if model.settings]
    names = sorted(dict.fromkeys(name for model in known for name in model.settings))
    differing = [name for name in names if _differ(known, name)]
    return (
        _side_by_side("Settings that differ", known, differing) if differing else None,
        _side_by_side("All settings", known, names) if names else None,
    )


def _side_by_side(caption: str, models: Sequence[Model], names: Sequence[str]) -> Table:
    """A column for each model; for each setting where there are more models than fit beside each other."""
    grid = [
        (shortened(name, 80), *(shortened(model.settings.get(name, NOTHING), _CELL) for model in models))
        for name in names
    ]
    table = [("setting", *(model.label for model in models)), *grid]
    if len(names) < _ABREAST < len(models):
        table = [("model", *(row[0] for row in grid)), *list(zip(*table, strict=True))[1:]]
    return Table(caption, table[0], tuple(table[1:]), is_text=True)


def _differ(models: Sequence[Model], name: str) -> bool:
    """Whether two models are known to have different values; 3 and 3.0 are one."""
    return len({_plain(model.settings[name]) for model in models if name in model.settings}) > 1


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def files(models: Sequence[Model]) -> Table:
    """What each file holds, and how it was measured."""
    rows: dict[tuple[str, ...], dict[str, None]] = {}
    for model in models:
        for entry in model.measured:
            how = _pairs({"first token": entry.first_token} | entry.how)
            key = (entry.origin.file, "measurement", how, _pairs(entry.origin.versions))
            rows.setdefault(key, {})[model.label] = None
        for evaluated in model.evaluated:
            key = (evaluated.origin.file, "evaluation", NOTHING, _pairs(evaluated.origin.versions))
            rows.setdefault(key, {})[model.label] = None
        if model.run:
            state = "before" if model.run.final_state == "pre_norm" else "after"
            how = f"last layer {state} the final norm"
            key = (model.run.file, "training run", how, _pairs(model.run.versions))
            rows.setdefault(key, {})[model.label] = None
    return Table(
        "Files",
        ("file", "what", "models", "how", "versions"),
        tuple(
            (
                shortened(file, _LONG_CELL),
                what,
                ", ".join(labels) if len(labels) <= _NAMED else f"{len(labels)} models",
                shortened(how, _LONG_CELL),
                shortened(versions, _LONG_CELL),
            )
            for (file, what, how, versions), labels in rows.items()
        ),
        is_text=True,
    )


def sources(models: Sequence[Model]) -> Table | None:
    """Where each measured or evaluated model lies."""
    rows = []
    for model in models:
        for source in dict.fromkeys((origin.source, origin.kind) for origin in model.origins):
            origins = [origin for origin in model.origins if (origin.source, origin.kind) == source]
            revisions = [origin.revision for origin in origins if origin.revision]
            steps = sorted({origin.step for origin in origins if origin.step is not None})
            cells = (
                source[0],
                source[1].replace("_", " "),
                _from_to(revisions),
                _from_to([f"{s:,}" for s in steps]),
            )
            rows.append((model.label, *(shortened(cell, _LONG_CELL) for cell in cells)))
    return (
        Table("Models", ("model", "source", "kind", "revision", "step"), tuple(rows), is_text=True)
        if rows
        else None
    )


def _from_to(values: Sequence[str]) -> str:
    if len(values) < 2:
        return values[0] if values else NOTHING
    return f"{values[0]} to {values[-1]} ({len(values)})"


def _pairs(values: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in values.items()) or NOTHING


def _interval(interval: tuple[float, float] | None, form: str = "#.4g") -> str:
    return "" if interval is None else f" ({number(interval[0], form)} to {number(interval[1], form)})"
