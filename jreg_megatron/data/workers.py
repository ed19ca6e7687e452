"""Worker processes, and the error when one of them dies."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.fork import end_with_the_parent

_INTERVAL = 0.2
"""Seconds between two reports of a worker."""

Work = Callable[[int, Callable[[Any], None]], Any]
"""``work(task, report)`` does a task and returns its result. It may call ``report(value)`` meanwhile."""


class WorkerKilled(Exception):
    """A worker ended without a message; ``status`` is its exit status, ``-9`` for signal 9."""

    def __init__(self, task: int, status: int) -> None:
        super().__init__(f"worker ended with status {status}")
        self.task, self.status = task, status


def run(tasks: Iterable[int], work: Work, workers: int) -> Generator[tuple[int, str, Any]]:
    """Do the tasks in forked processes.

    The processes end with this one, even if it is killed, and when the generator is closed.

    Yields:
        A task, and ``"done"`` with its result or ``"progress"`` with its report, as they come. Of several
        reports within 0.2 s only the first is passed on.

    Raises:
        UserError: as raised in a worker.
        WorkerKilled: if a worker ends before its task is done.
        RuntimeError: with the traceback, for any other exception in a worker.
    """
    waiting = deque(tasks)
    # Forked processes have the imported modules and the tokenizer at once.
    context = multiprocessing.get_context("fork")
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, int] = {}
    try:
        for _ in range(min(workers, len(waiting))):
            ours, theirs = context.Pipe()
            processes[ours] = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
            processes[ours].start()
            theirs.close()
            busy[ours] = waiting.popleft()
            ours.send(busy[ours])
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                task = busy[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, ConnectionError) as error:
                    processes[ready].join()
                    raise WorkerKilled(task, processes[ready].exitcode or 0) from error
                if kind == "refused":
                    raise UserError(value)
                if kind == "crashed":
                    raise RuntimeError(f"a worker failed on {task}:\n{value}")
                if kind == "done":
                    del busy[ready]
                    if waiting:
                        busy[ready] = waiting.popleft()
                        ready.send(busy[ready])
                yield task, kind, value
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _serve(connection: Connection, work: Work, parent: int) -> None:
    end_with_the_parent()
    if os.getppid() != parent:
        return  # the parent has ended already
    gc.freeze()  # a garbage collection would copy the parent's objects into every worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    due = time.monotonic() + _INTERVAL

    def report(value: Any) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _INTERVAL
            connection.send(("progress", value))

    while True:
        task = connection.recv()
        try:
            message = ("done", work(task, report))
        except UserError as error:
            message = ("refused", str(error))
        except Exception:
            message = ("crashed", traceback.format_exc())
        connection.send(message)
