"""Stand between a scheduler and the ranks of a node: hand on its signals, and say how the run ended.

``python -m jreg_megatron.recipe.supervise --iterations N --checkpoints FOLDER -- COMMAND...``; a recipe
becomes this process. SIGTERM (a preemption, ``scancel``, an evicted pod) and SIGUSR1 (Slurm's ``--signal``)
reach each rank as SIGTERM, on which Megatron finishes the iteration, saves and ends on all nodes. torchrun
itself would give the ranks thirty seconds and then kill them in the middle of their checkpoint.

The exit status is 0 when all iterations are done, 75 (``EX_TEMPFAIL``) when the run has saved and ended
before, so that a scheduler can start it again, and otherwise the command's own.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType

import psutil

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.runtime.errors import user_errors_exit
from jreg_megatron.runtime.fork import end_with_the_parent
from jreg_megatron.runtime.lock import lock

UNFINISHED = os.EX_TEMPFAIL
"""Exit status of a run that has saved and can go on: 75."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends to have a run save and end."""
_POLL_SECONDS = 0.5
_INTERRUPT_SECONDS = 5.0


def run(command: list[str], is_finished: Callable[[], bool]) -> int:
    """Run the command to its end; returns the exit status described above."""
    asked: list[signal.Signals] = []

    def remember(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    before = {number: signal.signal(number, remember) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        if asked:
            _say(f"{asked[0].name} before training began; the same command starts it")
            return UNFINISHED
        with subprocess.Popen(command, preexec_fn=_prepare) as process:  # noqa: PLW1509
            told: set[int] = set()
            interrupted = math.inf
            while True:
                try:
                    status = process.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if asked:
                        _tell_ranks(process.pid, told, asked[0])
                    if time.monotonic() > interrupted:
                        process.send_signal(signal.SIGINT)
                        interrupted = math.inf
                except KeyboardInterrupt:
                    # A terminal sends it to the ranks too; if nobody did, it is handed on.
                    interrupted = time.monotonic() + _INTERRUPT_SECONDS
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked and status == 128 + signal.SIGTERM:
        status = 0
    if status == 0 and not is_finished():
        why = f"on {asked[0].name}" if asked else "before its last iteration"
        _say(f"the run has saved and ended {why}; the same command goes on")
        return UNFINISHED
    return 128 - status if status < 0 else status


def _prepare() -> None:
    """In the command's process: end when this one is killed, and leave both signals to be handed on.

    A scheduler may send a signal to every process of a job; what is ignored here is ignored in the ranks,
    until Megatron has its handler of SIGTERM in place.
    """
    end_with_the_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _tell_ranks(launcher: int, told: set[int], asked: signal.Signals) -> None:
    """Send SIGTERM once to each rank that is ready for it."""
    try:
        ranks = psutil.Process(launcher).children()
    except psutil.NoSuchProcess:
        return
    for rank in ranks:
        if rank.pid not in told and _catches(rank.pid, signal.SIGTERM):
            if not told:
                _say(f"{asked.name}: the ranks finish their iteration, save and end")
            told.add(rank.pid)
            rank.send_signal(signal.SIGTERM)


def _catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for the signal (by Linux's list of those caught)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _say(what: str) -> None:
    print(f"jreg_megatron: {what}", flush=True)


def main() -> None:
    """Run the command named on the command line; exit with the status described above."""
    parser = argparse.ArgumentParser(prog="python -m jreg_megatron.recipe.supervise", description=__doc__)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--lock", type=Path, metavar="FOLDER", help="let no other run be trained in it")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()

    def is_finished() -> bool:
        return last_checkpoint(options.checkpoints) >= int(options.iterations)

    with user_errors_exit(), _alone(options.lock):
        sys.exit(run(options.command[1:], is_finished))


def _alone(folder: Path | None) -> AbstractContextManager[object]:
    """Keep a second start of the same command out: two runs in one folder would spoil its checkpoints."""
    if folder is None:
        return nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return lock(folder / "run.lock", f"{folder} is being trained", "set RUN to another folder")


if __name__ == "__main__":
    main()
