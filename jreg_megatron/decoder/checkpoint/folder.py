"""Find the checkpoints in a Megatron folder, without torch or Megatron."""

from __future__ import annotations

import json
import re
from pathlib import Path

from jreg_megatron.runtime.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint of weights only, which comes from no training."""

_FINISHED = "metadata.json"  # Megatron writes it after all weights
_FORMAT = "torch_dist"


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The folder of one finished ``torch_dist`` checkpoint.

    Args:
        folder: a training's ``--save`` folder, or one ``iter_...`` folder in it.
        step: iteration; None for the checkpoint from which Megatron would continue.

    Raises:
        UserError: if it does not exist, is not finished, or has another format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a Megatron training's --save folder")
    own = step_of(folder)
    if own is not None or folder.name == RELEASE:
        if step not in (None, own):
            raise UserError(f"--step is {step}, but {folder} is one checkpoint; leave --step out")
        place = folder
    elif step is not None:
        place = folder / f"iter_{step:07d}"
        if not place.is_dir():
            steps = megatron_steps(folder)
            shown = ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]]))
            there = (
                f"iterations {shown}; give one of them"
                if steps
                else "no finished checkpoint; name another folder"
            )
            raise UserError(f"--step is {step}, but {folder} has {there}")
    else:
        place = _latest(folder)
    _refuse_other_formats(place)
    return place


def last_checkpoint(folder: str | Path | None) -> int:
    """Iteration of the checkpoint from which Megatron would continue; 0 if there is none."""
    tracked = _tracked(Path(folder)) if folder else None
    return int(tracked) if tracked and tracked != RELEASE else 0


def bridge_as(example: str) -> str:
    """Advice to export a model with Megatron-Bridge; ``example`` is a model that Bridge knows."""
    return (
        "export it with Megatron-Bridge's AutoBridge (load_megatron_model, then save_hf_pretrained), as a "
        f"model with the same layers such as {example}"
    )


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a Megatron checkpoint or holds some, in any of Megatron's formats."""
    if folder.is_dir() and (step_of(folder) is not None or folder.name == RELEASE):
        files = (_FINISHED, ".metadata", TRACKER)
        return any((folder / file).is_file() for file in files) or _is_legacy(folder)
    return (folder / TRACKER).is_file() or bool(_begun(folder))


def megatron_steps(folder: Path) -> list[int]:
    """Iterations of the finished checkpoints, in ascending order. For an ``iter_...`` folder only its own."""
    own = step_of(folder)
    begun = _begun(folder) if own is None else {own: folder}
    return [step for step, path in begun.items() if _is_finished(path)]


def step_of(path: Path) -> int | None:
    """The iteration in the name of a checkpoint's folder; None for other names."""
    match = re.fullmatch(r"iter_(\d{7,})", path.name)
    return int(match[1]) if match and path.is_dir() else None


def _is_finished(place: Path) -> bool:
    return (place / _FINISHED).is_file() and (place / ".metadata").is_file()


def _is_legacy(place: Path) -> bool:
    return any(place.glob("mp_rank_*"))


def _refuse_other_formats(place: Path) -> None:
    if _is_legacy(place):
        raise UserError(
            f"{place} has Megatron's old format 'torch', which only the training's own layout can read; "
            "convert it with --ckpt-convert-format torch_dist"
        )
    if (place / "run_config.yaml").is_file():
        raise UserError(
            f"{place} is a checkpoint of Megatron-Bridge (run_config.yaml); export it with Bridge's "
            "AutoBridge, and give the Hugging Face folder"
        )
    if not (place / _FINISHED).is_file():
        is_fsdp = " or it is in FSDP's format" if (place / ".metadata").is_file() else ""
        raise UserError(f"{place} has no {_FINISHED}: it was not saved whole{is_fsdp}; give another --step")
    try:
        backend = json.loads((place / _FINISHED).read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place / _FINISHED} cannot be read; give another --step") from error
    if backend != _FORMAT:
        raise UserError(
            f"{place} has the format {backend}, but only {_FORMAT} can be read; save it with "
            f"--ckpt-format {_FORMAT}"
        )
    if not (place / ".metadata").is_file():
        raise UserError(f"{place} has no .metadata, so its weights cannot be found; give another --step")


def _tracked(folder: Path) -> str | None:
    """The checkpoint in Megatron's tracker: an iteration or :data:`RELEASE`; None without a tracker."""
    try:
        text = (folder / TRACKER).read_text().strip()
    except OSError:
        return None
    return text if text.isdecimal() or text == RELEASE else None


def _latest(folder: Path) -> Path:
    """The checkpoint from which Megatron would continue, else the last finished one, else the last one.

    Raises:
        UserError: if there is no checkpoint.
    """
    tracked = _tracked(folder)
    if tracked == RELEASE:
        return folder / RELEASE
    begun = _begun(folder)
    if not begun:
        raise UserError(f"{folder} holds no Megatron checkpoint; name a training's --save folder")
    if tracked and int(tracked) in begun:
        return begun[int(tracked)]
    finished = [path for path in begun.values() if _is_finished(path)]
    return (finished or list(begun.values()))[-1]


def _begun(folder: Path) -> dict[int, Path]:
    """A training's checkpoints by iteration, in ascending order, including unfinished ones."""
    return dict(sorted((step, path) for path in folder.glob("iter_*") if (step := step_of(path)) is not None))
