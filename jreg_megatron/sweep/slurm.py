"""A sweep as a Slurm array: one task trains one run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import count, groupby

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.sweep.grid import Sweep

TASK = "SLURM_ARRAY_TASK_ID"


def command(sweep: Sweep, options: str) -> list[str]:
    """``sbatch`` for the unfinished runs; the number of a task is the place of its run in ``sweep.json``.

    Args:
        sweep: the sweep to train.
        options: more options of sbatch, quoted as for a shell; they override ours.

    Raises:
        UserError: if the options have an open quote, or the recipe has no ``slurm.sh`` beside it.
    """
    script = sweep.recipe.parent / "slurm.sh"
    if not script.is_file():
        raise UserError(f"{script} is missing; keep the recipe in the folder that came with it")
    try:
        more = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--slurm-options is {options}; it cannot be split into words: {error}") from None
    numbers = [number for number, run in enumerate(sweep.runs) if not sweep.is_finished(run)]
    return [
        *("sbatch", f"--array={_as_ranges(numbers)}", f"--job-name={sweep.output.name}"),
        *(f"--output={sweep.output}/slurm-%A_%a.log", *more, str(script)),
        *(os.environ.get("PYTHON") or sys.executable, "-m", "jreg_megatron.sweep"),
        *("--output", str(sweep.output), "--only"),
    ]


def check() -> None:
    """Raises:
    UserError: if this machine has no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch, which is not on PATH; run this on a login node of the cluster")


def submit(words: Sequence[str]) -> str:
    """Submit the array to Slurm; returns the words of sbatch.

    Raises:
        UserError: if sbatch refuses.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or "without a message"
        raise UserError(f"sbatch refuses the array with status {done.returncode}: {said}")
    return done.stdout.strip()


def task_number() -> int:
    """The number of this process's task in the array.

    Raises:
        UserError: outside an array.
    """
    text = os.environ.get(TASK, "")
    if not text.isdecimal():
        raise UserError(
            f"--only has no number, and {TASK} is {text or 'not set'}; name a run, such as --only 3"
        )
    return int(text)


def _as_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as Slurm writes them: ``0-3,7``."""
    places = count()
    parts = [list(part) for _, part in groupby(numbers, lambda number: number - next(places))]
    return ",".join(f"{part[0]}-{part[-1]}" if part[1:] else str(part[0]) for part in parts)
