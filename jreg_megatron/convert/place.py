"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from jreg_megatron.runtime.errors import UserError


def check_place(output: Path, own: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output folder that could not be written, or that would bury something else.

    Args:
        output: the folder to make.
        own: patterns of the names that an earlier run of the same command leaves in it.
        overwrite: whether a folder that holds such names alone may be replaced.

    Raises:
        UserError: naming the folder.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"OUTPUT is {output}, which is no folder; name a new one")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in own)]
    if others:
        raise UserError(
            f"OUTPUT is {output}, which holds {others[0]}, and that is no file of a model from this command; "
            "name a new folder"
        )
    if held and not overwrite:
        raise UserError(
            f"OUTPUT is {output}, which holds a model already, and two models' files must not mix; "
            "name a new folder, or give --overwrite to replace it"
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"OUTPUT is {output}, but {parent} cannot be written to; name another folder")


@contextmanager
def made_beside(output: Path) -> Iterator[Path]:
    """A new folder to fill beside ``output``, moved there at the end of the block; removed if it fails."""
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
        # Some libraries tell of a full disk in words of their own.
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
