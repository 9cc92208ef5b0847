"""Output folders at an address, here in fsspec's memory; `test_cli_buckets.py` has servers of buckets."""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax.errors import UserError
from rfjax.io import mirrors, ownership
from rfjax.io.mirrors import destination

ADDRESS = "memory://bucket/out"
ROOT = "/bucket/out/"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for module, name, seconds in (
        (mirrors, "PUSH", 0.05),
        (mirrors, "RETRY", 0.01),
        (ownership, "BEAT", 0.05),
        (ownership, "SILENCE", 0.5),
        (ownership, "SETTLE", 0.01),
    ):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)


@pytest.fixture
def files():
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def there(files) -> dict[str, bytes]:
    """What lies at the address, without the owner's file."""
    return {
        name.removeprefix(ROOT): file.getvalue()
        for name, file in list(files.store.items())
        if name.startswith(ROOT) and "owner" not in name
    }


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refused(work: Callable[[Path], None], message: str) -> str:
    """Work in the address's folder; the error must be such. Return it."""
    with pytest.raises(UserError, match=message) as caught, destination(ADDRESS) as place:
        work(place.folder)
    return str(caught.value)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_path_is_its_own_folder(tmp_path):
    with destination(tmp_path) as place:
        assert (place.folder, place.name) == (tmp_path, str(tmp_path))
        place.sync()


def test_files_are_copied_while_work_goes_on_and_when_it_ends(files):
    with destination(f"{ADDRESS}/") as place:
        assert place.name == ADDRESS
        write(place.folder / "a.mp4", b"video")
        write(place.folder / ".rfjax-1.part", b"half")
        write(place.folder / ".rfjax/process-0/state/7.orbax-checkpoint-tmp-1/d/x", b"half")
        write(place.folder / ".rfjax/process-0/state/6/d/x", b"state")
        wait_until(lambda: there(files) == {"a.mp4": b"video", ".rfjax/process-0/state/6/d/x": b"state"})
        wait_until(lambda: (place.folder / "a.mp4").stat().st_size == 0)  # it is of no more use here
        assert (place.folder / ".rfjax/process-0/state/6/d/x").read_bytes() == b"state"
        (place.folder / ".rfjax/process-0/state/6/d/x").unlink()
        wait_until(lambda: there(files) == {"a.mp4": b"video"})
        (place.folder / "a.mp4").unlink()
        time.sleep(0.2)
        assert "a.mp4" in there(files)  # whoever tidies up this machine takes no video away
        write(place.folder / "a.mp4", b"another")
        write(place.folder / "metadata.json", b"{}")
    assert there(files) == {"a.mp4": b"another", "metadata.json": b"{}"}
    assert not place.folder.exists()
    assert not any("owner" in name for name in files.store)


def test_work_begins_with_what_lies_there(files):
    process = ".rfjax/process-{}/{}"
    for name in ("a.mp4", "metadata.json", process.format(1, "state/x"), process.format(2, "state/x")):
        files.pipe(ROOT + name, name.encode())
    files.pipe(ROOT + process.format(2, "jobs.json"), b"{}")
    before = there(files)
    with destination(ADDRESS, process=1) as place:
        assert (place.folder / "a.mp4").read_bytes() == b""
        assert (place.folder / "metadata.json").read_bytes() == b"metadata.json"
        assert (place.folder / process.format(1, "state/x")).read_bytes() == process.format(1, "state/x").encode()
        assert (place.folder / process.format(2, "state/x")).read_bytes() == b""
        files.pipe(ROOT + process.format(2, "jobs.json"), b"{1}")
        place.sync()
        assert (place.folder / process.format(2, "jobs.json")).read_bytes() == b"{1}"
    assert there(files) == before | {process.format(2, "jobs.json"): b"{1}"}


def test_looking_writes_nothing(files):
    files.pipe(ROOT + "a.mp4", b"video")
    with destination(ADDRESS, writing=False) as place:
        assert [path.name for path in place.folder.glob("[!.]*")] == ["a.mp4"]
        write(place.folder / "b.mp4", b"video")
    assert there(files) == {"a.mp4": b"video"}
    assert not place.folder.exists()


def test_a_second_process_is_refused_while_the_first_lives(files):
    with (
        destination(ADDRESS),
        pytest.raises(UserError, match=r"out is in use by process \d+ on .*; wait for its end"),
        destination(ADDRESS),
    ):
        pass
    with destination(ADDRESS, process=0), destination(ADDRESS, process=1):
        pass


def test_an_owner_that_died_gives_way(files, capsys):
    files.pipe(ROOT + ".rfjax-owner-0.json", b'{"host": "h", "process": 7, "token": "t"}')
    with destination(ADDRESS):
        pass
    assert "memory://bucket/out has an owner, process 7 on h; waiting 0.5 s for a sign" in capsys.readouterr().err


def test_of_two_at_the_same_time_the_last_stays(files, monkeypatch):
    def other_comes(seconds):
        files.pipe(ROOT + ".rfjax-owner-0.json", b'{"host": "h", "process": 7, "token": "t"}')

    monkeypatch.setattr(ownership.time, "sleep", other_comes)
    with pytest.raises(UserError, match="in use by process 7 on h"), destination(ADDRESS):
        pass
    assert json.loads(files.cat(ROOT + ".rfjax-owner-0.json"))["process"] == 7


@contextlib.contextmanager
def interruptions(handler):
    """Handle SIGINT so; shells start what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_owner_that_is_replaced_stops_and_says_where_its_files_are(files):
    def other_comes():
        for _ in range(200):
            files.pipe(ROOT + ".rfjax-owner-0.json", b'{"host": "h", "process": 7, "token": "t"}')
            time.sleep(0.1)

    def work(folder):
        with pytest.raises(KeyboardInterrupt):  # at any moment after the owner's file is there
            other_comes()
        write(folder / "b.mp4", b"video")

    with interruptions(signal.default_int_handler):
        said = refused(work, r"in use by process 7 on h; .*; what it lacks is in /.*")
    assert (Path(said.rpartition(" ")[2]) / "b.mp4").read_bytes() == b"video"
    assert "b.mp4" not in there(files)
    assert json.loads(files.cat(ROOT + ".rfjax-owner-0.json"))["process"] == 7


def test_an_owner_that_is_replaced_copies_nothing_more_where_interruptions_are_ignored(files):
    copied = []

    def work(place):
        for _ in range(20):
            files.pipe(ROOT + ".rfjax-owner-0.json", b'{"host": "h", "process": 7, "token": "t"}')
            time.sleep(0.05)
        write(place.folder / "b.mp4", b"video")
        time.sleep(0.3)
        copied.extend(there(files))
        place.sync()
        copied.append("the last copy alone was refused")

    with (
        interruptions(signal.SIG_IGN),
        pytest.raises(UserError, match=r"in use by process 7 on h; .*; what it lacks is in /") as caught,
        destination(ADDRESS) as place,
    ):
        work(place)
    assert copied == []
    assert (Path(str(caught.value).rpartition(" ")[2]) / "b.mp4").read_bytes() == b"video"


def test_a_network_that_comes_back_loses_nothing(files, monkeypatch, capsys):
    put = type(files).put_file
    with destination(ADDRESS) as place:
        monkeypatch.setattr(type(files), "put_file", _raises)
        write(place.folder / "a.mp4", b"video")
        wait_until(lambda: "cannot write to memory://bucket/out: no route; it is tried" in capsys.readouterr().err)
        monkeypatch.setattr(type(files), "put_file", put)
    assert there(files) == {"a.mp4": b"video"}


def test_what_cannot_be_copied_stays_here(files, monkeypatch):
    def work(folder):
        monkeypatch.setattr(type(files), "put_file", _raises)
        write(folder / "a.mp4", b"video")

    said = refused(work, r"cannot write to memory://bucket/out: no route; what it lacks is in /")
    assert (Path(said.rpartition(" ")[2]) / "a.mp4").read_bytes() == b"video"


def _raises(*_, **__):
    raise ConnectionError("no route")


def test_errors_speak_of_the_address(files):
    def work(folder):
        raise UserError(f"{folder / 'metadata.json'} is not valid")

    refused(work, r"^memory://bucket/out/metadata.json is not valid$")


def test_an_address_that_nothing_serves():
    with (
        pytest.raises(UserError, match="cannot use nowhere://bucket/out: Protocol not known: nowhere"),
        destination("nowhere://bucket/out"),
    ):
        pass


class Job:
    """Does to a folder what a job does: chunks into reels, states, videos in the place of reels, and records."""

    def __init__(self, folder: Path):
        self.own = folder / ".rfjax/process-0"
        self.folder = folder
        self.chunks: dict[str, int] = {}
        self.done: list[str] = []
        self.states = 0

    def add_chunk(self, video: str) -> None:
        if video not in self.done:
            self.chunks[video] = self.chunks.get(video, 0) + 1
            write(self.own / "reels" / video / f"{self.chunks[video]}.npz", b"chunk")

    def finish(self, video: str) -> None:
        if self.chunks.get(video):
            write(self.folder / f"{video}.mp4", b"video")
            self.done.append(video)
            write(self.folder / "metadata.json", json.dumps(self.done).encode())
            for chunk in range(self.chunks.pop(video)):
                (self.own / "reels" / video / f"{chunk + 1}.npz").unlink()

    def keep(self, video: str) -> None:
        self.states += 1
        for part in ("arrays", "record"):
            write(self.own / "state" / str(self.states) / part, json.dumps(self.chunks).encode())
        for part in ("arrays", "record"):
            (self.own / "state" / str(self.states - 2) / part).unlink(missing_ok=True)


STATE = "arrays", "record"
STEPS = st.lists(
    st.tuples(st.sampled_from(["add_chunk", "finish", "keep", "push"]), st.sampled_from("ab")), max_size=25
)


@given(steps=STEPS, lost_at=st.integers(1, 12), busy=st.sets(st.integers(1, 12)))
@settings(max_examples=300, deadline=None)
def test_whenever_the_machine_goes_away_a_job_can_go_on(steps, lost_at, busy):
    """Also while it goes on: `busy` are the remote operations during which several new states replace the old ones."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    mirror = mirrors._Mirror(ADDRESS, 0)
    job, calls, kept = Job(mirror.folder), [], 0

    class Lost(BaseException):
        pass

    class Network:
        """The memory, until the machine is lost."""

        def __getattr__(self, name):
            calls.append(name)
            if len(calls) == lost_at:
                raise Lost
            if len(calls) in busy:
                for _ in range(3):
                    job.keep("a")
            return getattr(files, name)

    mirror._files = Network()
    try:
        for step, video in steps:
            if step == "push":
                complete = job.states
                mirror.push(everything=True)
                kept = max(kept, complete)
            else:
                getattr(job, step)(video)
    except Lost:
        pass
    shutil.rmtree(mirror.folder)
    remote = there(files)
    done = json.loads(remote.get("metadata.json", b"[]"))
    assert all(remote[f"{video}.mp4"] == b"video" for video in done)
    states = [n for n in range(1, job.states + 1) if all(f".rfjax/process-0/state/{n}/{p}" in remote for p in STATE)]
    assert not kept or states  # what was there once gives way only to one that is complete


def test_a_state_is_copied_whole_though_it_is_removed_meanwhile(files, monkeypatch):
    mirror = mirrors._Mirror(ADDRESS, 0)
    job = Job(mirror.folder)
    job.keep("a")
    put = type(files).put_file

    def slowly(self, *args, **kwargs):
        for _ in range(3):
            job.keep("a")
        put(self, *args, **kwargs)

    monkeypatch.setattr(type(files), "put_file", slowly)
    mirror.push(everything=True)
    assert {name for name in there(files) if "state/1/" in name} == {f".rfjax/process-0/state/1/{p}" for p in STATE}


def test_another_job_s_processes_are_waited_for(files, capsys):
    files.pipe(ROOT + ".rfjax-owner-3.json", b'{"host": "h", "process": 7, "token": "t"}')
    with destination(ADDRESS, process=0, count=4), destination(ADDRESS, process=1, count=2):
        pass
    assert capsys.readouterr().err == ""
    with destination(ADDRESS, process=0, count=2):
        pass
    assert "memory://bucket/out has an owner, process 7 on h" in capsys.readouterr().err
    assert not any("owner" in name for name in files.store)


def test_folders_of_owners_that_were_killed_are_removed_and_those_that_are_needed_are_not(files, monkeypatch):
    killed, other = (mirrors._Mirror(ADDRESS, process) for process in (0, 1))
    for mirror in (killed, other):
        os.close(mirror._lock)  # as its end does
    killed, other = killed.folder, other.folder
    with monkeypatch.context() as broken:
        broken.setattr(type(files), "put_file", _raises)
        said = refused(lambda folder: write(folder / "a.mp4", b"video"), "what it lacks is in /")
    with destination(ADDRESS) as place:
        assert (killed.exists(), other.exists(), place.folder.exists()) == (False, True, True)
    assert (Path(said.rpartition(" ")[2]) / "a.mp4").read_bytes() == b"video"
    shutil.rmtree(other)


def test_a_folder_in_which_somebody_still_works_stays(files):
    suspended = mirrors._Mirror(ADDRESS, 0)
    with destination(ADDRESS):
        assert suspended.folder.exists()
    suspended.close()
    assert not suspended.folder.exists()


def test_an_interruption_of_the_last_copy_says_what_is_left(files, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def work(broken):
        with destination(ADDRESS) as place:
            broken.setattr(type(files), "put_file", interrupted)
            write(place.folder / "a.mp4", b"video")

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt, match=r"what .* lacks is in /") as caught:
        work(broken)
    left = Path(str(caught.value).rpartition(" ")[2])
    with destination(ADDRESS):
        assert (left / "a.mp4").read_bytes() == b"video"
    shutil.rmtree(left)
