"""The output folder: its videos lie flat, as VBench wants them, and one `metadata.json` says how each was made.

`metadata.json` holds `{"videos": [record, ...]}`. A record has at least `file` (name in the folder), `settings`
(everything that the pixels depend on, but the prompt and the number of the sample) and `timeline`.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rfjax.errors import UserError
from rfjax.io.entries import Entry, read_entries, write_entries
from rfjax.io.locks import open_locked
from rfjax.io.names import output_name, video_name
from rfjax.io.paths import existing_above, kind_of

METADATA = "metadata.json"
TIMELINE = "memory_timeline.png"
"""Timeline of a folder's first video; those of the others are named as they are."""

_LOCK = ".metadata.lock"
_LENGTH = "latent_frames"
_STALE_SECONDS = 24 * 3600
"""Age of a temporary file that no living process writes any more."""

Record = Entry


def read_records(folder: Path) -> dict[str, Record]:
    """Return the records of the videos in a folder by file name, none if it has no `metadata.json`.

    Raises:
        UserError: the file cannot be read or was not written by rfjax.
    """
    return read_entries(folder / METADATA, "videos", {"file", "settings", "timeline"})


@contextlib.contextmanager
def updating(folder: Path) -> Iterator[dict[str, Record]]:
    """Yield the folder's records, to be changed and written when the block ends; other processes wait until then.

    Raises:
        UserError: they cannot be read or written.
    """
    with _locked(folder):
        records = read_records(folder)
        yield records
        write_entries(folder / METADATA, "videos", records.values())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock file of a folder, which is removed afterwards."""
    path = folder / _LOCK
    descriptor = open_locked(path, wait=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_settings(
    folder: Path, records: Mapping[str, Record], settings: dict[str, Any], lengths: Mapping[str, int]
) -> None:
    """Refuse to mix videos of different settings in one folder; their lengths may differ.

    Args:
        folder: with the videos.
        records: of the videos.
        settings: of the run.
        lengths: latent frames of the videos that are asked for, by file name.

    Raises:
        UserError: the folder holds a video of other settings, or one that is asked for in another length; the message
            names the first setting that differs.
    """
    wanted = json.loads(json.dumps(settings))
    for file, record in records.items():
        own = wanted | {
            name: lengths.get(file, frames) for name, frames in record["settings"].items() if name == _LENGTH
        }
        if record["settings"] == own or kind_of(folder / file, "the video") == "missing":
            continue
        for name in (*own, *record["settings"]):
            there, here = record["settings"].get(name), own.get(name)
            if there != here:
                raise UserError(
                    f"{folder} holds {differing(name, there, here)}; choose another --output, or --overwrite"
                )


def differing(name: str, there: Any, here: Any) -> str:
    """Say which setting of a folder's videos differs from that of a run."""
    return f"videos made with {name} {_show(there)}, this run has {_show(here)}"


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def timeline_name(records: Mapping[str, Record], prompt: str, sample: int, first: bool = True) -> str:
    """Return the file name of a video's timeline.

    It is `memory_timeline.png`, and `<prompt>-<sample>.timeline.png` where another video of the folder has that one or
    this process is not the `first`.
    """
    video = video_name(prompt, sample)
    taken = not first or any(record["timeline"] == TIMELINE and file != video for file, record in records.items())
    return output_name(prompt, sample, ".timeline.png") if taken else TIMELINE


def check_writable(folder: Path) -> None:
    """Check that files can be made in a folder which need not exist yet, without making it.

    Raises:
        UserError: something else is in its place, or permission lacks.
    """
    existing = existing_above(folder) if kind_of(folder, "the output folder") == "missing" else folder
    if kind_of(existing, "the output folder") != "folder":
        raise UserError(f"the output folder {folder} cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"the output folder {folder} cannot be written: no permission to write in {existing}")


def make_folder(folder: Path) -> None:
    """Make the folder and those above it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be made: {error.strerror}") from None


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of runs that were killed; another run may be writing those younger than a day."""
    for path in folder.glob(".rfjax-*.part"):
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
