"""Join the numbers that belong to one model, and give each model a unique label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from jreg_megatron.report.inputs import Evaluated, Inputs, Measured, Origin, Run
from jreg_megatron.runtime.documents import shortened

LENGTH = 48
_STEP_OF_REVISION = re.compile(r"[-_.]?step[-_]?\d+(-tokens[\w.]*)?", re.IGNORECASE)


@dataclass(eq=False)
class Model:
    """All numbers of one model."""

    name: str
    measured: list[Measured] = field(default_factory=list)
    """By training step, all with the same conditions."""
    evaluated: list[Evaluated] = field(default_factory=list)
    run: Run | None = None
    label: str = ""
    """Printable, short and unique."""

    @property
    def origins(self) -> list[Origin]:
        """All measurements and evaluations."""
        return [*self.measured, *self.evaluated]

    @property
    def file(self) -> str:
        """The first file with its numbers."""
        return self.origins[0].file if self.origins else self.run.file if self.run else ""

    @property
    def num_layers(self) -> int | None:
        """L, if known."""
        if self.origins:
            return self.origins[-1].num_layers
        return len(self.run.displacement) or None if self.run else None

    @property
    def settings(self) -> dict[str, str]:
        """Settings of its training. The run's values override those of a measurement."""
        measured = self.measured[-1].settings if self.measured else {}
        return measured | (self.run.settings if self.run else {})

    @property
    def is_series(self) -> bool:
        """Whether several steps were measured."""
        return len({entry.step for entry in self.measured} - {None}) > 1

    @property
    def step(self) -> int | None:
        """Step of the last measurement, else of the last evaluation, else of the run's end."""
        if last := self.measured[-1:] or self.evaluated[-1:]:
            return last[0].step
        return self.run.iterations[-1] if self.run else None


def models_of(inputs: Inputs) -> list[Model]:
    """The models in the order of the inputs, without labels.

    Measurements of one name, source and revision under the same conditions are one model, a series over its
    steps. An evaluation belongs to the last step. A run belongs to the model of its name that it trained.
    """
    models: list[Model] = []
    entries: list[Measured | Evaluated] = [*inputs.measured, *inputs.evaluated]
    for entry in entries:
        home = next((model for model in models if _is_of(entry, model)), None)
        if home is None:
            models.append(home := Model(entry.name))
        if isinstance(entry, Measured):
            home.measured.append(entry)
        else:
            home.evaluated.append(entry)
    for run in inputs.runs:
        home = next((model for model in models if model.run is None and _trained(run, model)), None)
        if home is None:
            models.append(home := Model(run.name))
        home.run = run
    for model in models:  # by step; a measurement without a step is of the finished model
        model.measured.sort(key=lambda entry: (entry.step is None, entry.step or 0))
    return models


def convention(models: Sequence[Model]) -> str:
    """The page's kind of first token: ``dropped`` if all measurements have it, else ``kept``."""
    firsts = {entry.first_token for model in models for entry in model.measured}
    return firsts.pop() if len(firsts) == 1 else "kept"


def _without_step(origin: Origin) -> str:
    """The revision without its step: ``stage1`` for ``stage1-step1000-tokens5B``. It may be empty."""
    return _STEP_OF_REVISION.sub("", origin.revision or "").strip("-_.")


def _is_of(entry: Measured | Evaluated, model: Model) -> bool:
    """Whether a measurement or an evaluation belongs to a model that has some already."""
    if not model.origins:
        return False
    places = [(o.name, o.source, o.num_layers, _without_step(o)) for o in (entry, model.origins[0])]
    steps = {measured.step for measured in model.measured}
    if places[0] != places[1]:
        return False
    if isinstance(entry, Measured):
        return entry.step not in steps and entry.conditions == model.measured[0].conditions
    last = max((step for step in steps if step is not None), default=None)
    return not model.evaluated and (last is None or entry.step in (None, last))


def _trained(run: Run, model: Model) -> bool:
    """Whether a run trained a model: same name and layers, and the model's source is in the run's folder."""
    if run.name != model.name or (run.displacement and model.num_layers != len(run.displacement)):
        return False
    # A source of Hugging Face that is not a path here is a name on the hub.
    sources = [o.source for o in model.origins if o.kind != "hugging_face" or os.path.exists(o.source)]
    places = {Path(os.path.realpath(source)) for source in sources}
    saved = run.settings.get("save")
    if saved and (saved in sources or Path(os.path.realpath(saved)) in places):
        return True
    return any(place.is_relative_to(run.folder) for place in places)


def label(models: Sequence[Model], taken: Iterable[str] = ()) -> None:
    """Set the label of each model: its name, and in brackets the difference to others of that name.

    No model gets a label that is ``taken``.
    """
    twins: dict[str, list[Model]] = {}
    for model in models:
        twins.setdefault(model.name, []).append(model)
    apart = {
        model: words
        for group in twins.values()
        if len(group) > 1
        for model, words in zip(group, _told_apart(group), strict=True)
    }
    used = set(taken)
    for model in models:
        text = model.name
        if words := apart.get(model):
            text = shortened(text, LENGTH // 2)
            text = f"{text} ({shortened(words, LENGTH - len(text) - 3)})"
        ways = (f"{shortened(text, LENGTH - 6)} #{number}" for number in count(2))
        model.label = next(way for way in chain([shortened(text, LENGTH)], ways) if way not in used)
        used.add(model.label)


def _told_apart(twins: Sequence[Model]) -> list[str]:
    """The differences between models of one name: one property, or several if one is not enough."""
    lasts = [model.origins[-1] if model.origins else None for model in twins]
    sources = [model.origins[0].source if model.origins else model.file for model in twins]
    steps = ["" if last is None or last.step is None else f"step {last.step}" for last in lasts]
    columns = [
        _tails([re.sub(r"(?<=.)/(checkpoints|tensorboard)/*$", "", source) for source in sources]),
        [_without_step(last) if last else "" for last in lasts],
        _conditions(twins),
        [last.revision or step if last else "" for last, step in zip(lasts, steps, strict=True)],
        _tails([model.file for model in twins]),
    ]
    for column in columns:
        if len(set(column)) == len(twins):
            return column
    differing = [column for column in columns if len(set(column)) > 1]
    return ["; ".join(filter(None, words)) for words in zip(*differing, strict=True)] or [""] * len(twins)


def _conditions(twins: Sequence[Model]) -> list[str]:
    found = [model.measured[-1].conditions if model.measured else {} for model in twins]
    known = [conditions for conditions in found if conditions]
    names = dict.fromkeys(name for conditions in known for name in conditions)
    differing = [name for name in names if len({conditions.get(name) for conditions in known}) > 1]
    return ["; ".join(f"{name} {own[name]}" for name in differing if name in own) for own in found]


def _tails(places: Sequence[str]) -> list[str]:
    """The shortest end of each path that no other path has, or the whole path."""

    def tail(place: str) -> str:
        parts = place.split("/")
        ends = ("/".join(parts[-length:]) for length in range(1, len(parts) + 1))
        alone = (end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in {*places}) == 1)
        return next(alone, place)

    return [tail(place) for place in places]
