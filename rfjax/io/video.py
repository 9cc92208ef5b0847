"""H.264 video in MP4, written as it is generated and read back."""

import contextlib
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8

from rfjax.errors import UserError
from rfjax.io.atomic import finish, temporary_name

# Readers that ignore a file's colour tags (decord, OpenCV) assume BT.601, so it is both written and tagged.
_MATRIX = Colorspace.ITU601
_SMPTE170M = 6
# x264's macroblock tree reads memory it never wrote: with it the same frames give other files from run to run.
_OPTIONS = {"crf": "18", "preset": "medium", "x264-params": "mbtree=0"}


class VideoWriter:
    """A streaming writer: the file is under its final name only after `close()`.

    Used as a context manager it closes at the end of the block, or removes what it wrote if the block raises.
    """

    def __init__(self, path: str | Path, height: int, width: int, fps: int = 16):
        """Open a hidden temporary file beside `path`; an existing `path` stays until `close()` replaces it.

        Args:
            path: final name.
            height: rows of a frame in pixels, even.
            width: columns of a frame in pixels, even.
            fps: frames a second.

        Raises:
            UserError: the folder cannot be written to, or this build of PyAV has no H.264.
        """
        self.path = Path(path)
        self.frames = 0
        """Frames written so far."""
        self._temporary = temporary_name(self.path)
        try:
            self._temporary.touch()
            self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"})
            self._stream = self._container.add_stream("libx264", rate=fps, options=_OPTIONS)
        except (OSError, FFmpegError, UnknownCodecError) as error:
            self._temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.path}: {getattr(error, 'strerror', None) or error}") from None
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _SMPTE170M
        context.color_range = int(ColorRange.MPEG)

    def write(self, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
        """Append RGB frames.

        Raises:
            UserError: the disk is full, or the file cannot be written for another reason.
        """
        with self._user_errors():
            for rgb in frames:
                picture = av.VideoFrame.from_ndarray(rgb, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=_MATRIX, dst_color_range=ColorRange.MPEG)
                self._container.mux(self._stream.encode(picture))
                self.frames += 1

    def close(self) -> None:
        """Flush, and give the file its final name.

        Raises:
            UserError: the file cannot be written.
        """
        with self._user_errors():
            self._container.mux(self._stream.encode())
            self._container.close()
            finish(self._temporary, self.path)

    def abort(self) -> None:
        """Remove what was written; does nothing after `close()`."""
        with contextlib.suppress(OSError, FFmpegError):
            self._container.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @contextlib.contextmanager
    def _user_errors(self):
        try:
            yield
        except (OSError, FFmpegError) as error:
            self.abort()
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None


def read_video(path: str | Path) -> UInt8[np.ndarray, "T H W 3"]:
    """Return all frames of a video as RGB.

    Raises:
        UserError: the file is missing, is no video, or holds no frame.
    """
    try:
        with av.open(str(path)) as container:
            frames = [
                picture.to_ndarray(format="rgb24", src_colorspace=_MATRIX) for picture in container.decode(video=0)
            ]
    except (OSError, IndexError, FFmpegError) as error:
        raise UserError(f"cannot read the video {path}: {getattr(error, 'strerror', None) or error}") from None
    if not frames:
        raise UserError(f"the video {path} holds no frame")
    return np.stack(frames)
