"""Ctrl-C and SIGTERM only where they can do no harm."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a cluster sends before it takes the machine back."""


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_AGAIN_SECONDS = 0.05


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


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` and SIGTERM `Terminated`, so that temporary files are removed.

    Where that would leave a module half imported, or Python lets nothing be raised (in JAX's callback of the garbage
    collector, say), the signal comes again a moment later.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        numbers = [number for number, kind in _RAISED.items() if kind is unraisable.exc_type]
        for number in numbers:
            _again(number)
        if not numbers:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        with _handling(_RAISED, _raise):
            yield
    finally:
        sys.unraisablehook = previous


def _raise(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _again(number)
            return
        frame = frame.f_back
    raise _RAISED[signal.Signals(number)]


def _again(number: int) -> None:
    """Send this process a signal in a moment, if it is still handled then."""

    def send() -> None:
        main = threading.main_thread().ident
        if main is not None and callable(signal.getsignal(number)):
            signal.pthread_kill(main, number)

    timer = threading.Timer(_AGAIN_SECONDS, send)
    timer.daemon = True
    timer.start()


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
