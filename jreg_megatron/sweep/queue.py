"""Train a sweep's runs one after the other on this node; each takes all of its GPUs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from tqdm import tqdm

from jreg_megatron.demo.training import ITERATION, logged
from jreg_megatron.recipe.plan import seconds_as_text
from jreg_megatron.recipe.supervise import UNFINISHED
from jreg_megatron.runtime.errors import EXIT_CODE
from jreg_megatron.runtime.lock import lock
from jreg_megatron.sweep.grid import Sweep, SweepRun, node_rank

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def train_all(sweep: Sweep) -> int:
    """Train the unfinished runs; a run that fails does not stop the others.

    Returns:
        0 if all runs are finished, 1 if some have failed, 75 if a signal ended the queue or a run saved and
        ended early, 2 if the recipe refuses the very first run.
    """
    failed = 0
    runs = sweep.unfinished
    if len(runs) < len(sweep.runs):
        print(f"{len(sweep.runs) - len(runs)} of {len(sweep.runs)} runs are finished; training the others")
    with _Signals() as signals:
        for number, run in enumerate(runs, start=1):
            status = _train(sweep, run, signals, f"[{number}/{len(runs)}] {run.name}")
            if status == UNFINISHED:
                print("The sweep has stopped. To resume, start the same command again")
                return UNFINISHED
            if status == EXIT_CODE and number == 1 and len(runs) == len(sweep.runs):
                print("The recipe refuses the first run, so no other run was started")
                return EXIT_CODE
            failed += status != 0
    if failed:
        print(f"{failed} of {len(sweep.runs)} runs failed. To try them again, start the same command again")
    return 1 if failed else 0


def train_one(sweep: Sweep, run: SweepRun) -> int:
    """Train one run, for a task of an array; returns the recipe's status, or 0 if the run was finished."""
    if sweep.is_finished(run):
        print(f"{run.name} is finished: nothing to do")
        return 0
    with _Signals() as signals:
        return _train(sweep, run, signals, run.name)


@dataclass
class _Signals:
    """Forwards the signals of a scheduler or the keyboard to the running recipe, which saves and ends."""

    asked: list[int] = field(default_factory=list)
    recipe: int | None = None
    """Its process."""
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Signals:
        self.before = {number: signal.signal(number, self._hand_on) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, _: FrameType | None) -> None:
        self.asked.append(number)
        self._tell(number)

    def _tell(self, number: int) -> None:
        # Ctrl-C has reached the recipe already.
        if self.recipe is not None and number != signal.SIGINT:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.recipe, number)

    def watch(self, recipe: int) -> None:
        """Forward signals to a process; those that came while it started too."""
        self.recipe = recipe
        for number in self.asked:
            self._tell(number)


def _train(sweep: Sweep, run: SweepRun, signals: _Signals, title: str) -> int:
    if signals.asked:
        return UNFINISHED
    sweep.folder(run).mkdir(parents=True, exist_ok=True)
    log, folder = sweep.log(run), sweep.folder(run)
    # The nodes of a job share the folder; another queue must not train in it.
    held = lock(folder / ".lock", f"{folder} is being trained", "name another --output")
    with nullcontext() if node_rank() else held:
        print(f"{title}: started; its log is {log}", flush=True)
        started = time.monotonic()
        status, why = _run_recipe(sweep, run, signals, title)
        took = seconds_as_text(time.monotonic() - started)
        if status == 0:
            if node_rank() == 0:
                sweep.finished_file(run).write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))
            print(f"{title}: finished after {took}", flush=True)
        # A scheduler's signal that reached the recipe alone may have ended it before it could save.
        elif signals.asked or status in (UNFINISHED, 128 + signal.SIGTERM, 128 + signal.SIGUSR1):
            print(f"{title}: ended early after {took}", flush=True)
            return UNFINISHED
        else:
            print(f"{title}: failed after {took} with status {status}: {why}; see {log}", flush=True)
    return status


def _run_recipe(sweep: Sweep, run: SweepRun, signals: _Signals, title: str) -> tuple[int, str]:
    """The recipe's exit status, and the line in its output that says why it failed."""

    def read(line: str) -> None:
        if found := ITERATION.search(line):
            bar.total = int(found[2])
            bar.update(int(found[1]) - bar.n)

    command, environment = sweep.command(run), sweep.environment(run)
    with (
        sweep.log(run).open("a", encoding="utf-8") as log,
        tqdm(desc=title, unit="it", disable=None, leave=False, dynamic_ncols=True) as bar,
    ):
        try:
            status, why = asyncio.run(logged(command, environment, log, read, signals.watch))
        except OSError as error:
            return EXIT_CODE, f"{sweep.recipe} cannot be started: {error.strerror}"
        finally:
            signals.recipe = None
    return (128 - status if status < 0 else status), why
