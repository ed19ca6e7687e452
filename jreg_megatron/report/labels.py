"""A unique label for each model, which says how it differs from models of the same name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import count

from jreg_megatron.report.check import printable, shortened
from jreg_megatron.report.models import Model, without_step

LENGTH = 48
_USUAL_FOLDERS = ("checkpoints", "tensorboard")


def label(models: Sequence[Model], taken: Iterable[str] = ()) -> None:
    """Set the label of each model: its name, and in brackets the difference to others of that name.

    Args:
        models: all models of a page.
        taken: labels of other lines; no model gets them.
    """
    twins: dict[str, list[Model]] = {}
    for model in models:
        twins.setdefault(look(_visible(model.name)), []).append(model)
    apart = {
        id(model): words
        for group in twins.values()
        if len(group) > 1
        for model, words in zip(group, _told_apart(group), strict=True)
    }
    used = set(map(look, taken))
    for model in models:
        text, words = _visible(model.name), apart.get(id(model), "")
        if words:
            text = shortened(text, LENGTH // 2)
            text = f"{text} ({shortened(words, LENGTH - len(text) - 3)})"
        model.label = shortened(text, LENGTH)
        for number in count(2):
            if look(model.label) not in used:
                break
            model.label = f"{shortened(text, LENGTH - 6)} #{number}"
        used.add(look(model.label))


def look(text: str) -> str:
    """A text as a reader sees it: two texts that look alike on a page are equal."""
    return " ".join(unicodedata.normalize("NFKC", printable(text)).split())


def _visible(name: str) -> str:
    """A name with marks for the spaces that a page does not show."""
    return re.sub(r"^ +| +$| {2,}", lambda found: "␣" * len(found[0]), name)


def _told_apart(twins: Sequence[Model]) -> list[str]:
    """What differs between models of one name: one property, or several if one is not enough."""
    columns = [way(twins) for way in (_sources, _revisions, _conditions, _steps, _files)]
    best: list[list[str]] = []
    for column in columns:
        if len(set(map(look, column))) == len(twins):
            return column
        if len(set(zip(*best, column, strict=True))) > len(set(zip(*best, strict=True)) if best else {""}):
            best.append(column)
    return ["; ".join(filter(None, words)) for words in zip(*best, strict=True)] or [""] * len(twins)


def _sources(twins: Sequence[Model]) -> list[str]:
    """Paths, without the usual last folder."""
    found = []
    for place in (m.origins[0].source if m.origins else m.run.file if m.run else "" for m in twins):
        head, _, last = place.rstrip("/").rpartition("/")
        found.append(head if head and last in _USUAL_FOLDERS else place)
    return _tails(found)


def _revisions(twins: Sequence[Model]) -> list[str]:
    return [without_step(model.origins[-1]) if model.origins else "" for model in twins]


def _conditions(twins: Sequence[Model]) -> list[str]:
    found = [model.measured[-1].conditions if model.measured else {} for model in twins]
    known = [conditions for conditions in found if conditions]
    names = dict.fromkeys(name for conditions in known for name in conditions)
    differing = [name for name in names if len({conditions.get(name) for conditions in known}) > 1]
    enough = [name for name in differing if len({own.get(name) for own in found}) == len(found)]
    shown = enough[:1] or differing
    return ["; ".join(f"{name} {own[name]}" for name in shown if name in own) for own in found]


def _steps(twins: Sequence[Model]) -> list[str]:
    origins = [model.origins[-1] if model.origins else None for model in twins]
    return ["" if o is None else o.revision or ("" if o.step is None else f"step {o.step}") for o in origins]


def _files(twins: Sequence[Model]) -> list[str]:
    return _tails([m.origins[0].file if m.origins else m.run.file if m.run else "" for m in twins])


def _tails(places: Sequence[str]) -> list[str]:
    """The shortest end of each path that no other path has, or the whole path."""

    def tail(place: str) -> str:
        others = set(places) - {place}
        parts = place.split("/")
        ends = ("/".join(parts[-length:]) for length in range(1, len(parts) + 1))
        alone = (end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in others))
        return next(alone, place)

    return [tail(place) for place in places]
