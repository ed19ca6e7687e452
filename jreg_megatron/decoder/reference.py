"""Parse the user's models ``[NAME=]MODEL[@REVISION,...]`` and find them, without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jreg_megatron.decoder.checkpoint.folder import TRACKER, is_megatron, megatron_steps
from jreg_megatron.runtime.errors import UserError, one_line

GGUF_ENDING = ".gguf"
_ALL = "all"


@dataclass(frozen=True)
class Reference:
    """One checkpoint of a model that the user named."""

    name: str  # for tables and messages; all checkpoints of a series have the same
    source: str  # name on the hub, folder or file
    revision: str | None = None  # on the hub; None for the default, and for a local model
    step: int | None = None  # iteration of a checkpoint; None for the latest
    is_megatron: bool = False

    @property
    def at(self) -> str:
        """The name, with the revision or iteration, for messages."""
        return name_at(self.name, self.revision, self.step)


def name_at(name: str, revision: str | None, step: int | None) -> str:
    """A model's name, with its revision or training step if there is one."""
    which = step if revision is None else revision
    return name if which is None else f"{name}@{which}"


def find_models(models: Sequence[str]) -> list[Reference]:
    """The checkpoints that the arguments name, in order.

    Raises:
        UserError: for a path or an iteration that does not exist.
    """
    groups = [_expand(model) for model in models]
    names = Counter(group[0].name for group in groups)
    # Models of the same name get their arguments as names.
    return [
        replace(reference, name=given) if names[reference.name] > 1 else reference
        for given, group in zip(models, groups, strict=True)
        for reference in group
    ]


def step_of(text: str) -> int | None:
    """The training step in the name of a revision or a folder, such as ``step1000`` or ``checkpoint-500``."""
    found = re.search(r"(?:step|checkpoint|iter)[-_]?0*(\d+)", Path(text).name)
    return int(found[1]) if found else None


def _expand(model: str) -> list[Reference]:
    name, model = _split(model, "=")
    if not model:
        raise UserError("MODEL is empty; give a name on the hub, a folder or a file")
    source, revisions = model, list[str]()
    if not Path(model).expanduser().exists() and "@" in model:
        source, _, given = model.rpartition("@")
        revisions = [part for part in given.split(",") if part]
    path = Path(source).expanduser()
    if path.exists():
        return _on_this_machine(name, path, revisions)
    is_path = source.endswith(GGUF_ENDING) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path or not source:
        raise UserError(f"{source or model!r} does not exist; correct the path, or give a name on the hub")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"{source!r} is neither a path that exists nor a name on the hub; correct it")
    wanted: list[str | None] = [*(hub_revisions(source) if revisions == [_ALL] else revisions)]
    return [Reference(name or source, source, revision) for revision in wanted or [None]]


def _on_this_machine(name: str, path: Path, revisions: list[str]) -> list[Reference]:
    name, is_model = name or _short_name(path), (path / "config.json").is_file()
    if is_megatron(path):
        steps: list[int | None]
        steps = [*_pick(path, megatron_steps(path), revisions)] if revisions else [None]
        return [Reference(name, str(path), step=step, is_megatron=True) for step in steps]
    # Trainers of transformers save checkpoint-500, checkpoint-1000, ...
    saved = {
        int(number): child
        for child in path.glob("checkpoint-*")
        if (number := child.name.rpartition("-")[2]).isdecimal()
    }
    if saved and (revisions or not is_model):
        which = _pick(path, sorted(saved), revisions or [str(max(saved))])
        return [Reference(name, str(saved[step]), step=step) for step in which]
    if revisions:
        raise UserError(f"@{','.join(revisions)} names checkpoints, but {path} is one model; leave it out")
    if path.is_dir() and not is_model:
        raise UserError(
            f"{path} holds no model: neither a config.json of transformers nor Megatron's {TRACKER}; "
            "give the folder of a saved model"
        )
    if path.is_file() and path.suffix != GGUF_ENDING:
        raise UserError(f"{path} is not a known model file; give a .gguf file or a model's folder")
    return [Reference(name, str(path))]


def _pick(path: Path, steps: list[int], wanted: list[str]) -> list[int]:
    if wanted == [_ALL] and steps:
        return steps
    for text in wanted:
        if not text.isdecimal() or int(text) not in steps:
            there = ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
            raise UserError(f"@{text} is no checkpoint of {path}; there are {there or 'none'}")
    return list(map(int, wanted))


def hub_revisions(source: str) -> list[str]:
    """A model's branches on the hub whose names hold a training step, sorted by step.

    Raises:
        UserError: if the hub does not answer, or no name holds a step.
    """
    import huggingface_hub

    try:
        branches = [branch.name for branch in huggingface_hub.list_repo_refs(source).branches]
    except Exception as error:  # the hub's client raises errors of several libraries
        raise UserError(
            f"{source}@all needs the hub, which did not answer ({one_line(error, 160)}); name the revisions"
        ) from error
    with_steps = [(step, branch) for branch in branches if (step := step_of(branch)) is not None]
    if not with_steps:
        raise UserError(f"{source}@all finds no branch with a step in its name; name revisions: {source}@A,B")
    return [branch for _, branch in sorted(with_steps)]


def _split(model: str, mark: str) -> tuple[str, str]:
    # An existing path may contain the mark.
    paths = (model, model.rpartition("@")[0] or model)
    if mark not in model or any(Path(path).expanduser().exists() for path in paths):
        return "", model
    before, _, after = model.partition(mark)
    return before, after


def _short_name(path: Path) -> str:
    path = path.absolute()
    if path.suffix == GGUF_ENDING:
        return path.stem
    if re.fullmatch(r"checkpoints?|iter_\d+|checkpoint-\d+", path.name) and path.parent.name:
        return _short_name(path.parent)
    return path.name
