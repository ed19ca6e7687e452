"""One process at a time on one output."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from jreg_megatron.runtime.errors import UserError


@contextlib.contextmanager
def lock(path: Path, what: str, instead: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the file ``path`` while the block runs; it is made before and removed after.

    The lock is this process's alone: it ends with it, however it ends, and its children do not keep it.

    Args:
        path: the lock's file, in a folder that is there.
        what: what must not be done twice, for the message: ``runs/x is being trained``.
        instead: what the user can do but wait: ``choose another --output``.
        wait: wait for the other process rather than refuse.

    Raises:
        UserError: naming ``what`` and the process, if another one holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(f"{what} by {holder}; wait for its end, or {instead}") from error
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
