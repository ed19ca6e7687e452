"""Files and folders into :class:`~jreg_megatron.report.inputs.Inputs`, every number checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jreg_megatron.report.check import checked, printable, read_json
from jreg_megatron.report.history import History
from jreg_megatron.report.inputs import STATES, Evaluation, Inputs, Measurement, Run, Summary
from jreg_megatron.runtime.errors import UserError


def read(paths: Sequence[Path]) -> Inputs:
    """Read JSON files and TensorBoard folders; a path that is given twice counts once.

    Raises:
        UserError: for a file of no known format; it names the file and the field.
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
    """The file, or the folder of TensorBoard files, that ``path`` leads to."""
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
            f"{printable(str(path))} is neither a measurement (measure --json) nor an evaluation (evaluate "
            "--json) nor a summary.json of the demo or a sweep"
        )


def _tensorboard(folder: Path) -> Run:
    history = History.read(folder)
    state = history.settings.get("jreg_final_state")  # not logged by an own loop
    if state not in (*STATES, None):
        raise UserError(
            f"{printable(str(folder))}: jreg_final_state is {printable(str(state))}; it must be one of "
            f"{', '.join(STATES)}"
        )
    place = folder.resolve()
    home = place.parent if place.name == "tensorboard" else place
    return Run(
        **vars(history),
        file=printable(str(folder)),
        folder=home,
        name=home.name,
        final_state=state,
        versions={},
    )


def _runs(path: Path, summary: Summary) -> Iterator[Run]:
    common = {"iterations": str(summary.iterations)}
    common |= {} if summary.recipe is None else {"recipe": summary.recipe}
    common |= {} if summary.seed is None else {"seed": str(summary.seed)}
    for name, run in summary.runs.items():
        settings = common | {"jreg_coeff": f"{run.coeff or 0:g}"}
        settings |= {} if run.alpha is None else {"jreg_alpha": f"{run.alpha:g}"}
        settings |= {} if run.seed is None else {"seed": str(run.seed)}
        yield Run(
            file=printable(str(path)),
            folder=Path(os.path.realpath(path)).parent,
            name=name,
            iterations=[point.iteration for point in run.history],
            validation_loss=[point.validation_loss for point in run.history],
            jump_rate=[point.jump_rate for point in run.history],
            profiles=[[]] * (len(run.history) - 1) + [run.displacement],
            final_state=summary.final_state,
            settings=settings,
            versions=summary.versions,
        )
