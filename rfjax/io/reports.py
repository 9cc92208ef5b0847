"""What processes that share an output folder say of their videos: a folder each, merged by the first.

OUTPUT/.rfjax/process-K/ has what is process K's: its lock, `metadata.json` and `jobs.json` (the first's are in OUTPUT),
and what it keeps of unfinished videos.
"""

import shutil
from pathlib import Path

from rfjax.io import manifest, outputs
from rfjax.io.ownership import check_free

WORKING = ".rfjax"
"""Folder of what processes have for themselves."""


def working_folder(output: Path, index: int) -> Path:
    """Return where a process has what is its own alone."""
    return output / WORKING / f"process-{index}"


def report_folder(output: Path, index: int) -> Path:
    """Return where a process keeps its records: the first in the output folder itself."""
    return working_folder(output, index) if index else output


def all_records(output: Path) -> dict[str, outputs.Record]:
    """Return the records of the videos in a folder, also those that a process which died left unmerged.

    Raises:
        UserError: a file cannot be read or was not written by rfjax.
    """
    reports = [outputs.read_records(folder) for folder in _folders(output)]
    records = outputs.read_records(output)  # after the others, which may be merged into it at this moment
    for report in reports:
        records |= report
    return records


def merge(output: Path) -> None:
    """Add what all processes report to the folder's own files, and remove their reports.

    For the process that owns the folder, when no other works in it.

    Raises:
        UserError: a report cannot be read, or the folder's files cannot be written.
    """
    folders = _folders(output)
    reports = {folder: outputs.read_records(folder) for folder in folders}
    if any(reports.values()):
        with outputs.updating(output) as records:
            for report in reports.values():
                records.update(report)
    entries = [entry for folder in folders for entry in manifest.read_jobs(folder).values()]
    if entries:
        manifest.Manifest(output, entries).stop()
    for folder in folders:
        _forget(folder)


def forget_report(output: Path, index: int) -> None:
    """Remove what a process other than the first has reported in an earlier run, which is merged by now."""
    _forget(working_folder(output, index))


def check_alone(output: Path, count: int) -> None:
    """Refuse a folder in which processes still work that are not among the first `count`.

    Raises:
        UserError: one does; the message names its host and number.
    """
    taking_part = {working_folder(output, index) for index in range(count)}
    for folder in _folders(output):
        if folder not in taking_part:
            check_free(folder)


def remove_working_folders(output: Path) -> None:
    """Remove what processes had for themselves, when nothing is unfinished."""
    shutil.rmtree(output / WORKING, ignore_errors=True)


def _forget(folder: Path) -> None:
    for name in (outputs.METADATA, manifest.JOBS):
        (folder / name).unlink(missing_ok=True)


def _folders(output: Path) -> list[Path]:
    return sorted(output.glob(f"{WORKING}/process-*"))
