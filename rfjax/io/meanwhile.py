"""Something that is done again and again beside other work."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def meanwhile(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call something every so often, in a thread, until the block has ended and the last call is done."""
    ended = threading.Event()

    def keep_calling() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=keep_calling, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
