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
    """A context in which Ctrl-C raises `KeyboardInterrupt`, and SIGTERM `Terminated`, inside `allowed()` alone.

    Elsewhere they wait for the next such place. Otherwise they could strike between the making of a file and the
    statement that would remove it again.
    """

    def __init__(self):
        self._allowed = False
        self._pending: type[KeyboardInterrupt] | None = None
        self._handling = _handling(_RAISED, self._handle)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let both through, also one that came before."""
        self._allowed = True
        try:
            if self._pending is not None:
                raise self._pending
            yield
        finally:
            self._allowed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # It stays pending, for Python swallows what is raised while it finalises an object.
        raised = self._pending = _RAISED[signal.Signals(number)]
        if self._allowed:
            self._allowed = False  # what follows is cleaning up
            raise raised

    def __enter__(self) -> "Interruptions":
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handling.__exit__(None, None, None)
