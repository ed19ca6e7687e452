"""Training and evaluation, a few processes side by side; what is finished is not done again."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jreg_megatron.claims.evidence import Trained
from jreg_megatron.demo.data import DemoData
from jreg_megatron.demo.training import Run, run_logged
from jreg_megatron.errors import UserError
from jreg_megatron.output import write_json

_FINISHED = "finished.json"

Job = Callable[[], Coroutine[Any, Any, None]]


def train_all(runs: Sequence[Run], data: DemoData, width: int, quiet: bool) -> None:
    """Train what is not finished, ``width`` runs at a time.

    Raises:
        UserError: if a finished run had other settings, before anything is trained; if a run fails.
    """
    left = [run for run in runs if not _is_finished(run)]
    bar = tqdm(
        desc="training",
        total=len(runs),
        initial=len(runs) - len(left),
        disable=quiet,
        mininterval=_interval(),
        smoothing=0.02,
        bar_format="{desc}: {n:.1f} of {total} runs |{bar}| {elapsed}, {remaining} left",
    )

    def job(run: Run) -> Job:
        async def train() -> None:
            shutil.rmtree(run.folder, ignore_errors=True)
            done = 0

            def advance(iteration: int) -> None:
                nonlocal done
                bar.update((iteration - done) / run.iterations)
                done = iteration

            await run.train(data, advance)
            write_json(str(run.folder / _FINISHED), _settings(run))

        return train

    with bar:
        _all(map(job, left), width)


def evaluate_all(
    models: Sequence[tuple[Trained, Path]], words: Sequence[str], width: int, quiet: bool
) -> None:
    """Evaluate each model into its file, ``width`` at a time; ``words`` are further ones for ``evaluate``.

    Raises:
        UserError: if an evaluation fails.
    """
    left = [(model, file) for model, file in models if not file.exists()]
    bar = tqdm(
        desc="evaluating",
        total=len(models),
        initial=len(models) - len(left),
        disable=quiet,
        mininterval=_interval(),
        bar_format="{desc}: {n} of {total} models |{bar}| {elapsed}, {remaining} left",
    )

    def job(model: Trained, file: Path) -> Job:
        async def evaluate() -> None:
            command = [
                "-m",
                "jreg_megatron.evaluate",
                f"{model.name}={model.checkpoints}",
                "--lens",
                "--quiet",
            ]
            command += ["--json", str(file), *words]
            await run_logged(f"evaluating {model.name}", command, file.with_suffix(".log"), lambda line: None)
            bar.update()

        return evaluate

    with bar:
        _all((job(model, file) for model, file in left), width)


def _interval() -> float:
    """Seconds between two states of a bar; a log needs few."""
    return 0.1 if sys.stderr.isatty() else 60.0


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
    if json.loads(file.read_text(encoding="utf-8")) != _settings(run):
        raise UserError(
            f"--output: {run.folder} was trained with other settings ({file}); name another --output"
        )
    return True


def _all(jobs: Iterable[Job], width: int) -> None:
    """Do all jobs; the first that fails ends the others."""
    asyncio.run(_gather(jobs, width))


async def _gather(jobs: Iterable[Job], width: int) -> None:
    places = asyncio.Semaphore(width)

    async def placed(job: Job) -> None:
        async with places:
            await job()

    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(placed(job))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
