"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jreg_megatron.errors import UserError


def check_place(output: Path, marks: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output folder that could not be written, or that would bury something else.

    Args:
        output: the folder to make.
        marks: files of which one shows that an earlier run of the same command made the folder.
        overwrite: whether such a folder may be replaced.

    Raises:
        UserError: naming the folder.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"OUTPUT is {output}, which is no folder; name a new one")
    if output.is_dir() and any(output.iterdir()):
        if not any((output / mark).is_file() for mark in marks):
            raise UserError(f"OUTPUT is {output}, which holds other files; name a new folder")
        if not overwrite:
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
    except OSError as error:
        if not error.strerror:  # no file system's, but a library's own
            raise
        raise UserError(
            f"OUTPUT {output} cannot be written ({error.strerror}); free the disk or name another"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
