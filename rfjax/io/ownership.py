"""A folder, or an address, that one process alone may work in."""

import _thread
import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rfjax.errors import UserError
from rfjax.io.locks import open_locked
from rfjax.io.meanwhile import meanwhile
from rfjax.io.remote import spoken_of

_LOCK = ".rfjax.lock"
BEAT_SECONDS = 15.0
SILENCE_SECONDS = 60.0
"""An owner of an address that gives no sign for so long has ended."""
SETTLE_SECONDS = 1.0
"""After which, of two that came at the same time, one is seen to be the last."""


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
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Refuse a folder that another process keeps for itself.

    Raises:
        UserError: one does; the message names its host and number.
    """
    if (folder / _LOCK).exists():
        with owning(folder):
            pass


def _owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200] or "another process"
    except OSError:
        return "another process"


class AddressOwner:
    """The file at an address that says which process has it, with a sign of life that changes."""

    def __init__(self, files: Any, path: str, address: str):
        """Prepare.

        Args:
            files: the address's file system.
            path: of the file, as the file system calls it.
            address: what the user calls the place.
        """
        self._files, self._path, self._address = files, path, address
        self._mine = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
        self.lost = ""
        """Who has come instead."""

    @contextlib.contextmanager
    def owning(self, others: "Sequence[AddressOwner]" = ()) -> Iterator[None]:
        """Have the address until the block ends.

        Args:
            others: owners of the same address that must not be alive either; those that are not are forgotten.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        with spoken_of(self._address, "write to"):
            _wait_for_silence([self, *others])
            for other in others:
                other._forget()
            self._beat()
            time.sleep(SETTLE_SECONDS)
            self._look()
        self.check()
        try:
            with meanwhile(self._look_and_beat, BEAT_SECONDS):
                yield
        finally:
            if not self.lost:
                self._forget()

    def check(self) -> None:
        """Refuse to go on where another process has come instead.

        Raises:
            UserError: it has.
        """
        if self.lost:
            raise UserError(f"{self._address} is in use by {self.lost}; wait for its end, or choose another --output")

    def _look_and_beat(self) -> None:
        if self.lost:
            return
        with contextlib.suppress(Exception):  # a network that is down shows where files are copied
            self._look()
            if self.lost:
                _thread.interrupt_main()
            else:
                self._beat()

    def _forget(self) -> None:
        with contextlib.suppress(Exception):  # it will be taken for dead
            self._files.rm_file(self._path)

    def _look(self) -> None:
        found = self._read()
        if found.get("token") != self._mine["token"]:
            self.lost = _who(found)

    def _beat(self) -> None:
        self._files.pipe_file(self._path, json.dumps(self._mine | {"beat": secrets.token_hex(4)}).encode())

    def _read(self) -> dict[str, Any]:
        """Return what the file says, nothing if there is none."""
        self._files.invalidate_cache()
        try:
            return json.loads(self._files.cat_file(self._path))
        except (FileNotFoundError, ValueError):
            return {}


def _wait_for_silence(owners: Sequence[AddressOwner]) -> None:
    """Wait until none of these gives a sign of life.

    Raises:
        UserError: one does.
    """
    signs = {owner: sign for owner in owners if (sign := owner._read())}
    for owner, sign in signs.items():
        print(
            f"rfjax: {owner._address} has an owner, {_who(sign)}; waiting {SILENCE_SECONDS:g} s for a sign of it",
            file=sys.stderr,
            flush=True,
        )
    deadline = time.monotonic() + SILENCE_SECONDS
    while signs and time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE_SECONDS / 10))
        for owner, sign in list(signs.items()):
            now = owner._read()
            if not now:
                del signs[owner]
            elif now != sign:
                owner.lost = _who(now)
                owner.check()


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process')} on {owner.get('host')}" if owner else "another process"
