"""Train a sweep's runs one after the other on this node, or as a Slurm array with one task per run."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

from tqdm import tqdm

from jreg_megatron.demo.training import ITERATION
from jreg_megatron.recipe.announcement import seconds_as_text
from jreg_megatron.recipe.supervise import UNFINISHED
from jreg_megatron.runtime.errors import EXIT_CODE, UserError
from jreg_megatron.runtime.lock import lock
from jreg_megatron.runtime.programs import logged
from jreg_megatron.sweep.grid import Sweep, SweepRun, node_rank

_TASK = "SLURM_ARRAY_TASK_ID"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def train(sweep: Sweep, runs: Sequence[SweepRun]) -> list[int]:
    """Train those of these runs that are not finished. A run that fails does not stop the others.

    Signals of a scheduler or the keyboard are passed on to the running recipe, which saves and ends.

    Returns:
        The recipe's statuses. The last is 75 if a signal ended the queue, or a run saved and ended early. The
        only one is 2 if the recipe refuses the first run before any is finished.
    """
    left = [run for run in runs if not sweep.is_finished(run)]
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs are finished")
    return asyncio.run(_queue(sweep, left, is_new=len(left) == len(runs)))


async def _queue(sweep: Sweep, runs: Sequence[SweepRun], is_new: bool) -> list[int]:
    asked: list[int] = []
    recipe: int | None = None

    def receive(number: int) -> None:
        asked.append(number)
        pass_on(number)

    def pass_on(number: int) -> None:
        # The keyboard sends Ctrl-C to the recipe too.
        if recipe is not None and number != signal.SIGINT:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(recipe, number)

    def watch(process: int | None) -> None:
        nonlocal recipe
        recipe = process
        for number in asked:  # signals that came while it started
            pass_on(number)

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, receive, number)
    statuses: list[int] = []
    for place, run in enumerate(runs, start=1):
        await asyncio.sleep(0)  # a signal may be waiting
        if asked:
            return [*statuses, UNFINISHED]
        statuses.append(await _train(sweep, run, f"[{place}/{len(runs)}] {run.name}", asked, watch))
        if statuses[-1] == UNFINISHED or (is_new and statuses == [EXIT_CODE]):
            break
    return statuses


async def _train(
    sweep: Sweep, run: SweepRun, title: str, asked: Sequence[int], watch: Callable[[int | None], None]
) -> int:
    def read(line: str) -> None:
        if found := ITERATION.search(line):
            bar.total = int(found[2])
            bar.update(int(found[1]) - bar.n)

    folder, path = sweep.folder(run), sweep.log(run)
    folder.mkdir(parents=True, exist_ok=True)
    # The nodes of a job share the folder; another queue must not train in it.
    held = lock(folder / ".lock", f"{folder} is being trained", "name another --output")
    with nullcontext() if node_rank() else held:
        print(f"{title}: started; its log is {path}", flush=True)
        started = time.monotonic()
        with (
            path.open("a", encoding="utf-8") as log,
            tqdm(desc=title, unit="it", disable=None, leave=False, dynamic_ncols=True) as bar,
        ):
            try:
                status, why = await logged(sweep.command(run), sweep.environment(run), log, read, watch)
            except OSError as error:
                status, why = EXIT_CODE, f"{sweep.recipe} cannot be started: {error.strerror}"
            finally:
                watch(None)
        status = 128 - status if status < 0 else status
        took = f"after {seconds_as_text(time.monotonic() - started)}"
        if status == 0:
            if node_rank() == 0:
                sweep.finished_file(run).write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))
            took = f"finished {took}"
        # A scheduler's signal may have reached only the recipe, and ended it before it could save.
        elif asked or status in (UNFINISHED, 128 + signal.SIGTERM, 128 + signal.SIGUSR1):
            status, took = UNFINISHED, f"ended early {took}"
        else:
            took = f"failed {took} with status {status}: {why}; see {path}"
        print(f"{title}: {took}", flush=True)
    return status


def array(sweep: Sweep, options: str) -> list[str]:
    """``sbatch`` for the unfinished runs, with more ``options``, which override ours.

    The number of a task is the place of its run in ``sweep.json``.

    Raises:
        UserError: if the options have an open quote, or there is no ``slurm.sh`` in the recipe's folder.
    """
    script = sweep.recipe.parent / "slurm.sh"
    if not script.is_file():
        raise UserError(f"{script} is missing; copy it there from recipes/")
    try:
        more = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--slurm-options is {options}; it cannot be split into words: {error}") from None
    numbers = ",".join(str(number) for number, run in enumerate(sweep.runs) if not sweep.is_finished(run))
    return [
        *("sbatch", f"--array={numbers}", f"--job-name={sweep.output.name}"),
        *(f"--output={sweep.output}/slurm-%A_%a.log", *more, str(script)),
        *(os.environ.get("PYTHON") or sys.executable, "-m", "jreg_megatron.sweep"),
        *("--output", str(sweep.output), "--only"),
    ]


def submit(words: Sequence[str]) -> str:
    """Submit the array to Slurm; returns the output of sbatch.

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
    text = os.environ.get(_TASK, "")
    if not text.isdecimal():
        raise UserError(
            f"--only has no number, and {_TASK} is {text or 'not set'}; name a run, such as --only 3"
        )
    return int(text)
