"""A run's numbers and sample videos: a line on the console, and TensorBoard.

FOLDER/tensorboard/    scalars, and the videos as moving pictures
FOLDER/samples/        00000500-NAME.mp4
"""

import contextlib
import io
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console

from rfjax.errors import UserError
from rfjax.io.video import VideoWriter

_SHOWN_SIDE = 320
"""Pixels of a moving picture's longer side, at most, in TensorBoard; the MP4 has all."""


class Metrics:
    """Where a run's numbers go, used as a context manager. Of several processes the first writes, the others do not.

    A disk that is full costs numbers and videos, but does not end the training: it is said in a line.
    """

    def __init__(self, folder: Path, console: Console, total_steps: int):
        """Make the folders of the run.

        Args:
            folder: Of the run.
            console: For a line at every `log`.
            total_steps: Number of the last step.

        Raises:
            UserError: tensorboardX is missing, or the folders cannot be made.
        """
        self._console = console
        self._total = total_steps
        self._samples = folder / "samples"
        self._writes = jax.process_index() == 0
        self._clock: tuple[int, float] | None = None
        self._board = _Board(folder / "tensorboard")
        if not self._writes:
            return
        try:
            self._samples.mkdir(parents=True, exist_ok=True)
            self._board.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {error.filename}: {error.strerror or error}") from None

    def begin(self, step: int) -> None:
        """Go on after this step: what an earlier process wrote about later ones is not shown any more."""
        self._board.newest = step

    def log(self, step: int, numbers: Mapping[str, float], examples_per_second: float | None) -> None:
        """Show and keep the numbers of a step.

        Args:
            step: Its number; the first is 1.
            numbers: By name, such as `generator/loss`.
            examples_per_second: Of all devices; None where nothing can be said of it.
        """
        if not self._writes:
            return
        self._console.print(self._line(step, numbers, examples_per_second), markup=False)
        scalars = dict(numbers)
        if examples_per_second is not None:
            scalars["examples_per_second"] = examples_per_second
        self._keep(step, [{"tag": name, "simple_value": value} for name, value in scalars.items()])

    def video(self, step: int, name: str, frames: UInt8[np.ndarray, "T H W 3"], fps: int) -> None:
        """Keep a sample video as MP4 and show it in TensorBoard.

        Args:
            step: The step that it shows.
            name: Tells it from the step's other videos.
            frames: RGB; height and width even.
            fps: Frames a second.
        """
        if not self._writes:
            return
        try:
            with VideoWriter(self._samples / f"{step:08d}-{name}.mp4", *frames.shape[1:3], fps=fps) as writer:
                writer.write(frames)
        except UserError as error:
            self._console.print(f"warning: {error}; training goes on", markup=False)
        self._keep(step, [{"tag": f"samples/{name}", "image": _moving_picture(frames, fps)}])

    def _keep(self, step: int, values: list[dict[str, Any]]) -> None:
        failure = self._board.add(step, values)
        if failure:
            self._console.print(f"warning: {failure}; training goes on", markup=False)

    def _line(self, step: int, numbers: Mapping[str, float], examples_per_second: float | None) -> str:
        players: dict[str, list[str]] = {}
        for name, value in numbers.items():
            player, _, quantity = name.rpartition("/")
            players.setdefault(player, []).append(f"{quantity} {value:<9.4g}")
        named = len(players) > 1
        groups = [
            f"{name}: {' '.join(shown)}" if named and name else " ".join(shown) for name, shown in players.items()
        ]
        speed = "" if examples_per_second is None else f"{examples_per_second:.3g} examples/s"
        counted = f"step {step:{len(str(self._total))}d} of {self._total}"
        return " | ".join([counted, *groups, *filter(None, [speed, self._left(step)])])

    def _left(self, step: int) -> str:
        """The time left at the speed since the first log, before which the programs were compiled."""
        now = time.monotonic()
        since, began = self._clock = self._clock or (step, now)
        if step == since or step >= self._total:
            return ""
        return f"{duration((now - began) / (step - since) * (self._total - step))} left"

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._board.close()


class _Board:
    """TensorBoard's event files.

    Written at once: tensorboardX's own writer does so in a thread, and waits forever for it once the disk was full.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import RecordWriter
        except ImportError:
            raise UserError("training needs tensorboardX, which is not installed: pip install 'rfjax[train]'") from None
        self.folder = folder
        self.newest = 0
        """The last step that was written about."""
        self._open = RecordWriter
        self._proto: Any = event_pb2
        self._writer: Any = None
        self._failing = False

    def add(self, step: int, values: list[dict[str, Any]]) -> str | None:
        """Write values of `summary.proto`; return a line about what is wrong where that begins to fail."""
        try:
            if self._writer is None:
                # TensorBoard reads files in the order of their names.
                self._writer = self._open(str(self.folder / f"events.out.tfevents.{time.time_ns()}"))
                self._write(0, file_version="brain.Event:2")
                # It forgets what older files say from this step on.
                self._write(self.newest + 1, session_log={"status": "START"})
            self._write(step, summary={"value": values})
            self._writer.flush()
        except OSError as error:
            self.close()
            told, self._failing = self._failing, True
            return None if told else f"cannot write to {self.folder}: {error.strerror or error}"
        self.newest, self._failing = step, False
        return None

    def _write(self, step: int, **content: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file, if one is open; the next `add` begins another."""
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()


def duration(seconds: float) -> str:
    """Return a time in its two largest units, such as `3 h 05 min`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def _moving_picture(frames: UInt8[np.ndarray, "T H W 3"], fps: int) -> dict[str, Any]:
    """Return every second frame as the animated GIF that TensorBoard takes for an image."""
    thin = -(-max(frames.shape[1:3]) // _SHOWN_SIDE)
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames[::2, ::thin, ::thin]]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=2000 // fps, loop=0)
    width, height = pictures[0].size
    return {"height": height, "width": width, "colorspace": 3, "encoded_image_string": file.getvalue()}
