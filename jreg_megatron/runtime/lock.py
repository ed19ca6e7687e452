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
    """Hold the lock file ``path`` while the block runs, then remove it.

    The lock is released when this process ends, even if it is killed. Child processes do not hold it.

    Args:
        path: a file in an existing folder.
        what: for the message, such as ``runs/x is being trained``.
        instead: what the user can do instead of waiting, such as ``choose another --output``.
        wait: wait for the other process instead of refusing.

    Raises:
        UserError: naming ``what`` and the process that holds the lock.
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
            break  # a file system without locks: run without the protection
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # the previous holder has removed the file in the meantime
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
