"""Lock files: held by one process at a time, and freed by its end, of whatever kind."""

import contextlib
import fcntl
import os
from pathlib import Path

from rfjax.errors import UserError


def open_locked(path: Path, *, wait: bool) -> int:
    """Open a lock file, making it if need be, and lock it.

    Args:
        path: of the file; its holder removes it before closing the descriptor.
        wait: whether to wait for another process that has it.

    Returns:
        The file's descriptor.

    Raises:
        UserError: the file cannot be written.
        BlockingIOError: another process has it, and there is no waiting.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        try:
            _lock(descriptor, wait)
        except BlockingIOError:
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last holder has removed the file, and a third process may hold a new one


def _lock(descriptor: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # some network file systems have no locks
