"""One run at a time on one output."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from jreg_megatron.errors import UserError


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold the file ``path`` while the block runs; it is made before and removed after.

    The lock is this process's alone, so that it ends with it, however it ends, and workers do not keep it.

    Raises:
        UserError: naming ``what`` and the process, if another one holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{what} is being made by {holder}; wait for it, or choose another --output"
            ) from error
        except OSError:
            break  # a file system without locks: then it is up to the user
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # the holder before has removed it in between
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
