"""Which numbers belong to one model, and a label for it that no other has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from jreg_megatron.report.check import shortened
from jreg_megatron.report.inputs import FIRST_TOKEN, STATES, Evaluated, Inputs, Layers, Measured, Origin, Run

LABEL_LENGTH = 48


@dataclass
class Model:
    """All that is known of one model."""

    name: str
    measured: list[Measured] = field(default_factory=list)
    """By training step."""
    evaluated: list[Evaluated] = field(default_factory=list)
    run: Run | None = None
    label: str = ""
    """Printable, at most :data:`LABEL_LENGTH` characters, and unlike every other model's."""

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

    def last(self, state: str) -> Layers | None:
        """The last measurement, of the tokens that its file puts first."""
        return self.measured[-1].layers[self.measured[-1].first_token, state] if self.measured else None

    @property
    def blocks(self) -> Iterator[tuple[Measured, str, str, Layers]]:
        """Every measurement with its first token, state and numbers."""
        for entry in self.measured:
            for first in FIRST_TOKEN:
                for state in STATES:
                    if (first, state) in entry.layers:
                        yield entry, first, state, entry.layers[first, state]

    def matches(self, other: Model) -> bool:
        """Whether the two can be one model: some source is the same, and no step is there twice."""
        sources = {(o.source, o.num_layers) for o in self.origins}
        has_one = bool(sources & {(o.source, o.num_layers) for o in other.origins})
        return has_one and not _clash(self, other)

    def take(self, other: Model) -> None:
        """Add what is known of the same model."""
        self.measured += other.measured
        self.evaluated += other.evaluated


def models_of(inputs: Inputs) -> list[Model]:
    """The models, in the order of the inputs.

    Measurements of one name in one file are one model, a series over its steps. Between files they are one
    if a source is the same too. An evaluation belongs to the last step, a run to the one model of its name.
    """
    models: list[Model] = []
    for model in _within_files(inputs):
        home = next((m for m in models if m.name == model.name and m.matches(model)), None)
        if home is None:
            models.append(model)
        else:
            home.take(model)
    for run in inputs.runs:
        same = [m for m in models if m.name == run.name]
        alone = len(same) == 1 and sum(other.name == run.name for other in inputs.runs) == 1
        if alone and (not run.displacement or same[0].num_layers == len(run.displacement)):
            same[0].run = run
        else:
            models.append(Model(run.name, run=run))
    for model in models:
        model.measured.sort(key=lambda entry: _order(entry.origin))
        model.evaluated.sort(key=lambda entry: _order(entry.origin))
    _label(models)
    return models


def _within_files(inputs: Inputs) -> Iterator[Model]:
    """One model for each name of each file; what is there twice at one step becomes a second."""
    found: list[Model] = []
    for measured in inputs.measured:
        _put(Model(measured.origin.name, measured=[measured]), found)
    for evaluated in inputs.evaluated:
        _put(Model(evaluated.origin.name, evaluated=[evaluated]), found)
    return iter(found)


def _put(model: Model, found: list[Model]) -> None:
    origin = model.origins[0]
    for other in found:
        first = other.origins[0]
        same = (first.file, first.name, first.num_layers) == (origin.file, origin.name, origin.num_layers)
        if same and not _clash(model, other):
            other.take(model)
            return
    found.append(model)


def _order(origin: Origin) -> tuple[bool, int]:
    """By step; what has none is the finished model."""
    return origin.step is None, origin.step or 0


def _clash(a: Model, b: Model) -> bool:
    """Whether the two cannot be one model: an evaluation stands beside the last step, and there is one."""
    steps = [{entry.origin.step for entry in model.measured} for model in (a, b)]
    if steps[0] & steps[1] or (a.evaluated and b.evaluated):
        return True
    last = max((step for step in steps[0] | steps[1] if step is not None), default=None)
    evaluated = {entry.origin.step for entry in (*a.evaluated, *b.evaluated)}
    return bool(last is not None and evaluated - {None, last})


def _label(models: list[Model]) -> None:
    """Names; where several models have one, with what tells them apart in brackets."""
    taken: set[str] = set()
    for model in models:
        twins = [twin for twin in models if twin.name == model.name]
        label = model.name
        if len(twins) > 1:
            ways = (way for way in (_source, _step, _file) if len(set(map(way, twins))) == len(twins))
            place = next(ways, _file)
            tail = _tail(place(model), [place(twin) for twin in twins if twin is not model])
            label = f"{shortened(label, LABEL_LENGTH // 2)} ({tail})"
        model.label = shortened(label, LABEL_LENGTH)
        for number in count(2):
            if model.label not in taken:
                break
            model.label = f"{shortened(label, LABEL_LENGTH - 6)} #{number}"
        taken.add(model.label)


def _source(model: Model) -> str:
    return model.origins[0].source if model.origins else _file(model)


def _step(model: Model) -> str:
    origin = model.origins[-1] if model.origins else None
    return "" if origin is None else origin.revision or f"step {origin.step}"


def _file(model: Model) -> str:
    return model.origins[0].file if model.origins else model.run.file if model.run else ""


def _tail(text: str, others: list[str]) -> str:
    """The shortest end of a path that no other path has; the whole if there is none."""
    parts = text.split("/")
    tails = ("/".join(parts[-length:]) for length in range(1, len(parts) + 1))
    alone = (tail for tail in tails if not any(f"/{other}".endswith(f"/{tail}") for other in others))
    return shortened(next(alone, text), LABEL_LENGTH // 2 - 3)
