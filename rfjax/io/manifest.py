"""`jobs.json` of an output folder: how far every video is that was asked for there.

`{"jobs": [{"file", "prompt", "sample", "chunks", "state", ...}]}`. States: `pending`; `running`, at the chunk that
`chunk` counts from 1 (0 before the first); `done`; `failed`, with a `reason`. A run that was killed leaves `running`
behind until the next one.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rfjax.io.entries import Entry, read_entries, write_entries

JOBS = "jobs.json"
_SECONDS_BETWEEN_CHUNKS = 1.0


def read_jobs(folder: Path) -> dict[str, Entry]:
    """Return the entries of a folder by file name, none if it has no `jobs.json`.

    Raises:
        UserError: the file cannot be read or was not written by rfjax.
    """
    return read_entries(folder / JOBS, "jobs", {"file", "prompt", "sample", "chunks", "state"})


class Manifest:
    """The file's entries, written whole at every change of a state and now and then for a chunk."""

    def __init__(self, folder: Path, asked: Iterable[Entry]):
        """Read what is there, add what is asked for and write it.

        Args:
            folder: the output folder.
            asked: entries with their states, which replace those of the same files.

        Raises:
            UserError: the file is not rfjax's, or cannot be written.
        """
        self._path = folder / JOBS
        self._entries = {file: _stopped(entry) for file, entry in read_jobs(folder).items()}
        self._entries |= {entry["file"]: entry for entry in asked}
        self._written = 0.0
        self._write()

    def running(self, file: str, chunk: int) -> None:
        """Note that so many chunks of a video are finished."""
        begins = self._entries[file]["state"] != "running"
        self._set(file, state="running", chunk=chunk)
        if begins or time.monotonic() - self._written > _SECONDS_BETWEEN_CHUNKS:
            self._write()

    def pending(self, file: str) -> None:
        """Note that a video waits (again)."""
        self._set(file, state="pending")
        self._write()

    def done(self, file: str) -> None:
        """Note that a video is complete."""
        self._set(file, state="done")
        self._write()

    def failed(self, file: str, reason: str) -> None:
        """Note that a video could not be made."""
        self._set(file, state="failed", reason=reason)
        self._write()

    def stop(self) -> None:
        """Note at the end of a run that nothing is running."""
        self._entries = {file: _stopped(entry) for file, entry in self._entries.items()}
        self._write()

    def _set(self, file: str, **state: Any) -> None:
        kept = {name: value for name, value in self._entries[file].items() if name not in ("chunk", "reason")}
        self._entries[file] = {**kept, **state}

    def _write(self) -> None:
        write_entries(self._path, "jobs", self._entries.values())
        self._written = time.monotonic()


def _stopped(entry: Entry) -> Entry:
    if entry["state"] != "running":
        return entry
    return {name: value for name, value in {**entry, "state": "pending"}.items() if name != "chunk"}
