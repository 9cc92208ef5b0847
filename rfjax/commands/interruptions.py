"""Ctrl-C and SIGTERM only where they can do no harm."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a cluster sends before it takes the machine back."""


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextlib.contextmanager
def _handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals in this way; outside the main thread, which alone receives them, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handling in previous.items():
            signal.signal(number, handling)


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def termination_raises() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM raise `Terminated`, as Ctrl-C raises `KeyboardInterrupt`, so that temporary files are removed."""
    return _handling([signal.SIGTERM], _raise_terminated)


class Interruptions:
    """A context in which Ctrl-C and SIGTERM are noted; only `check()` raises `KeyboardInterrupt` or `Terminated`.

    Elsewhere they could strike between the making of a file and the statement that would remove it again, or inside a
    callback that Python lets raise nothing. No time is lost: while the device works, Python would not see them anyway.
    """

    def __init__(self):
        self.noted: type[KeyboardInterrupt] | None = None
        """What has come: what `check()` would raise."""
        self._handling = _handling(_RAISED, self._note)

    def check(self) -> None:
        """Raise what has come."""
        if self.noted is not None:
            raise self.noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = _RAISED[signal.Signals(number)]

    def __enter__(self) -> "Interruptions":
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handling.__exit__(None, None, None)
