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
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        _lock(descriptor, folder)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise UserError(f"{folder} is in use by {owner}; wait for its end, or choose another --output") from None
    except OSError:
        pass  # some network file systems have no locks
