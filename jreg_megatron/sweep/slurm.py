"""A sweep as a Slurm array: one task trains one run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.sweep.grid import Sweep

TASK = "SLURM_ARRAY_TASK_ID"


def command(sweep: Sweep, options: str) -> list[str]:
    """``sbatch`` for the runs that are not finished; a task's number is its run's place in ``sweep.json``.

    Args:
        sweep: what to train.
        options: further options of sbatch, as a shell would take them; they win over ours.

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
    """Refuse a machine that no job can be submitted from.

    Raises:
        UserError: if there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch, which is not on PATH; run this on a login node of the cluster")


def submit(words: Sequence[str]) -> str:
    """Hand the array to Slurm; returns what sbatch says.

    Raises:
        UserError: if it refuses.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or "it says nothing"
        raise UserError(f"sbatch refuses the array with status {done.returncode}: {said}")
    return done.stdout.strip()


def task_number() -> int:
    """The number of the array's task that this process belongs to.

    Raises:
        UserError: outside an array.
    """
    text = os.environ.get(TASK, "")
    if not text.isdecimal():
        raise UserError(
            f"--only has no number, and {TASK} is {text or 'not set'}; name a run, as in --only 3"
        )
    return int(text)


def _as_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as Slurm writes them: ``0-3,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
