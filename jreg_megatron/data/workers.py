"""Processes that do pieces of work, and what happens when one of them dies."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from jreg_megatron.runtime.errors import UserError

_PATIENCE = 1.0
"""Seconds after which a worker looks whether its parent is still there."""


class WorkerKilled(Exception):
    """A worker ended without a word; ``status`` is its exit status, ``-9`` for signal 9."""

    def __init__(self, task: Any, status: int | None) -> None:
        super().__init__(f"worker ended with status {status}")
        self.task, self.status = task, status


@dataclass(frozen=True)
class Event:
    """Something that a worker said of its task: how far it is, or that it is done."""

    task: Any
    done: bool
    value: Any


Work = Callable[[Any, Callable[[Any], None]], Any]
"""``work(task, report)`` does a task, may call ``report(value)`` meanwhile, and returns its result."""


def run(tasks: Iterable[Any], work: Work, workers: int) -> Iterator[Event]:
    """Do the tasks in forked processes and yield what they say, in the order in which they say it.

    The processes end with this one, even if it is killed, and when the iterator is closed.

    Raises:
        UserError: as raised in a worker.
        WorkerKilled: if a worker ended before its task did.
        RuntimeError: with the traceback, for any other exception in a worker.
    """
    waiting = deque(tasks)
    # Forked, so that what was imported and loaded is there at once.
    context = multiprocessing.get_context("fork")
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(waiting))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_serve, args=(theirs, work, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            processes[ours] = process
            busy[ours] = waiting.popleft()
            ours.send(busy[ours])
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                kind, value = _hear(ready, processes[ready], busy[ready])
                task = busy[ready]
                if kind == "done":
                    del busy[ready]
                    if waiting:
                        busy[ready] = waiting.popleft()
                        ready.send(busy[ready])
                yield Event(task, kind == "done", value)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _hear(connection: Connection, process: BaseProcess, task: Any) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise WorkerKilled(task, process.exitcode) from error
    if kind == "refused":
        raise UserError(value)
    if kind == "crashed":
        raise RuntimeError(f"a worker failed on {task}:\n{value}")
    return str(kind), value


def _serve(connection: Connection, work: Work, parent: int) -> None:
    gc.freeze()  # what was loaded before stays; looking through it would copy it into every worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def report(value: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)
        connection.send(("progress", value))

    while True:
        while not connection.poll(_PATIENCE):
            if os.getppid() != parent:
                os._exit(1)
        try:
            task = connection.recv()
        except EOFError:
            os._exit(1)
        try:
            message = ("done", work(task, report))
        except UserError as error:
            message = ("refused", str(error))
        except Exception:
            message = ("crashed", traceback.format_exc())
        try:
            connection.send(message)
        except ConnectionError:
            os._exit(1)
