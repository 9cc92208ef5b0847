"""What is done beside other work, in a thread."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


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


class Aside(Generic[Item]):
    """Pieces of work that are done one after the other beside other work; somebody asks now and then what is done."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)
        self._begun: collections.deque[tuple[Item, Future[None]]] = collections.deque()

    def begin(self, item: Item, work: Callable[[], None]) -> None:
        """Do something for an item, after all that was begun before."""
        self._begun.append((item, self._thread.submit(work)))

    def ended(self, wait: bool = False) -> Iterator[Item]:
        """Yield the items for which it is done, in order and each once; with `wait`, all of them.

        Raises:
            Exception: that of an item's work.
        """
        while self._begun and (wait or self._begun[0][1].done()):
            item, future = self._begun.popleft()
            future.result()
            yield item

    def close(self) -> None:
        """Wait for the piece that is being done; begin none of the others."""
        self._thread.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        """How many items have not been yielded."""
        return len(self._begun)
