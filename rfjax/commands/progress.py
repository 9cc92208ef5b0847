"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


class ChunkProgress:
    """Counts chunks, frames a second and the time left over all batches of a run."""

    def __init__(self, console: Console, total_chunks: int = 0):
        self._console = console
        self._total = total_chunks
        self._done = 0
        self._frames = 0
        self._since: float | None = None
        self._last_line = 0.0
        self._label = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("chunks, {task.fields[rate]}, left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_chunks, rate="compiling")

    def expect(self, chunks: int) -> None:
        """Add chunks to those that are to come."""
        self._total += chunks
        self._bar.update(self._task, total=self._total)

    def label(self, text: str) -> None:
        """Say what is being made, from now on."""
        self._label = text
        self._bar.update(self._task, description=text)
        if self._since is None and not self._console.is_terminal:
            self._console.print(f"{text}: compiling")

    def advance(self, frames: int) -> None:
        """Count one chunk of so many video frames (over the whole batch)."""
        self._done += 1
        # The first chunk's time is mostly compilation: speed is measured from its end.
        if self._since is None:
            self._since = time.monotonic()
        else:
            self._frames += frames
        elapsed = time.monotonic() - self._since
        speed = self._frames / elapsed if self._frames and elapsed else 0.0
        rate = f"{speed:.1f} frames/s" if speed else "first chunk done"
        self._bar.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal:
            self._print_line(rate, elapsed)

    def _print_line(self, rate: str, elapsed: float) -> None:
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = elapsed / (self._done - 1) * (self._total - self._done) if self._done > 1 else None
        ending = "" if left is None else f", {left:.0f} s left"
        self._console.print(f"{self._label}: chunk {self._done} of {self._total}, {rate}{ending}", markup=False)

    def __enter__(self) -> "ChunkProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
