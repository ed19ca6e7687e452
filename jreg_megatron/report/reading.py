"""Read files and folders into :class:`~jreg_megatron.report.inputs.Inputs`, and check every number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jreg_megatron.methods.jreg.regularizer import RATE_NAME, displacement_name
from jreg_megatron.report.inputs import STATES, Evaluation, History, Inputs, Measurement, Run, Summary
from jreg_megatron.runtime.documents import checked, printable, read_json
from jreg_megatron.runtime.errors import UserError

_VALIDATION = " validation"
_LOSS = "lm loss" + _VALIDATION
_LAYER = re.compile(re.escape(displacement_name(1, 1)).replace("01", r"\d+") + _VALIDATION)
_SETTING = "/text_summary"


def read(paths: Sequence[Path]) -> Inputs:
    """Read JSON files and TensorBoard folders. A path that is given twice counts once.

    Raises:
        UserError: for a file of unknown format or with a wrong field; it names the file and the field.
    """
    inputs = Inputs()
    for path in {os.path.realpath(path): path for path in paths}.values():
        _add(inputs, path)
    return inputs


def files_read(paths: Sequence[Path]) -> set[str]:
    """The files that :func:`read` reads, as absolute paths without links."""
    sources = map(_source, paths)
    files = (source.glob("*tfevents*") if os.path.isdir(source) else [source] for source in sources)
    return {os.path.realpath(file) for several in files for file in several}


def _source(path: Path) -> Path:
    """The file, or the folder of TensorBoard files, to read for ``path``: itself, its ``tensorboard`` or its
    ``summary.json``."""
    if not os.path.isdir(path):
        return path
    places = (path, path / "tensorboard")
    events = (place for place in places if any(map(os.path.isfile, place.glob("*tfevents*"))))
    return next(events, path / "summary.json")


def _add(inputs: Inputs, given: Path) -> None:
    path = _source(given)
    if os.path.isdir(given) and not path.exists():
        raise UserError(
            f"{printable(str(given))} is a folder without TensorBoard files (events.out.tfevents.*) "
            "and without summary.json; name the folder that holds them"
        )
    if os.path.isdir(path):
        inputs.runs.append(_tensorboard(path))
        return
    if "tfevents" in path.name:
        raise UserError(f"{printable(str(path))} is one TensorBoard file; name its folder")
    found = checked(path, dict, read_json(path))
    # Fields of the whole file belong to each of its models.
    models = found.get("models")
    common = {"file": printable(str(path)), "versions": None, "text": None}
    common |= {key: found[key] for key in ("versions", "text", "limit", "max_tokens") if key in found}
    for part in (*(models if isinstance(models, list) else ()), found.get("comparison")):
        if isinstance(part, dict):
            part.update(common)
    kind = found.get("format")
    if kind is None and isinstance(found.get("runs"), dict):
        inputs.runs.extend(_runs(path, checked(path, Summary, found)))
    elif kind == "jreg_megatron measurement":
        inputs.measured.extend(checked(path, Measurement, found).models)
    elif kind == "jreg_megatron evaluation":
        evaluation = checked(path, Evaluation, found)
        inputs.evaluated.extend(evaluation.models)
        inputs.comparisons.extend([evaluation.comparison] if evaluation.comparison else [])
    else:
        raise UserError(
            f"{printable(str(path))} is an unknown kind of file; give a file of measure --json or evaluate "
            "--json, or a summary.json of the demo or a sweep"
        )


def read_history(folder: Path) -> History:
    """Read all TensorBoard files of a run, also of a resumed run.

    Raises:
        UserError: if there are none, or they hold no validation with JREG's measurements.
    """
    events, scalars = _events(folder)
    history = partial(_scalar, events)
    missing = {_LOSS, RATE_NAME + _VALIDATION}.difference(scalars)
    if missing:
        raise UserError(f"{folder} holds no '{min(missing)}'; train with JREG's flags and validation data")
    loss, rate = history(_LOSS), history(RATE_NAME + _VALIDATION)
    # Layer numbers are padded to one length, so names sort like layers.
    layers = [history(tag) for tag in sorted(filter(_LAYER.fullmatch, scalars))]
    # A killed run may have written only a part of a validation. This part does not count.
    iterations = sorted(set(loss).intersection(rate, *layers))
    if not iterations:
        raise UserError(f"{folder} holds no whole validation; continue the run")
    texts = [tag for tag in events.Tags()["tensors"] if tag.endswith(_SETTING)]
    return History(
        iterations=iterations,
        validation_loss=[loss[iteration] for iteration in iterations],
        jump_rate=[rate[iteration] for iteration in iterations],
        profiles=[[layer[iteration] for layer in layers] for iteration in iterations],
        settings={
            tag.removesuffix(_SETTING): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
            for tag in texts
        },
    )


def read_scalars(folder: Path, names: str) -> dict[str, dict[int, float]]:
    """A run's scalars whose whole name matches the regular expression ``names``, by name and step.

    Raises:
        UserError: as :func:`read_history`.
    """
    events, scalars = _events(folder)
    return {tag: _scalar(events, tag) for tag in sorted(scalars) if re.fullmatch(names, tag)}


def _events(folder: Path) -> tuple[Any, list[str]]:
    """All TensorBoard files of a folder, and the names of their scalars."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; train with --tensorboard-dir")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    if not any(tags[kind] for kind in ("scalars", "tensors")):
        raise UserError(f"{folder} holds no events; its files are empty or damaged, name another folder")
    return events, tags["scalars"]


def _scalar(events: Any, tag: str) -> dict[int, float]:
    # Megatron evaluates once more after the last iteration; the later value counts.
    return {event.step: event.value for event in events.Scalars(tag)}


def _tensorboard(folder: Path) -> Run:
    history, place = read_history(folder), folder.resolve()
    said = history.settings.get("jreg_final_state")  # a custom training loop does not log it
    return Run(
        **vars(history),
        file=printable(str(folder)),
        folder=(home := place.parent if place.name == "tensorboard" else place),
        name=home.name,
        final_state=next((state for state in STATES if state == said), None),
        versions={},
    )


def _runs(path: Path, summary: Summary) -> Iterator[Run]:
    for name, run in summary.runs.items():
        settings = {
            "iterations": summary.iterations,
            "recipe": summary.recipe,
            "seed": summary.seed if run.seed is None else run.seed,
            "jreg_coeff": run.coeff or 0.0,
            "jreg_alpha": run.alpha,
        }
        yield Run(
            file=printable(str(path)),
            folder=Path(os.path.realpath(path)).parent,
            name=name,
            iterations=[point.iteration for point in run.history],
            validation_loss=[point.validation_loss for point in run.history],
            jump_rate=[point.jump_rate for point in run.history],
            profiles=[[]] * (len(run.history) - 1) + [run.displacement],
            final_state=summary.final_state,
            settings={
                name: f"{value:g}" if isinstance(value, float) else str(value)
                for name, value in settings.items()
                if value is not None
            },
            versions=summary.versions,
        )
