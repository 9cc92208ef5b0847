"""Several processes of one job: who is there, who makes what, and how each ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tiny_data import make_tiny_checkpoint

from rfjax import cli
from rfjax.errors import UserError
from rfjax.io import ownership
from rfjax.io.manifest import read_jobs
from rfjax.parallel.processes import Processes, RollCall, detect


def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def knock(where: str) -> socket.socket:
    """Connect as soon as somebody listens there."""
    host, port = where.split(":")
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {where}")


def together(count: int, work, present=None, timeout: float = 5.0) -> list:
    """Run `work(roll call)` in a thread a process; return what each returned or raised."""
    where = address()
    ends: list[Any] = [None] * count

    def one(index: int) -> None:
        try:
            with RollCall(Processes(where, count, index), timeout) as call:
                ends[index] = work(call)
        except Exception as error:
            ends[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in present or range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def test_shares_are_disjoint_and_complete():
    shares = [Processes("", 3, index).share(range(8)) for index in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_all_arrive_and_end():
    def work(call):
        return call.failures() if call.processes.index == 0 else "made"

    assert together(3, work) == [{}, "made", "made"]


def test_a_failure_is_told_by_number():
    def work(call):
        if call.processes.index == 0:
            return call.failures()
        if call.processes.index == 2:
            raise UserError("the disk is full")
        return None

    ends = together(3, work)
    assert ends[0] == {2: "the disk is full"}
    assert isinstance(ends[2], UserError)


def test_all_fail_with_one():
    """Whatever has started them starts all again then: they have to meet."""

    def work(call):
        if call.processes.index == 2:
            raise UserError("the disk is full")
        if call.processes.index == 0 and call.failures():
            raise UserError("process 2: the disk is full")

    assert [str(end) for end in together(3, work)] == [*["process 2: the disk is full"] * 2, "the disk is full"]


def test_all_hear_that_the_first_has_died():
    def work(call):
        if call.processes.index == 0:
            call._close()  # as the end of a process does
            call._ends = {}

    (_, end) = together(2, work)
    assert "process 0 has died; this one has done its part" in str(end)


def test_a_process_may_be_started_again_before_all_are_there():
    where, ends = address(), []

    def first():
        with RollCall(Processes(where, 3, 0), 20.0) as call:
            ends.append(call.failures())

    thread = threading.Thread(target=first)
    thread.start()
    with knock(where) as died:
        died.sendall(b"1 3\n")
        time.sleep(0.2)
    with taking_part(where, 3, [2]) as second:
        time.sleep(0.5)  # all but the one that died are there
        with taking_part(where, 3, [1]) as again:
            pass
    thread.join(20)
    assert (ends, second, again) == ([{}], {}, {})


def test_the_first_does_something_when_all_are_there_and_nobody_has_begun():
    where, order = address(), []

    def one(index):
        with RollCall(Processes(where, 3, index), 20.0, lambda: order.append("before")):
            order.append(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(20)
    assert order[0] == "before"
    assert sorted(order[1:]) == [0, 1, 2]


def test_all_hear_why_the_first_cannot_begin():
    where = address()

    def before():
        raise UserError("metadata.json was not written by rfjax")

    with taking_part(where, 3, [1, 2]) as told, pytest.raises(UserError, match="not written by"):
        RollCall(Processes(where, 3, 0), 20.0, before).__enter__()
    assert told == dict.fromkeys((1, 2), "metadata.json was not written by rfjax")


def test_who_never_arrives_is_named_to_all():
    ends = together(4, lambda call: None, present=[0, 2], timeout=1.0)
    for end in (ends[0], ends[2]):
        assert isinstance(end, UserError)
        assert "2 of 4 processes did not arrive at 127.0.0.1:" in str(end)
        assert "within 1 s: 1, 3; start them, or ask for fewer" in str(end)


@contextlib.contextmanager
def taking_part(where: str, count: int, present: Sequence[int]) -> Iterator[dict[int, str]]:
    """Let those processes wait for all, a thread each; yield what each is told instead, complete after the block."""
    told: dict[int, str] = {}

    def take_part(index: int) -> None:
        try:
            with RollCall(Processes(where, count, index), 60.0):
                pass
        except UserError as error:
            told[index] = str(error)

    threads = [threading.Thread(target=take_part, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
    yield told
    for thread in threads:
        thread.join(20)


def test_nobody_waits_for_one_that_cannot_take_part():
    where = address()
    with taking_part(where, 3, [0, 1]) as told:
        time.sleep(1)  # until both are there
        RollCall(Processes(where, 3, 2), 60.0).withdraw("the checkpoint folder\n x does not exist")
    assert told == dict.fromkeys((0, 1), "process 2 cannot take part: the checkpoint folder x does not exist")


@pytest.mark.parametrize(("index", "others"), [(0, [1, 2]), (1, [0, 2])])
def test_a_process_without_its_checkpoint_says_so_to_all(tmp_path, capsys, index, others):
    where = address()
    flags = ["--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "o")]
    with taking_part(where, 3, others) as told:
        time.sleep(1)
        assert cli.main(["generate", *flags, "--processes", f"{where},3,{index}"]) == 2
    said = f"the checkpoint folder {tmp_path / 'none'} does not exist"
    assert said in capsys.readouterr().err
    assert told == dict.fromkeys(others, f"process {index} cannot take part: {said}")


def test_what_is_wrong_at_an_address_goes_by_it(monkeypatch):
    monkeypatch.setattr(ownership, "SETTLE_SECONDS", 0.01)
    fsspec.filesystem("memory").pipe("/bucket/damaged/metadata.json", b"{")
    where = address()
    with taking_part(where, 2, [0]) as told:
        time.sleep(1)
        assert cli.main(["generate", "--output", "memory://bucket/damaged", "--processes", f"{where},2,1"]) == 2
    assert "memory://bucket/damaged/metadata.json" in told[0]


def test_the_first_may_be_the_one_that_never_arrives():
    (_, end) = together(2, lambda call: None, present=[1], timeout=0.5)
    assert "process 0 did not arrive at 127.0.0.1:" in str(end)


def test_strangers_and_doubles_are_sent_away():
    where, answers = address(), []
    host, port = where.split(":")

    def knock():
        time.sleep(0.2)
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"7 9\n"):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(word)
                answers.append(stranger.recv(200))

    thread = threading.Thread(target=knock)
    thread.start()
    with pytest.raises(UserError, match="1 of 2 processes did not arrive"):
        RollCall(Processes(where, 2, 0), 1.5).__enter__()
    thread.join()
    assert answers == [b"", b"process 7 of 9 is there already, or no part of 2"]


def test_a_taken_port_is_said_to_be():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"process 0 cannot listen at port {port}"),
            RollCall(Processes(f"127.0.0.1:{port}", 2, 0), 1.0),
        ):
            pass


def test_no_cluster_is_said_to_be(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "JAX_COORD", "OMPI", "TPU_", "KUBERNETES")):
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match="--processes auto f"):
        detect(1.0)


@pytest.mark.parametrize("text", ["four", "a:1,2", "a:1,2,2", "a:x,2,0", ":1,2,0"])
def test_flags_are_checked(text, capsys):
    assert cli.main(["generate", "--processes", text]) == 2
    assert "argument --processes" in capsys.readouterr().err


# --- as a job --------------------------------------------------------------------------------------------------------

LENGTHS = {"a red circle": 9, "a blue star": 3, "a circle": 6, "a star": 12}


@pytest.fixture
def job(tmp_path):
    """Start a process of a job: `job(index, count, address)`."""
    make_tiny_checkpoint(tmp_path / "tiny")
    lines = [json.dumps({"prompt": prompt, "latent_frames": frames}) for prompt, frames in LENGTHS.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}

    def start(output: str, *more: str) -> subprocess.Popen:
        flags = ["--checkpoint", "tiny", "--prompt-file", "prompts.jsonl", "--output", output, *more]
        command = [sys.executable, "-m", "rfjax.cli", "generate", *flags]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def check_complete(folder: Path) -> None:
    assert len(videos(folder)) == 4
    records = {r["file"]: r for r in json.loads((folder / "metadata.json").read_text())["videos"]}
    assert records.keys() == videos(folder).keys() == read_jobs(folder).keys()
    assert {entry["state"] for entry in read_jobs(folder).values()} == {"done"}
    timelines = [record["timeline"] for record in records.values()]
    assert len(set(timelines)) == 4
    assert all((folder / timeline).exists() for timeline in timelines)
    assert not (folder / ".rfjax").exists()


@pytest.mark.slow
def test_two_processes_of_four_devices_make_the_videos_of_one(job, tmp_path):
    where = address()
    ends = [ended(p) for p in [job("two", "--processes", f"{where},2,{index}") for index in (0, 1)]]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert ends[1][1] == ""  # the first speaks for all
    assert "2 others by the other 1 processes" in ends[0][1]
    assert ended(job("one"))[0] == 0
    check_complete(tmp_path / "two")
    check_complete(tmp_path / "one")
    assert videos(tmp_path / "two") == videos(tmp_path / "one")


@pytest.mark.slow
def test_one_process_killed_is_named_and_a_single_one_makes_the_rest(job, tmp_path):
    where = address()
    processes = [job("o", "--processes", f"{where},2,{index}", "--checkpoint-every", "1") for index in (0, 1)]
    own = tmp_path / "o/.rfjax/process-1"
    while processes[1].poll() is None and not list(own.glob("state/*/record")):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    ended(processes[1])
    code, _, err = ended(processes[0])
    assert code == 2
    assert err == "rfjax: error: process 1: it died\n"
    assert len(videos(tmp_path / "o")) < 4
    code, _, err = ended(job("o"))
    assert code == 0, err
    check_complete(tmp_path / "o")


@pytest.mark.slow
def test_a_process_that_never_arrives_is_named(job):
    code, _, err = ended(job("o", "--processes", f"{address()},3,0", "--processes-timeout", "2"))
    assert code == 2
    assert "2 of 3 processes did not arrive at 127.0.0.1" in err
    assert len(err.splitlines()) == 1
