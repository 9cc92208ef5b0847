"""Files of entries that each describe a video: `{NAME: [{"file": ..., ...}]}`, an entry a line."""

import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from rfjax.errors import UserError
from rfjax.io.atomic import replacing

Entry = dict[str, Any]


def read_entries(path: Path, name: str, needed: Set[str]) -> dict[str, Entry]:
    """Return the entries by file name, none if there is no such file.

    Args:
        path: of the file.
        name: of the list in it.
        needed: what each entry must have.

    Raises:
        UserError: the file cannot be read or was not written by rfjax.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[name]
        if not all(needed <= entry.keys() for entry in entries):
            raise ValueError(f"an entry lacks {', '.join(sorted(needed))}")
        return {entry["file"]: entry for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by rfjax ({error}); choose another --output or move it away") from None


def write_entries(path: Path, name: str, entries: Iterable[Entry]) -> None:
    """Write the entries, whole or not at all; a line each: indented, thousands would take Python seconds.

    Raises:
        UserError: the file cannot be written.
        ValueError: an entry holds NaN or infinity, which JSON cannot.
    """
    lines = [json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"{name}": [\n' + ",\n".join(lines) + "\n]}\n")
