"""What lies at a path that a user gave."""

import os
import stat
from pathlib import Path
from typing import Literal

from rfjax.errors import UserError


def kind_of(path: Path, what: str) -> Literal["file", "folder", "missing"]:
    """Tell what lies at a path, following links; a link to nothing is missing, a pipe or device a file.

    Args:
        path: The path to look at.
        what: Its name in the message, such as `--output` or `the checkpoint folder`.

    Raises:
        UserError: the path cannot be looked at: too long, a loop of links, or below a folder without permission.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot look at {what} {path}: {reason}") from None
    return "folder" if stat.S_ISDIR(mode) else "file"


def list_folder(path: Path, what: str) -> list[Path]:
    """Return what a folder holds, sorted.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"cannot look into {what} {path}: {error.strerror or error}") from None


def existing_above(path: Path) -> Path:
    """Return the nearest of the folders above `path` that exists; it may turn out to be a file.

    Raises:
        UserError: one of them cannot be looked at.
    """
    return next(above for above in path.absolute().parents if kind_of(above, "the folder") != "missing")


def cache_folder() -> Path:
    """Return the folder of what can be had again: `$XDG_CACHE_HOME/rfjax`, or `~/.cache/rfjax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rfjax"


def is_address(place: str | Path) -> bool:
    """Tell an address, `scheme://...`, from a path."""
    return isinstance(place, str) and "://" in place
