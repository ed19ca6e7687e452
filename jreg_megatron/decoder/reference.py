"""Which models a user means: ``[NAME=]MODEL[@REVISION,...]``, found without importing torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jreg_megatron.decoder.checkpoint.folder import TRACKER, is_megatron, megatron_steps
from jreg_megatron.runtime.errors import UserError

GGUF_ENDING = ".gguf"
ALL = "all"

MODEL_HELP = (
    "[NAME=]MODEL[@REVISION,...]: a name on the Hugging Face hub, a folder, a .gguf file, or the --save "
    "folder of a Megatron training. @ takes revisions on the hub, or iterations of a training; @all takes "
    "all of them"
)
"""What a MODEL may be, for ``--help``."""


@dataclass(frozen=True)
class Reference:
    """A model that a user named: one checkpoint of it.

    Attributes:
        name: what to call it; the same for all checkpoints of a series.
        source: name on the hub, folder or file.
        revision: on the hub; None for the default, and for what is on this machine.
        step: iteration of a Megatron checkpoint; None for the latest.
        is_megatron: whether it is a folder of Megatron checkpoints.
    """

    name: str
    source: str
    revision: str | None = None
    step: int | None = None
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
        UserError: for a path or an iteration that is not there.
    """
    groups = [_expand(model) for model in models]
    names = Counter(group[0].name for group in groups)
    # Two models of one name are called by what the user gave.
    return [
        replace(reference, name=given) if names[reference.name] > 1 else reference
        for given, group in zip(models, groups, strict=True)
        for reference in group
    ]


def step_of(text: str) -> int | None:
    """The training step that a revision or a folder's name tells: ``step1000``, ``checkpoint-500``."""
    found = re.search(r"(?:step|checkpoint|iter)[-_]?0*(\d+)", Path(text).name)
    return int(found[1]) if found else None


def _expand(model: str) -> list[Reference]:
    name, model = _split(model, "=")
    if not model:
        raise UserError("a MODEL is empty; give a name on the hub, a folder or a file")
    given_revisions, source = "", model
    if not Path(model).expanduser().exists() and "@" in model:
        source, _, given_revisions = model.rpartition("@")
    revisions = [part for part in given_revisions.split(",") if part]
    path = Path(source).expanduser()
    if path.exists():
        return _on_this_machine(name, path, revisions)
    if (
        source.endswith(GGUF_ENDING)
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or not source
    ):
        raise UserError(f"{source or model!r} does not exist; correct the path, or give a name on the hub")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"{source!r} is neither a path that exists nor a name on the hub; correct it")
    if revisions == [ALL]:
        revisions = hub_revisions(source)
    wanted: list[str | None] = [*revisions] or [None]
    return [Reference(name or source, source, revision) for revision in wanted]


def _on_this_machine(name: str, path: Path, revisions: list[str]) -> list[Reference]:
    name = name or _short_name(path)
    if is_megatron(path):
        whole = Reference(name, str(path), is_megatron=True)
        picked = _pick(path, megatron_steps(path), revisions) if revisions else []
        return [replace(whole, step=step) for step in picked] if revisions else [whole]
    # Trainers of transformers save checkpoint-500, checkpoint-1000, ...
    saved = {
        int(number): child
        for child in path.glob("checkpoint-*")
        if (number := child.name.rpartition("-")[2]).isdecimal()
    }
    if saved and (revisions or not (path / "config.json").is_file()):
        steps = _pick(path, sorted(saved), revisions or [str(max(saved))])
        return [Reference(name, str(saved[step]), step=step) for step in steps]
    if revisions:
        raise UserError(
            f"@{','.join(revisions)} asks for checkpoints of {path}, which is no series of them; leave it out"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds no model: neither a config.json of transformers nor Megatron's {TRACKER}; name "
            "the folder that the model was saved to"
        )
    if path.is_file() and path.suffix != GGUF_ENDING:
        raise UserError(
            f"{path} is not a model file that is read here; give a .gguf file or a model's folder"
        )
    return [Reference(name, str(path))]


def _pick(path: Path, steps: list[int], wanted: list[str]) -> list[int]:
    if wanted == [ALL] and steps:
        return steps
    for text in wanted:
        if not text.isdecimal() or int(text) not in steps:
            there = ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
            raise UserError(f"@{text} is no checkpoint of {path}; there are {there or 'none'}")
    return list(map(int, wanted))


def hub_revisions(source: str) -> list[str]:
    """The branches on the hub of a model that tell a training step, in its order.

    Raises:
        UserError: if the hub does not answer, or no branch tells a step.
    """
    import huggingface_hub

    try:
        branches = [branch.name for branch in huggingface_hub.list_repo_refs(source).branches]
    except Exception as error:  # the hub's client raises those of several libraries below it
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"{source}@all needs the hub, which did not answer ({said}); name the revisions"
        ) from error
    with_steps = [(step, branch) for branch in branches if (step := step_of(branch)) is not None]
    if not with_steps:
        raise UserError(f"{source}@all: none of its branches tells a step; name revisions: {source}@A,B")
    return [branch for _, branch in sorted(with_steps)]


def _split(model: str, mark: str) -> tuple[str, str]:
    # A path may hold the mark itself.
    if mark not in model or any(
        Path(path).expanduser().exists() for path in (model, model.rpartition("@")[0] or model)
    ):
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
