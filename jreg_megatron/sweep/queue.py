"""Train a sweep's runs one after the other on this node; each takes all of its GPUs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """Train what is not finished; a run that fails does not stop the others.

    Returns:
        0 if all runs are finished now, 1 if some have failed, 75 if a signal ended the queue or a run has
        saved and ended early, and 2 if the recipe refuses the first run, as it would all others.
    """
    failed = 0
    runs = sweep.unfinished
    if len(runs) < len(sweep.runs):
        print(
            f"{len(sweep.runs) - len(runs)} of {len(sweep.runs)} runs are finished; going on with the others"
        )
    with _Signals() as signals:
        for number, run in enumerate(runs, start=1):
            status = _train(sweep, run, signals, f"[{number}/{len(runs)}] {run.name}")
            if status == UNFINISHED:
                print("The sweep has stopped; the same command goes on")
                return UNFINISHED
            if status == EXIT_CODE and number == 1 and len(runs) == len(sweep.runs):
                print("The recipe refuses what all runs have in common, so none of the others was started")
                return EXIT_CODE
            failed += status != 0
    if failed:
        print(f"{failed} of {len(sweep.runs)} runs failed; the same command tries them again")
    return 1 if failed else 0


def train_one(sweep: Sweep, run: SweepRun) -> int:
    """Train one run, as a task of an array does; returns the recipe's status, 0 if it is finished already."""
    if sweep.is_finished(run):
        print(f"{run.name} is finished; nothing to do")
        return 0
    with _Signals() as signals:
        return _train(sweep, run, signals, run.name)


@dataclass
class _Signals:
    """What a scheduler or the keyboard asks for reaches the recipe that runs, which saves and ends."""

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
        """Hand signals on to a process, also those that came while it was being made."""
        self.recipe = recipe
        for number in self.asked:
            self._tell(number)


def _train(sweep: Sweep, run: SweepRun, signals: _Signals, title: str) -> int:
    if signals.asked:
        return UNFINISHED
    sweep.folder(run).mkdir(parents=True, exist_ok=True)
    log = sweep.log(run)
    with _alone(sweep, run):
        print(f"{title}: started; it prints to {log}", flush=True)
        started = time.monotonic()
        status, why = _run_recipe(sweep, run, signals, title)
        took = seconds_as_text(time.monotonic() - started)
        if status == 0:
            if node_rank() == 0:
                sweep.finished_file(run).write_text(time.strftime("%Y-%m-%dT%H:%M:%S%z\n"))
            print(f"{title}: finished after {took}", flush=True)
        elif status == UNFINISHED or signals.asked or _ended_by_a_scheduler(status):
            print(f"{title}: ended early after {took}", flush=True)
            return UNFINISHED
        else:
            print(f"{title}: failed after {took} with status {status}: {why}; see {log}", flush=True)
    return status


def _run_recipe(sweep: Sweep, run: SweepRun, signals: _Signals, title: str) -> tuple[int, str]:
    """The recipe's exit status, and what it printed that says why it failed."""

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


def _ended_by_a_scheduler(status: int) -> bool:
    """Whether a signal of theirs ended the recipe before it could save, which reached it alone."""
    return status in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)


@contextmanager
def _alone(sweep: Sweep, run: SweepRun) -> Iterator[None]:
    """Hold a run's folder, so that two queues do not train it at once; the nodes of a job share it.

    Raises:
        UserError: if another process holds it.
    """
    if node_rank():
        yield
        return
    folder = sweep.folder(run)
    with lock(folder / ".lock", f"{folder} is being trained", "name another --output"):
        yield
