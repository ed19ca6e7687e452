"""A user's mistake gives one line on every node and exit status 2, without a traceback or a hang."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EXIT_CODE = 2
"""Exit status after a user's mistake, as in argparse."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""

LINE_START = "jreg_megatron: error: "
"""The start of every error line."""

_REFUSALS = (AssertionError, ImportError, NotImplementedError, OSError, ValueError)
_IN_MEGATRON = re.compile(r"/megatron/(core|training)/(?!dist_checkpointing|datasets|checkpointing)[^:]*$")

_MOST_SECONDS_TO_WAIT = 30.0  # the first rank may import from a busy file system, and end slowly


class UserError(ValueError):
    """A user's mistake. Its one line names the setting, the value and the fix, as in
    ``--jreg-coeff is -0.1; it must be a finite number >= 0``.
    """


class DeviceFault(UserError):
    """The device failed. This process can no longer use it, not even for collectives."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """An exception's text without line breaks, cut to ``most`` characters. Its type if it has no text."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def print_error(message: str) -> None:
    """Print an error line on standard error."""
    print(f"{LINE_START}{message}", file=sys.stderr, flush=True)


@contextmanager
def megatrons_refusals(
    has_begun: Callable[[], bool] = lambda: False, is_building: bool = False
) -> Iterator[None]:
    """Turn Megatron's refusal of its arguments into a :class:`UserError`.

    Args:
        has_begun: whether training has begun. Then an exception is a fault and keeps its traceback.
        is_building: the model is being built. Then an exception from outside Megatron, or from reading
            files, is a fault too.

    Raises:
        UserError: with Megatron's message, or with the code of an assertion that has no message.
    """
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        is_refusal = isinstance(error, _REFUSALS)
        if is_building:
            is_refusal &= bool(_IN_MEGATRON.search(place.filename)) and not isinstance(error, OSError)
        is_refusal |= isinstance(error, ImportError) or isinstance(error.__cause__, ImportError)
        if isinstance(error, UserError) or not is_refusal or has_begun():
            raise
        said = " ".join(str(error).split()) or place.line
        raise UserError(f"Megatron refuses the arguments: {said}") from error


@contextmanager
def quiet_interrupt() -> Iterator[None]:
    """On Ctrl-C end with status 130 and print nothing, because another process prints the message."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@contextmanager
def user_errors_exit(interrupted: str | None = None) -> Iterator[None]:
    """Turn a :class:`UserError` into one line on standard error and exit status 2.

    With ``interrupted``, Ctrl-C prints this text and ends with status 130.

    Usually every rank finds the same mistake at about the same time. The first rank of each node prints it
    at once. The others wait until the launcher ends them, so the line appears once per node. After half a
    minute they print it too, because the first rank may not have found the mistake.

    Raises:
        SystemExit: with status 2, in place of a :class:`UserError`, or 130 for Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) != 0:
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Megatron's --exit-signal-handler ignores it
            with quiet_interrupt():
                time.sleep(_MOST_SECONDS_TO_WAIT)
        print_error(str(error))
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print(f"\nInterrupted; {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)
