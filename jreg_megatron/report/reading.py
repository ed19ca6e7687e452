"""Files and folders into :class:`~jreg_megatron.report.inputs.Inputs`, every number checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jreg_megatron.report.check import Field, printable
from jreg_megatron.report.inputs import (
    FIRST_TOKEN,
    STATES,
    Comparison,
    Difference,
    Evaluated,
    Inputs,
    LayerDrop,
    Layers,
    Measured,
    Origin,
    ReadOut,
    Run,
    Score,
)
from jreg_megatron.runtime.errors import UserError

_MEASUREMENT, _EVALUATION = "jreg_megatron measurement", "jreg_megatron evaluation"
_VERSION = 1
_HOW = ("texts", "tokens", "hidden_size", "dtype", "device")


def read(paths: Sequence[Path]) -> Inputs:
    """Read JSON files and TensorBoard folders; a path that is given twice counts once.

    Raises:
        UserError: that names the file and the field, for what is in none of the formats.
    """
    inputs = Inputs()
    for path in {os.path.realpath(path): path for path in paths}.values():
        _add(inputs, path)
    return inputs


def files_read(paths: Sequence[Path]) -> set[str]:
    """The files of which :func:`read` reads, as absolute paths without links."""
    found: set[Path] = set()
    for path in paths:
        if not os.path.isdir(path):
            found.add(path)
        elif (events := _events(path)) is not None:
            found.update(events.glob("*tfevents*"))
        else:
            found.add(path / "summary.json")
    return {os.path.realpath(path) for path in found}


def _events(path: Path) -> Path | None:
    """The folder with TensorBoard files that a folder stands for."""
    places = (path, path / "tensorboard")
    return next((place for place in places if any(map(os.path.isfile, place.glob("*tfevents*")))), None)


def _add(inputs: Inputs, path: Path) -> None:
    if os.path.isdir(path):
        events = _events(path)
        if events is not None:
            inputs.runs.append(_tensorboard(events))
            return
        if not os.path.isfile(path / "summary.json"):
            raise UserError(
                f"{printable(str(path))} is a folder without TensorBoard files (events.out.tfevents.*) "
                "and without summary.json; name the folder that holds them"
            )
        path = path / "summary.json"
    if "tfevents" in path.name:
        raise UserError(f"{printable(str(path))} is one TensorBoard file; name the folder that it lies in")
    whole = Field.read(path)
    kind = whole.get("format")
    if kind is None and isinstance(whole.value.get("runs"), dict):
        inputs.runs.extend(_summary(whole, Path(os.path.realpath(path)).parent))
    elif kind is not None and kind.value == _MEASUREMENT:
        inputs.measured.extend(_models(whole, _measured))
    elif kind is not None and kind.value == _EVALUATION:
        inputs.evaluated.extend(_models(whole, _evaluated))
        if (compared := whole.get("comparison")) is not None:
            inputs.comparisons.append(_comparison(compared))
    else:
        raise UserError(
            f"{whole.file} is neither a measurement (measure --json) nor an evaluation (evaluate --json) "
            "nor a summary.json of the demo or a sweep"
        )


def _models[T](whole: Field, parse: Callable[[Field, Field], T]) -> list[T]:
    if whole["version"].whole() != _VERSION:
        whole["version"].fail(f"{_VERSION}; a newer file needs a newer jreg_megatron")
    models = [parse(model, whole) for model in whole["models"].entries()]
    if not models:
        whole["models"].fail("a list with at least one model")
    return models


def _origin(model: Field, whole: Field) -> Origin:
    revision, step = model.get("revision"), model.get("step")
    return Origin(
        file=whole.file,
        name=model["name"].text(),
        source=model["source"].text(),
        kind=model["kind"].one_of("hugging_face", "gguf", "megatron"),
        revision=None if revision is None else revision.text(),
        step=None if step is None else step.whole(),
        num_layers=model["num_layers"].whole(low=1),
        versions=_texts(whole.get("versions")),
    )


def _texts(field: Field | None) -> dict[str, str]:
    """An object's values as text; null, true and numbers as JSON writes them."""
    if field is None:
        return {}
    found = {}
    for name, value in field.fields().items():
        if isinstance(value.value, (dict, list)):
            value.fail("a text")
        if isinstance(value.value, float):
            value.number()
        plain = (
            {None: "null", True: "true", False: "false"} if not isinstance(value.value, (int, float)) else {}
        )
        found[name] = (
            value.value if isinstance(value.value, str) else plain.get(value.value, str(value.value))
        )
    return found


def _measured(model: Field, whole: Field) -> Measured:
    origin = _origin(model, whole)
    first = model["first_token"].one_of(*FIRST_TOKEN)
    text = whole.get("text")
    how = {
        f"text {name}".replace("_", " "): "none" if value == "null" else value
        for name, value in _texts(text).items()
    }
    for key in _HOW:
        value = model.get(key)
        if value is not None:
            how[key.replace("_", " ")] = (
                value.text() if key in ("dtype", "device") else f"{value.whole(low=1):,}"
            )
    # A model without a final norm has no numbers after it.
    has_norm = any(STATES[1] in model[key].fields() for key in ("displacement", "jump_rate"))
    states = STATES if has_norm else STATES[:1]
    layers = {(first, state): _layers(model, state, origin.num_layers) for state in states}
    for name, key in FIRST_TOKEN.items():
        if name != first and (block := model.get(key)) is not None:
            layers |= {(name, state): _layers(block, state, origin.num_layers) for state in states}
    return Measured(origin, how, _texts(model.get("settings")), first, layers)


def _layers(block: Field, state: str, num_layers: int) -> Layers:
    # What is not shown is checked as well: a list that is too long says that the file is not what it claims.
    others = {"norm": num_layers + 1, "angular_distance": num_layers, "block_influence": num_layers}
    for key, length in others.items():
        if (values := block.get(key)) is not None:
            values[state].numbers(length, -1e-6)
    spread, rate = block.get("displacement_std"), block["jump_rate"].get(state)
    return Layers(
        displacement=block["displacement"][state].numbers(num_layers, 0, 1),
        spread=None if spread is None else spread[state].numbers(num_layers, 0, 1),
        jump_rate=None if rate is None and num_layers == 1 else block["jump_rate"][state].number(0, 100),
    )


def _evaluated(model: Field, whole: Field) -> Evaluated:
    origin = _origin(model, whole)
    tasks, drop = model.get("tasks"), model.get("layer_drop")
    read_out, lens = model.get("read_out"), model.get("lens")
    how = {}
    if read_out is not None:
        if (text := read_out.get("text")) is not None:
            how["read-out text"] = text.text()
        if (tokens := read_out.get("tokens")) is not None:
            how["read-out tokens"] = f"{tokens.whole():,}"
    for key, words in {"limit": "limit", "max_tokens": "max tokens"}.items():
        if key in whole.value:
            value = whole.get(key)
            how[words] = "none" if value is None else f"{value.number(0):,.10g}"
    return Evaluated(
        origin,
        how,
        tasks={} if tasks is None else {name: _score(task) for name, task in tasks.fields().items()},
        read_out=None if read_out is None else _read_out(read_out, origin.num_layers),
        lens=None if lens is None else _read_out(lens, origin.num_layers),
        layer_drop=None
        if drop is None
        else LayerDrop(drop["loss"].numbers(origin.num_layers, 0), drop["unchanged"].number(0)),
    )


def _score(task: Field) -> Score:
    interval, samples, chance = task.get("interval"), task.get("samples"), task.get("chance")
    higher = task.get("higher_is_better")
    return Score(
        metric=task["metric"].text(),
        value=task["value"].number(),
        interval=None if interval is None else interval.interval(),
        samples=None if samples is None else samples.whole(low=1),
        higher_is_better=higher is None or higher.flag(),
        chance=None if chance is None else chance.number(),
    )


def _read_out(field: Field, num_layers: int) -> ReadOut:
    def numbers(key: str, high: float) -> tuple[float, ...] | None:
        found = field.get(key)
        return None if found is None else found.numbers(num_layers + 1, 0, high)

    text, tokens = field.get("text"), field.get("tokens")
    return ReadOut(
        text="" if text is None else text.text(),
        tokens=None if tokens is None else tokens.whole(),
        loss=numbers("loss", float("inf")),
        accuracy=numbers("accuracy", 1),
        agreement=numbers("agreement", 1),
    )


def _comparison(field: Field) -> Comparison:
    names = field["models"].entries()
    if len(names) != 2:
        field["models"].fail("a list of two names")
    tasks, overall, read_out = field.get("tasks"), field.get("overall"), field.get("read_out")
    among, notes = None if overall is None else overall.get("tasks"), field.get("notes")
    return Comparison(
        file=field.file,
        models=(names[0].text(), names[1].text()),
        confidence=field["confidence"].number(0, 1),
        tasks={} if tasks is None else {name: _difference(task) for name, task in tasks.fields().items()},
        overall=None if overall is None else _difference(overall),
        overall_tasks=None if among is None else len(among.entries()),
        without_boolq=None if (without := field.get("without_boolq")) is None else _difference(without),
        read_out=() if read_out is None else _differences(read_out),
        notes=() if notes is None else tuple(note.text() for note in notes.entries()),
    )


def _difference(field: Field) -> Difference:
    interval, samples = field.get("interval"), field.get("samples")
    p_value, p_adjusted = field.get("p_value"), field.get("p_adjusted")
    return Difference(
        value=field["difference"].number(),
        interval=None if interval is None else interval.interval(),
        p_value=None if p_value is None else p_value.number(0, 1),
        p_adjusted=None if p_adjusted is None else p_adjusted.number(0, 1),
        samples=None if samples is None else samples.whole(low=1),
    )


def _differences(field: Field) -> tuple[Difference, ...]:
    """One for each layer, from an object of lists."""
    length = len(field["difference"].numbers())
    columns = {
        key: entries.entries(length)
        for key in ("difference", "interval", "p_value", "p_adjusted")
        if (entries := field.get(key)) is not None
    }
    rows = ({key: column[layer] for key, column in columns.items()} for layer in range(length))
    return tuple(
        Difference(
            value=row["difference"].number(),
            interval=row["interval"].interval() if _given(row, "interval") else None,
            p_value=row["p_value"].number(0, 1) if _given(row, "p_value") else None,
            p_adjusted=row["p_adjusted"].number(0, 1) if _given(row, "p_adjusted") else None,
            samples=None,
        )
        for row in rows
    )


def _given(row: dict[str, Field], key: str) -> bool:
    return key in row and row[key].value is not None


def _tensorboard(folder: Path) -> Run:
    from jreg_megatron.report.history import History

    history = History.read(folder)
    place = folder.resolve()
    state = history.settings.get("jreg_final_state")  # which a loop of one's own does not log
    if state not in (*STATES, None):
        raise UserError(f"{printable(str(folder))}: its jreg_final_state is {printable(str(state))}")
    home = place.parent if place.name == "tensorboard" else place
    return Run(
        file=printable(str(folder)),
        folder=home,
        name=home.name,
        iterations=tuple(history.iterations),
        validation_loss=tuple(history.validation_loss),
        jump_rate=tuple(history.jump_rate),
        displacement=tuple(history.displacement),
        final_state=state,
        settings=history.settings,
        versions={},
    )


def _summary(whole: Field, folder: Path) -> list[Run]:
    """The runs of a ``summary.json`` of the demo or of a sweep."""
    state = whole["final_state"].one_of(*STATES)
    common = {"iterations": str(whole["iterations"].whole(low=1))}
    for key in ("recipe", "seed"):
        if (value := whole.get(key)) is not None:
            common[key] = value.text() if key == "recipe" else str(value.whole())
    versions = _texts(whole.get("versions"))
    runs = []
    for name, run in whole["runs"].fields().items():
        coeff, alpha, seed = (run.get(key) for key in ("coeff", "alpha", "seed"))
        settings = {"jreg_coeff": "0" if coeff is None else f"{coeff.number(0):g}"}
        settings |= {} if alpha is None else {"jreg_alpha": f"{alpha.number():g}"}
        settings |= {} if seed is None else {"seed": str(seed.whole())}
        history = run["history"].entries()
        if not history:
            run["history"].fail("a list with at least one validation")
        runs.append(
            Run(
                file=whole.file,
                folder=folder,
                name=name,
                iterations=tuple(point["iteration"].whole() for point in history),
                validation_loss=tuple(point["validation_loss"].number(0) for point in history),
                jump_rate=tuple(point["jump_rate"].number(0, 100) for point in history),
                displacement=run["displacement"].numbers(None, 0, 1),
                final_state=state,
                settings=common | settings,
                versions=versions,
            )
        )
    if not runs:
        whole["runs"].fail("an object with at least one run")
    return runs
