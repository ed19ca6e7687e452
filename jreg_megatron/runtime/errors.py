"""How a user's mistake ends: one clear line on every node, exit code 2, no traceback, no hang."""

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
"""Process exit status for a user's mistake, as argparse uses it."""

INTERRUPTED = 130
"""Process exit status after Ctrl-C, as a shell has it."""

LINE_START = "jreg_megatron: error: "
"""What the line of an error begins with."""

_REFUSALS = (AssertionError, ImportError, NotImplementedError, OSError, ValueError)
_IN_MEGATRON = re.compile(r"/megatron/(core|training)/(?!dist_checkpointing|datasets|checkpointing)[^:]*$")

_MOST_SECONDS_TO_WAIT = 30.0  # for a first rank that imports from a busy file system, and goes down slowly


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line that names the setting, the value found and the fix, for example
    ``--jreg-coeff is -0.1; it must be a finite number >= 0``.
    """


class DeviceFault(UserError):
    """The device fails: this process can do no more on it, collectives neither."""


def print_error(message: str) -> None:
    """Print the one line of an error."""
    print(f"{LINE_START}{message}", file=sys.stderr, flush=True)


@contextmanager
def megatrons_refusals(
    has_begun: Callable[[], bool] = lambda: False, is_building: bool = False
) -> Iterator[None]:
    """Turn an exception by which Megatron refuses what it was asked for into a :class:`UserError`.

    Args:
        has_begun: whether the model is built, so that an exception is a fault and keeps its traceback.
        is_building: the model is being built: an exception is a fault too if it comes from reading files,
            or from somewhere else than Megatron's own code.

    Raises:
        UserError: with Megatron's words, or the line of an assertion that has none.
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
    """End on Ctrl-C with status 130 and no word, where another process says what there is to say."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _wait_to_be_ended() -> None:
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Megatron's --exit-signal-handler would outlast it
    with quiet_interrupt():
        time.sleep(_MOST_SECONDS_TO_WAIT)


@contextmanager
def user_errors_exit(interrupted: str | None = None) -> Iterator[None]:
    """Turn a :class:`UserError` into one line on standard error and exit status 2.

    With ``interrupted``, Ctrl-C ends with these words and status 130.

    Every rank of a job usually finds the same mistake at about the same time. The first rank of each node
    speaks at once; the others wait for the launcher to end them, so that the line appears once a node. A
    mistake that the first rank does not find is printed too, after half a minute.

    Raises:
        SystemExit: with status 2, in place of a :class:`UserError`, or 130 for Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) != 0:
            _wait_to_be_ended()
        print_error(str(error))
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        print(f"\nInterrupted; {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)
