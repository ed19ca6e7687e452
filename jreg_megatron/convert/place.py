"""What export and import share: the command, and an output folder that is made whole or not at all."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.output import STDOUT, check_outputs, write_json

Report = dict[str, Any]


def run(
    options: Namespace,
    own: tuple[str, ...],
    work: Callable[[Namespace], Report],
    show: Callable[[Report], None],
) -> None:
    """Check the outputs, do the work, and write or print its report; ``own`` is as in :func:`check_place`.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    with user_errors_exit("nothing was written"):
        check_outputs(json=options.json)
        check_place(options.output, own, options.overwrite)
        report = work(options)
        if options.json:
            write_json(options.json, report)
        if not options.quiet and options.json != STDOUT:
            show(report)


def check_place(output: Path, own: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, or that holds other things.

    ``own`` are patterns of the file names that the same command writes. With ``overwrite``, a folder that
    holds only such files may be replaced.

    Raises:
        UserError: naming the folder.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"OUTPUT is {output}, which is not a folder; name a new one")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in own)]
    if others:
        raise UserError(
            f"OUTPUT is {output}, which holds {others[0]}, a file that this command does not write; name a "
            "new folder"
        )
    if held and not overwrite:
        raise UserError(
            f"OUTPUT is {output}, which holds a model already; name a new folder, or give --overwrite to "
            "replace it"
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"OUTPUT is {output}, but {parent} cannot be written to; name another folder")


@contextmanager
def made_beside(output: Path) -> Iterator[Path]:
    """A new folder beside ``output``. It is moved there at the end of the block, or removed on an error."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}-{os.getpid()}.part")
    old = output.with_name(f".{output.name}-{os.getpid()}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if output.exists():
            output.rename(old)
        part.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        # Some libraries report a full disk in their own words.
        said = getattr(error, "strerror", None) or (
            "No space left" in str(error) and "No space left on device"
        )
        if not said or isinstance(error, UserError):
            raise
        raise UserError(
            f"OUTPUT {output} cannot be written ({said}); free the disk or name another"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
