"""Run programs in parallel, each with its own log, and find why one failed."""

from __future__ import annotations

import asyncio
import codecs
import os
import re
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from jreg_megatron.runtime.errors import UserError
from jreg_megatron.runtime.fork import end_with_the_parent
from jreg_megatron.runtime.last_error import LastError

_LINE_END = re.compile(r"[\r\n]+")  # a progress bar ends its lines with \\r
_CHUNK = 1 << 16


def progress(what: str, unit: str, total: int, left: int, quiet: bool) -> Any:
    """A progress bar for slow items: only a few finish per minute. ``left`` of ``total`` are not done yet."""
    return tqdm(
        desc=what,
        total=total,
        initial=total - left,
        disable=quiet,
        mininterval=0.1 if sys.stderr.isatty() else 60.0,  # few lines in a log
        smoothing=0.02,
        bar_format="{desc}: {n} of {total} " + unit + " |{bar}| {elapsed}, {remaining} left",
    )


def each[T](items: Iterable[T], work: Callable[[T], Coroutine[Any, Any, None]], width: int) -> None:
    """Do the work for each item, ``width`` at a time. The first failure cancels the others and is raised."""

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


async def run_logged(what: str, arguments: list[str], log: Path, on_line: Callable[[str], None]) -> None:
    """Run this Python with ``arguments`` and one thread; see :func:`logged`.

    Raises:
        UserError: if it fails; it names ``what`` and the log.
    """
    # More threads than cores would slow each other down.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        status, why = await logged([sys.executable, *arguments], environment, file, on_line)
    if status != 0:
        raise UserError(f"{what} ended with status {status}: {why}; its log is {log}")


async def logged(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: TextIO,
    on_line: Callable[[str], None],
    on_start: Callable[[int], None] = lambda _: None,
) -> tuple[int, str]:
    """Run a program. Its output goes to ``log`` and ``on_line``, its process id to ``on_start``.

    The program is terminated when the caller is cancelled or dies.

    Returns:
        Its exit status, negative for a signal, and the line of its output with the reason of a failure.

    Raises:
        OSError: if the program cannot be started.
    """
    why = LastError()
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        preexec_fn=end_with_the_parent,
    )
    on_start(process.pid)
    assert process.stdout is not None
    try:
        decoder, last = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        while chunk := await process.stdout.read(_CHUNK):
            text = decoder.decode(chunk)
            log.write(text)
            log.flush()
            *lines, last = _LINE_END.split(last + text)
            for line in lines:
                why.read(line)
                on_line(line)
        why.read(last)
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    return status, str(why)
