"""Ctrl-C only where it can do no harm."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType


class Interruptions:
    """A context in which Ctrl-C raises `KeyboardInterrupt` inside `allowed()` alone.

    Elsewhere it waits for the next such place. Otherwise it could strike between the making of a file and the
    statement that would remove it again.
    """

    def __init__(self):
        self._allowed = False
        self._pending = False

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let Ctrl-C through, also one that came before."""
        self._allowed = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._allowed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False  # what follows is cleaning up
            raise KeyboardInterrupt
        self._pending = True

    def __enter__(self) -> "Interruptions":
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)
