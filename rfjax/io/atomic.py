"""Files that appear under their final name only when they are complete."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rfjax.errors import UserError


def temporary_name(path: Path) -> Path:
    """Return a hidden, unused name in the folder of `path`, short enough for any file system."""
    return path.absolute().parent / f".rfjax-{secrets.token_hex(6)}.part"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name to write to; it becomes `path` if the block succeeds and vanishes if not.

    What was written is on the disk before it has the name, lest a machine that loses power leave an empty file.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        finish(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone, or its folder never was one
            temporary.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; lists of numbers stay on one line.

    Raises:
        UserError: the file cannot be written.
        ValueError: `value` holds NaN or infinity, which JSON cannot.
    """
    text = _layout(value, "") + "\n"
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


def finish(temporary: Path, path: Path) -> None:
    """Give a file its final name, in a way that survives a loss of power at any moment."""
    _to_disk(temporary)
    temporary.replace(path)
    with contextlib.suppress(OSError):  # not every file system can do it for a folder
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _layout(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {_layout(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) and item for item in value):
        return "[\n" + ",\n".join(inner + _layout(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
