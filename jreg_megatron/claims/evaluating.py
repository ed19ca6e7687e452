"""The output folder of many runs, and their evaluations: for the claims and for the comparison of methods."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jreg_megatron.claims.evidence import Trained, evaluation
from jreg_megatron.demo.training import each, progress, run_logged
from jreg_megatron.report.check import checked, read_json
from jreg_megatron.report.inputs import Evaluated
from jreg_megatron.runtime import output
from jreg_megatron.runtime.errors import UserError

LOCK = ".lock"
_EVALUATIONS = "evaluations"


def make_output(folder: Path, *files: str) -> None:
    """Make the output folder, in which ``files`` will be written.

    Raises:
        UserError: if it cannot be made, or has a folder in the place of a file.
    """
    try:
        (folder / _EVALUATIONS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output is {folder}, which cannot be made: {error.strerror}; name another"
        ) from error
    for name in (*files, LOCK):
        if (folder / name).is_dir():
            raise UserError(f"--output is {folder}, where {name} is a folder; name another")


def evaluate_all(
    runs: Sequence[Trained],
    files: Mapping[Path, Path],
    folder: Path,
    words: Sequence[str],
    jobs: int,
    quiet: bool,
) -> dict[Path, Evaluated]:
    """Evaluate the runs whose file is missing, ``jobs`` at a time; returns all evaluations, by run folder.

    Args:
        files: of each evaluation, by run folder.
        folder: the output folder.
        words: for ``jreg-megatron evaluate``.

    Raises:
        UserError: if earlier evaluations had other words, a file is of another model, or one fails.
    """
    asked = folder / _EVALUATIONS / "words.json"
    done = {run.folder: evaluation(run, files[run.folder]) for run in runs if files[run.folder].exists()}
    if asked.exists() and done:
        before = checked(asked, list[str], read_json(asked))
        if before != list(words):
            raise UserError(
                f"--output is {folder}, where evaluations had {shlex.join(before) or 'no words'}, "
                f"not {shlex.join(words) or 'none'}; name another --output, or delete them"
            )
    output.write_json(str(asked), list(words))

    async def evaluate(run: Trained) -> None:
        file = files[run.folder]
        # A file that is cut off by a failure does not count.
        part = file.with_name(f".{file.name}")
        command = ["-m", "jreg_megatron.evaluate", f"model={run.checkpoints}", "--lens", "--quiet"]
        command += [*words, "--json", str(part)]
        await run_logged(f"evaluating {run.folder}", command, file.with_suffix(".log"), lambda _: None)
        os.replace(part, file)
        done[run.folder] = evaluation(run, file)
        bar.update()

    left = [run for run in runs if run.folder not in done]
    with progress("evaluating", "models", len(runs), len(left), quiet) as bar:
        each(left, evaluate, jobs)
    return done


def about(form: str, how: Mapping[str, str]) -> dict[str, Any]:
    """The head of a JSON document: its format, versions, and how it was made, on which machine."""
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores"
    machine += f", Python {platform.python_version()}"
    versions = output.versions("megatron-core", "torch", "lm_eval", "scipy")
    how = {**how, "finished": date.today().isoformat(), "machine": machine}
    return {"format": form, "version": 1, "versions": versions, "how": how}
