"""Which numbers belong to one model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jreg_megatron.report.inputs import Evaluated, Inputs, Measured, Origin, Run

_STEP_OF_REVISION = re.compile(r"[-_.]?step[-_]?\d+(-tokens[\w.]*)?", re.IGNORECASE)


@dataclass
class Model:
    """All that is known of one model."""

    name: str
    measured: list[Measured] = field(default_factory=list)
    """By training step, all under the same conditions."""
    evaluated: list[Evaluated] = field(default_factory=list)
    run: Run | None = None
    label: str = ""
    """Printable, short, and unlike every other model's."""

    @property
    def origins(self) -> list[Origin]:
        """Of all measurements and evaluations."""
        return [entry.origin for entry in self.measured] + [entry.origin for entry in self.evaluated]

    @property
    def num_layers(self) -> int | None:
        """L, where it is known."""
        if self.origins:
            return self.origins[-1].num_layers
        return len(self.run.displacement) or None if self.run else None

    @property
    def settings(self) -> dict[str, str]:
        """Of its training, from the run if there is one."""
        measured = self.measured[-1].settings if self.measured else {}
        return measured | (self.run.settings if self.run else {})

    @property
    def is_series(self) -> bool:
        """Whether it was measured at several steps."""
        return len({entry.origin.step for entry in self.measured} - {None}) > 1

    @property
    def step(self) -> int | None:
        """Of the last measurement; without one, of the last evaluation or of the run's end."""
        for entries in (self.measured, self.evaluated):
            if entries:
                return entries[-1].origin.step
        return self.run.iterations[-1] if self.run else None

    def matches(self, other: Model) -> bool:
        """Whether the two can be one model: some source is the same, and no step is there twice."""
        keys = [{(o.source, o.num_layers, without_step(o)) for o in model.origins} for model in (self, other)]
        return bool(keys[0] & keys[1]) and not _clash(self, other)

    def take(self, other: Model) -> None:
        """Add what is known of the same model."""
        self.measured += other.measured
        self.evaluated += other.evaluated


def models_of(inputs: Inputs) -> list[Model]:
    """The models, in the order of the inputs, still without labels.

    Measurements of one name in one file are one model, a series over its steps, if they were made under the
    same conditions and of the same revision but for the step. Between files they are one if a source is the
    same too. An evaluation belongs to the last step, a run to the model of its name that it trained.
    """
    models: list[Model] = []
    for model in _within_files(inputs):
        home = next((m for m in models if m.name == model.name and m.matches(model)), None)
        if home is None:
            models.append(model)
        else:
            home.take(model)
    for run in inputs.runs:
        home = next((m for m in models if m.run is None and _trained(run, m)), None)
        if home is None:
            models.append(Model(run.name, run=run))
        else:
            home.run = run
    for model in models:
        model.measured.sort(key=lambda entry: _order(entry.origin))
        model.evaluated.sort(key=lambda entry: _order(entry.origin))
    return models


def convention(models: Sequence[Model]) -> str:
    """Whether a page's numbers are with the first token kept or dropped: as all were measured, or kept."""
    firsts = {entry.first_token for model in models for entry in model.measured}
    return firsts.pop() if len(firsts) == 1 else "kept"


def without_step(origin: Origin) -> str:
    """A revision without its step: ``stage1`` of ``stage1-step1000-tokens5B``; empty if nothing is left."""
    return _STEP_OF_REVISION.sub("", origin.revision or "").strip("-_.")


def _within_files(inputs: Inputs) -> Iterator[Model]:
    """One model for each name of each file; what is there twice at one step becomes a second."""
    found: list[Model] = []
    for measured in inputs.measured:
        _put(Model(measured.origin.name, measured=[measured]), found)
    for evaluated in inputs.evaluated:
        _put(Model(evaluated.origin.name, evaluated=[evaluated]), found)
    return iter(found)


def _put(model: Model, found: list[Model]) -> None:
    def key(origin: Origin) -> tuple[object, ...]:
        return origin.file, origin.name, origin.num_layers, without_step(origin)

    for other in found:
        if key(other.origins[0]) == key(model.origins[0]) and not _clash(model, other):
            other.take(model)
            return
    found.append(model)


def _order(origin: Origin) -> tuple[bool, int]:
    """By step; what has none is the finished model."""
    return origin.step is None, origin.step or 0


def _clash(a: Model, b: Model) -> bool:
    """Whether the two cannot be one model.

    A series has one point for each step, all under the same conditions; an evaluation stands beside the last
    step, and there is one.
    """
    steps = [{entry.origin.step for entry in model.measured} for model in (a, b)]
    if steps[0] & steps[1] or (a.evaluated and b.evaluated):
        return True
    if a.measured and b.measured and a.measured[0].conditions != b.measured[0].conditions:
        return True
    last = max((step for step in steps[0] | steps[1] if step is not None), default=None)
    evaluated = {entry.origin.step for entry in (*a.evaluated, *b.evaluated)}
    return bool(last is not None and evaluated - {None, last})


def _trained(run: Run, model: Model) -> bool:
    """Whether a run trained a model: it has its name, its layers, and lies beside or around its source."""
    if run.name != model.name or (run.displacement and model.num_layers != len(run.displacement)):
        return False
    # What is no path here is the name of a model on a hub.
    sources = [o.source for o in model.origins if o.kind != "hugging_face" or os.path.exists(o.source)]
    places = {Path(os.path.realpath(source)) for source in sources}
    saved = run.settings.get("save")
    if saved and (saved in sources or Path(os.path.realpath(saved)) in places):
        return True
    return any(run.folder == place or run.folder in place.parents for place in places)
