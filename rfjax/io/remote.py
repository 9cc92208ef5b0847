"""Files and folders that are given by an address, such as `gs://bucket/checkpoint`: they are copied once, and kept.

Whatever fsspec can read will do; buckets need its package for them (`gcsfs`, `s3fs`).
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from rfjax.errors import UserError
from rfjax.io.atomic import temporary_name
from rfjax.io.paths import cache_folder, is_address


def local(place: str | Path) -> Path:
    """Return a path as it is, and for an address that of a local copy, which is made where there is none.

    A copy belongs to the names, sizes and times of what lies there: if these change, it is copied anew.

    Raises:
        UserError: nothing lies there, it cannot be read, or the copy cannot be written.
    """
    if not is_address(place):
        return Path(place)
    address = str(place).rstrip("/")
    with spoken_of(address, "read"):
        files, root = open_address(address)
        found = files_at(files, root)
        if not found:
            raise UserError(f"nothing lies at {address}")
        version = hashlib.sha256(json.dumps([address, *map(dataclasses.astuple, found)]).encode()).hexdigest()[:16]
        copy = cache_folder() / "copies" / version / address.rpartition("/")[2]
        if not _whole(copy, found):
            _copy(address, files, found, copy)
        return copy


@contextlib.contextmanager
def spoken_of(address: str, verb: str) -> Iterator[None]:
    """Turn each file system's own exceptions into one.

    Args:
        address: what the block works with.
        verb: what it does there, such as "read".

    Raises:
        UserError: the block failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        lacks = verb == "write to" and isinstance(error, FileNotFoundError)
        hint = "; is there such a bucket?" if lacks else ""
        raise UserError(f"cannot {verb} {address}: {reason}{hint}") from None


@dataclasses.dataclass(frozen=True)
class File:
    """A file at an address."""

    name: str
    """Its path below the address; empty where the address is the file's own."""
    path: str
    """As its file system calls it."""
    size: int
    version: tuple[str, ...]
    """What tells it from one that lay there before."""


_VERSIONS = "ETag", "etag", "generation", "md5Hash", "mtime", "created", "LastModified"


def open_address(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and what it calls the place."""
    return fsspec.core.url_to_fs(address)


def files_at(files: Any, root: str) -> list[File]:
    """Return what lies there, by name.

    Raises:
        UserError: a name that leads out of the place.
    """
    files.invalidate_cache()
    try:
        entries: Any = files.find(root, detail=True)
    except FileNotFoundError:
        return []
    found = [
        File(
            path[len(root) :].strip("/"),
            path,
            entry["size"],
            tuple(str(entry[key]) for key in _VERSIONS if key in entry),
        )
        for path, entry in sorted(entries.items())
    ]
    for file in found:
        if ".." in file.name.split("/"):
            raise UserError(f"cannot copy {root}: it holds {file.name!r}, which is outside of it")
    return found


def _whole(copy: Path, found: list[File]) -> bool:
    """Whether all files are there in their sizes; a machine that lost power may have left shorter ones."""
    places = [(copy / file.name if file.name else copy, file.size) for file in found]
    return all(place.is_file() and place.stat().st_size == size for place, size in places)


def _copy(address: str, files: Any, found: list[File], copy: Path) -> None:
    size = sum(file.size for file in found)
    print(f"copying {address} ({size / 1e9:.2g} GB) to {copy}", file=sys.stderr, flush=True)
    version = copy.parent
    try:
        version.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(version.parent).free < size:
            raise UserError(f"cannot copy {address}: {version.parent} has less than {size / 1e9:.2g} GB free")
        temporary = temporary_name(version)
        try:
            for file in found:
                target = temporary / copy.name / file.name if file.name else temporary / copy.name
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(file.path, str(target))
            if not _whole(copy, found):  # another process may have been faster
                shutil.rmtree(version, ignore_errors=True)
                temporary.replace(version)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot copy {address} to {copy}: {error.strerror or error}") from None
