"""The output folder: its videos lie flat, as VBench wants them, and one `metadata.json` says how each was made.

`metadata.json` holds `{"videos": [record, ...]}`. A record has at least `file` (name in the folder), `settings`
(everything that the pixels depend on, but the prompt and the number of the sample) and `timeline`.
"""

import json
import os
from pathlib import Path
from typing import Any

from rfjax.errors import UserError
from rfjax.io.atomic import write_json
from rfjax.io.names import output_name, video_name

METADATA = "metadata.json"
TIMELINE = "memory_timeline.png"
"""Timeline of a folder that holds a single video; elsewhere every video has its own."""

Record = dict[str, Any]


def read_records(folder: Path) -> list[Record]:
    """Return the records of the videos in a folder, none if it has no `metadata.json`.

    Raises:
        UserError: the file cannot be read or was not written by rfjax.
    """
    path = folder / METADATA
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["videos"]
        if not all({"file", "settings", "timeline"} <= record.keys() for record in records):
            raise ValueError("a video's record lacks 'file', 'settings' or 'timeline'")
        return records
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by rfjax ({error}); choose another --output or move it away") from None


def add_record(folder: Path, record: Record) -> None:
    """Add a video's record to the folder's `metadata.json`, replacing the one of the same file.

    Raises:
        UserError: the file cannot be written.
    """
    others = [other for other in read_records(folder) if other["file"] != record["file"]]
    write_json(folder / METADATA, {"videos": [*others, record]})


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix videos of different settings in one folder.

    Raises:
        UserError: the folder holds a video of other settings; the message names the first that differs.
    """
    wanted = json.loads(json.dumps(settings))
    for record in read_records(folder):
        if record["settings"] == wanted or not (folder / record["file"]).exists():
            continue
        for name in (*wanted, *record["settings"]):
            there, here = record["settings"].get(name), wanted.get(name)
            if there != here:
                raise UserError(
                    f"{folder} holds videos made with {name} {_show(there)}, this run has {_show(here)}; "
                    "choose another --output, or --overwrite"
                )


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def timeline_name(folder: Path, prompt: str, sample: int, *, alone: bool) -> str:
    """Return the file name of a video's timeline.

    It is `memory_timeline.png` where a run makes this video alone and the folder has no such file of another video,
    and `<prompt>-<sample>.timeline.png` otherwise.
    """
    video = video_name(prompt, sample)
    taken = any(record["timeline"] == TIMELINE and record["file"] != video for record in read_records(folder))
    return TIMELINE if alone and not taken else output_name(prompt, sample, ".timeline.png")


def check_writable(folder: Path) -> None:
    """Check that files can be made in a folder which need not exist yet, without making it.

    Raises:
        UserError: something else is in its place, or permission lacks.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
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
