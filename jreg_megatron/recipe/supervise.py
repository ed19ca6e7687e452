"""The supervisor between a scheduler and the ranks of a node: it forwards signals and sets the exit status.

``python -m jreg_megatron.recipe.supervise --iterations N --checkpoints FOLDER -- COMMAND...``. A recipe
becomes this process. SIGTERM (a preemption, ``scancel``, an evicted pod) and SIGUSR1 (Slurm's ``--signal``)
reach each rank as SIGTERM. Megatron then finishes the iteration, saves and ends on all nodes. torchrun alone
would kill the ranks after thirty seconds, in the middle of their checkpoint.

The exit status is 0 when all iterations are done. It is 75 (``EX_TEMPFAIL``) when the run saved and ended
earlier, so that a scheduler can start it again. Otherwise it is the command's own status.
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
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import psutil

from jreg_megatron.decoder.checkpoint.folder import last_checkpoint
from jreg_megatron.runtime.errors import user_errors_exit
from jreg_megatron.runtime.fork import end_with_the_parent
from jreg_megatron.runtime.lock import lock

UNFINISHED = os.EX_TEMPFAIL
"""Exit status of a run that has saved and can be resumed: 75."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals with which a scheduler ends a run. The run saves first."""
_POLL_SECONDS = 0.5
_INTERRUPT_SECONDS = 5.0


def run(command: list[str], is_finished: Callable[[], bool]) -> int:
    """Run the command to its end; returns the exit status described above."""
    asked: list[signal.Signals] = []

    def remember(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    for number in SIGNALS:
        signal.signal(number, remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
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
                # A terminal sends SIGINT to the ranks too. If they still run later, they did not receive it.
                interrupted = time.monotonic() + _INTERRUPT_SECONDS
    if asked and status == 128 + signal.SIGTERM:
        status = 0
    if status == 0 and not is_finished():
        why = f"on {asked[0].name}" if asked else "before its last iteration"
        _say(f"the run has saved and ended {why}; the same command resumes it")
        return UNFINISHED
    return 128 - status if status < 0 else status


def _prepare() -> None:
    """In the command's process: die when the supervisor is killed, and ignore both signals.

    A scheduler may send a signal to every process of a job. The ranks inherit that they ignore the signals,
    until Megatron sets its handler for SIGTERM.
    """
    end_with_the_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _tell_ranks(launcher: int, told: set[int], asked: signal.Signals) -> None:
    """Send SIGTERM once to each rank that handles it."""
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
    """Whether a process has a handler for the signal, by SigCgt of Linux's ``/proc/PID/status``."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def _say(what: str) -> None:
    print(f"jreg_megatron: {what}", flush=True)


def main() -> None:
    """Run the command after ``--``; exit with the status described above."""
    parser = argparse.ArgumentParser(prog="python -m jreg_megatron.recipe.supervise", description=__doc__)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--lock", type=Path, metavar="FOLDER", help="keep other runs out of it")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()

    def is_finished() -> bool:
        return last_checkpoint(options.checkpoints) >= int(options.iterations)

    with user_errors_exit(), ExitStack() as held:
        if folder := options.lock:
            # Two runs in one folder would corrupt its checkpoints.
            folder.mkdir(parents=True, exist_ok=True)
            what, instead = f"{folder} is being trained", "set RUN to another folder"
            held.enter_context(lock(folder / "run.lock", what, instead))
        sys.exit(run(options.command[1:], is_finished))


if __name__ == "__main__":
    main()
