"""Folders that VBench reads: videos and nothing else, since it takes the first file it finds for a video."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from rfjax.errors import UserError

VBENCH = "vbench"
"""Subfolder of a study that has a folder of videos for each variant."""


def link_videos(folder: Path, videos: Iterable[Path]) -> None:
    """Make a folder's `.mp4` files links to the given videos, or copies where the file system has no links.

    What VBench itself wrote there stays, but for the clips of a video that is another one now.

    Raises:
        UserError: the folder or a link cannot be made.
    """
    wanted = {video.name: video for video in videos}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.mp4"):
            if path.name not in wanted or not _same(path, wanted[path.name]):
                path.unlink()
                shutil.rmtree(folder / "split_clip" / path.stem, ignore_errors=True)
        for name, video in wanted.items():
            if not (folder / name).exists():
                _link(video, folder / name)
    except OSError as error:
        raise UserError(f"cannot link the videos in {folder}: {error.strerror}") from None


def _same(path: Path, video: Path) -> bool:
    there, given = path.stat(), video.stat()
    return os.path.samestat(there, given) or (there.st_size, there.st_mtime_ns) == (given.st_size, given.st_mtime_ns)


def _link(video: Path, path: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(video, path)
        return
    shutil.copy2(video, path)
