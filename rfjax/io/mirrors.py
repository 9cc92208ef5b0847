"""An output folder at an address, such as `gs://bucket/videos`: work is done in a folder of this machine, and copied.

Whatever fsspec can write will do; buckets need its package for them (`gcsfs`, `s3fs`). Files go up in the order in
which they were written, and come down before the work begins. So what lies at the address is, whenever the machine goes
away, what the folder was a moment before.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from rfjax.errors import UserError
from rfjax.io.locks import open_locked
from rfjax.io.meanwhile import meanwhile
from rfjax.io.ownership import AddressOwner
from rfjax.io.remote import File, files_at, open_address, spoken_of
from rfjax.io.reports import WORKING, working_folder

PUSH_SECONDS = 5.0
TRIES, RETRY_SECONDS = 5, 10.0
"""Of the last copy."""
_OWNER, _LOCK = ".rfjax-owner-{}.json", ".rfjax-mirror.lock"


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where the files of a command go."""

    folder: Path
    """To work in."""
    name: str
    """What the user calls it."""
    sync: Callable[[], None] = lambda: None
    """Copy to the address what is new in the folder, and fetch what other processes report there."""


@contextlib.contextmanager
def destination(place: str | Path, process: int = 0, count: int = 1, *, writing: bool = True) -> Iterator[Destination]:
    """Yield a folder as it is, and for an address a folder whose files are copied there until the block ends.

    Of what lies at the address, the process's own state and all records are there from the start; other files are
    empty, which tells that they exist. Files without further use here are emptied after they were copied.

    Args:
        place: path or address.
        process: number of this process, of those that share the address.
        count: of those processes; the first looks whether there are others.
        writing: whether files are copied to the address; nobody else may then have it.

    Raises:
        UserError: another process has the address; or it cannot be read, or written at the end, and then the folder
            stays. In the errors of the block the folder goes by its address.
    """
    if isinstance(place, Path):
        yield Destination(place, str(place))
        return
    mirror = _Mirror(place.rstrip("/"), process, count)
    try:
        with mirror.copying() if writing else contextlib.nullcontext():
            mirror.pull()
            yield Destination(mirror.folder, mirror.address, mirror.sync)
    except _NotCopiedError:
        raise
    except UserError as error:
        raise UserError(str(error).replace(str(mirror.folder), mirror.address)) from None
    finally:
        mirror.close()


class _Stamp(NamedTuple):
    """What tells a file from one that had its name before."""

    time: int
    """Of its last change, in nanoseconds."""
    size: int


class _Written(NamedTuple):
    """A file that is to be copied."""

    stamp: _Stamp
    is_record: bool
    name: str
    content: bytes | Path
    """Of a record, which may be replaced while it waits for its turn; else a second name of the file, which may be
    removed meanwhile."""


class _Mirror:
    """The files of a folder, at an address."""

    def __init__(self, address: str, process: int, count: int = 1):
        with spoken_of(address, "use"):
            self._files, self._root = open_address(address)
        self.address = address
        self._name = f"rfjax-{hashlib.sha256(f'{address} {process}'.encode()).hexdigest()[:12]}-"
        self.folder = Path(tempfile.mkdtemp(prefix=self._name))
        self._lock = open_locked(self.folder / _LOCK, wait=False)
        self.copied = True
        """Whether the address has all of the folder."""
        self._own = f"{working_folder(Path(), process)}/"
        self._there: dict[str, _Stamp] = {}
        """Files that the address has, with the stamps of those here."""
        self._alone = threading.Lock()
        self._warned = ""
        self._owner = self._owner_by(_OWNER.format(process))
        self._first = process == 0
        self._together = {_OWNER.format(index) for index in range(count)}
        """Files of the owners that share the address."""

    def pull(self) -> None:
        """Fetch what lies at the address: the process's own state, and all records; other files stay empty."""
        with self._alone, spoken_of(self.address, "read"):
            for file in files_at(self._files, self._root):
                if _is_output(file.name):
                    self._fetch(file, whole=_is_record(file.name) or self._is_own(file.name))

    def sync(self) -> None:
        """Copy what is new, and fetch what other processes report."""
        self.push(everything=True)
        with self._alone, spoken_of(self.address, "read"):
            for file in files_at(self._files, self._root):
                if _is_working(file.name) and _is_record(file.name) and not self._is_own(file.name):
                    self._fetch(file, whole=True)

    def push(self, everything: bool = False) -> None:
        """Copy what is new in the folder, and remove at the address what processes had for themselves and have removed.

        Args:
            everything: also what was written a moment ago, for nobody writes any more.

        Raises:
            UserError: another process has taken the address, or it cannot be written.
        """
        self._owner.check()
        with self._alone, spoken_of(self.address, "write to"):
            # Nothing else: one who tidies up this machine must not take videos away.
            gone = [name for name in self._there if _is_working(name) and not (self.folder / name).exists()]
            with tempfile.TemporaryDirectory(prefix=".rfjax-", dir=self.folder) as names:
                written, complete = self._written(everything, Path(names))
                for file in written:
                    self._copy(file)
            if complete:  # what was removed may be named in an older record
                for name in gone:
                    with contextlib.suppress(FileNotFoundError):
                        self._files.rm_file(f"{self._root}/{name}")
                    self._there.pop(name, None)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Own the address and copy to it, until the block has ended and all is there.

        Raises:
            UserError: another process has it, or takes it; or it cannot be written.
        """
        with self._owner.owning(self._strangers() if self._first else ()):
            self._forget_the_dead()
            try:
                with meanwhile(self._push_or_warn, PUSH_SECONDS):
                    yield
            finally:
                try:
                    self._copy_the_rest()
                except KeyboardInterrupt as interruption:
                    left = f"; what {self.address} lacks is in {self._left()}"
                    raise type(interruption)(f"{interruption}{left}") from None

    def _push_or_warn(self) -> None:
        if self._owner.lost:  # which ends the work
            return
        try:
            self.push()
        except UserError as error:
            if str(error) != self._warned:
                print(f"rfjax: warning: {error}; it is tried again", file=sys.stderr, flush=True)
            self._warned = str(error)

    def _copy_the_rest(self) -> None:
        self.copied = False
        for tries_left in reversed(range(TRIES)):
            try:
                self.push(everything=True)
                self.copied = True
                return
            except UserError as error:
                if not tries_left or self._owner.lost:
                    raise _NotCopiedError(f"{error}; what it lacks is in {self._left()}") from None
                time.sleep(RETRY_SECONDS)

    def _left(self) -> Path:
        """Give the folder a name under which no later run removes it."""
        self.folder = self.folder.rename(self.folder.with_name(f"rfjax-left-{self.folder.name}"))
        return self.folder

    def close(self) -> None:
        """Remove the folder, unless the address lacks some of it."""
        if self.copied:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def _owner_by(self, name: str) -> AddressOwner:
        return AddressOwner(self._files, f"{self._root}/{name}", self.address)

    def _strangers(self) -> list[AddressOwner]:
        """Return the owners that the address has, or had, and that are not of this job."""
        with spoken_of(self.address, "read"):
            names = [file.name for file in files_at(self._files, self._root)]
        return [
            self._owner_by(name) for name in names if fnmatch(name, _OWNER.format("*")) and name not in self._together
        ]

    def _forget_the_dead(self) -> None:
        """Remove the folders of this machine in which earlier owners worked that were killed."""
        for folder in self.folder.parent.glob(f"{self._name}*"):
            with contextlib.suppress(OSError, UserError):  # among them, that it is locked
                lock = open_locked(folder / _LOCK, wait=False)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)

    def _fetch(self, file: File, whole: bool) -> None:
        target = self.folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if whole:
            self._files.get_file(file.path, str(target))
        else:
            target.touch()
        self._there[file.name] = _stamp(target)

    def _written(self, everything: bool, names: Path) -> tuple[list[_Written], bool]:
        """Return the files that the address lacks in the order in which they were written, and whether these are all.

        Those written since this call began are left out: what came before them may not have been seen. Files that are
        no records get their second names in the folder `names`.
        """
        marker = self.folder / ".rfjax-mirror.part"
        marker.touch()
        now, found, complete = marker.stat().st_mtime_ns, [], True
        paths = (Path(folder) / file for folder, _, files in os.walk(self.folder) for file in files)
        for number, path in enumerate(paths):
            name = path.relative_to(self.folder).as_posix()
            if not _is_output(name):
                continue
            try:
                stamp = _stamp(path)
                if self._there.get(name) == stamp:
                    continue
                content = path.read_bytes() if _is_record(name) else _linked(path, names / str(number))
                if not everything and (stamp.time >= now or stamp != _stamp(path)):
                    complete = False
                    continue
                found.append(_Written(stamp, _is_record(name), name, content))
            except FileNotFoundError:  # what has taken its place may not have been seen either
                complete = False
        return sorted(found), complete

    def _copy(self, file: _Written) -> None:
        there = f"{self._root}/{file.name}"
        if isinstance(file.content, bytes):
            self._files.pipe_file(there, file.content)
            self._there[file.name] = file.stamp
            return
        self._files.put_file(str(file.content), there)
        if not self._is_own(file.name):
            os.truncate(file.content, 0)
        self._there[file.name] = file.stamp if self._is_own(file.name) else _stamp(file.content)

    def _is_own(self, name: str) -> bool:
        """Whether a file is of what this process keeps, to go on with."""
        return name.startswith(self._own)


class _NotCopiedError(UserError):
    """Names the folder of this machine, which stays."""


def _is_output(name: str) -> bool:
    """Whether a file is more than a lock or half written."""
    return all(
        "orbax-checkpoint-tmp" not in part and (part == WORKING or not part.startswith(".")) for part in name.split("/")
    )


def _is_working(name: str) -> bool:
    """Whether a file is of what a process has for itself."""
    return name.startswith(f"{WORKING}/")


def _is_record(name: str) -> bool:
    """Whether a file is one of those that are written again and again, and name others."""
    return name.endswith(".json")


def _linked(path: Path, name: Path) -> Path:
    """Give a file a second name, and return that."""
    os.link(path, name)
    return name


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp(found.st_mtime_ns, found.st_size)
