"""A folder that one process alone may work in."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rfjax.errors import UserError

_LOCK = ".rfjax.lock"


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Keep an existing folder for this process; its end, of whatever kind, frees the folder.

    Raises:
        UserError: another process has the folder; the message names its host and number.
    """
    path = folder / _LOCK
    descriptor = _own(path)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _own(path: Path) -> int:
    """Open the lock file and lock it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        try:
            _lock(descriptor, path.parent)
        except UserError:
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last owner has removed the file, and another process may have made a new one


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise UserError(f"{folder} is in use by {owner}; wait for its end, or choose another --output") from None
    except OSError:
        pass  # some network file systems have no locks
