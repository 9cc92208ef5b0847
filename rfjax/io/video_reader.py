"""Video files, read a frame at a time."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import Colorspace
from jaxtyping import UInt8

from rfjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """The frames of a video file; each iteration reads it from the start, one frame in memory at a time."""

    path: Path
    """The file."""
    fps: float
    """Frames a second."""
    announced: int
    """Frames that the file says it holds, 0 where it does not say."""

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yield the frames as RGB, upright: phones film lying down and note how to turn what they filmed.

        Raises:
            UserError: the file is damaged, holds no frame, or fewer than it says.
        """
        count = 0
        try:
            with _opened(self.path) as container:
                for picture in container.decode(video=0):
                    # BT.601 whatever the file is tagged with, as `rfjax.io.video` writes and VBench reads.
                    frame = picture.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU601)
                    yield np.rot90(frame, round(picture.rotation / 90))
                    count += 1
        except (OSError, FFmpegError) as error:
            raise _unreadable(self.path, error) from None
        if count == 0:
            raise UserError(f"the video {self.path} holds no frame")
        if count < self.announced:
            raise UserError(f"the video {self.path} is damaged: {count} of its {self.announced} frames can be read")


def read_frames(path: str | Path) -> VideoFrames:
    """Return a video file's frames, to be iterated, and what its header says.

    Raises:
        UserError: the file is missing, is no video, or does not say how many frames a second it has.
    """
    try:
        with _opened(path) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            if not stream.codec_context:
                raise UserError(f"the video {path} is in a format that this build of PyAV cannot decode")
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise UserError(f"the video {path} does not say how many frames a second it has")
            return VideoFrames(Path(path), float(rate), stream.frames)
    except (OSError, FFmpegError) as error:
        raise _unreadable(path, error) from None


def _opened(path: str | Path) -> InputContainer:
    # Titles need not be UTF-8. From PyAV 19 on that is no error, nor is there an argument to say so.
    lenient: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
    return av.open(str(path), **lenient)


def _unreadable(path: str | Path, error: OSError | FFmpegError) -> UserError:
    return UserError(f"cannot read the video {path}: {error.strerror or error}")
