"""A folder that one process alone may work in."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from rfjax.errors import UserError
from rfjax.io.locks import open_locked

_LOCK = ".rfjax.lock"


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Keep an existing folder for this process; its end, of whatever kind, frees the folder.

    Raises:
        UserError: another process has the folder; the message names its host and number.
    """
    path = folder / _LOCK
    try:
        descriptor = open_locked(path, wait=False)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by {_owner(path)}; wait for its end, or choose another --output") from None
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200] or "another process"
    except OSError:
        return "another process"
