"""`gs://` and `s3://` in place of folders, against servers that speak the protocols of both."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from rfjax import cli
from rfjax.io import mirrors, ownership
from rfjax.io.mirrors import destination
from rfjax.io.remote import local

PROMPTS = {"a red circle": 60, "a blue star": 15, "a circle": 30, "a star": 45, "a red star": 60}
"""Latent frames."""
QUICK = {
    mirrors: {"PUSH_SECONDS": 0.1},
    ownership: {"BEAT_SECONDS": 0.2, "SILENCE_SECONDS": 1.0, "SETTLE_SECONDS": 0.1},
}
KILLS = 6
COMMAND = f"""
import sys
from rfjax import cli
from rfjax.io import mirrors, ownership
vars(mirrors).update({QUICK[mirrors]})
vars(ownership).update({QUICK[ownership]})
sys.exit(cli.main())
"""


@pytest.fixture(scope="module", autouse=True)
def _servers():
    script = Path(__file__).with_name("bucket_servers.py")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        variables = json.loads(next(line for line in process.stdout if line.startswith(b"{")))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            yield
        process.kill()


@pytest.fixture(params=["s3", "gs"])
def files(request):
    files = fsspec.filesystem(request.param)
    yield files
    if files.exists("bucket/job"):
        files.rm("bucket/job", recursive=True)


@pytest.fixture
def bucket(files) -> str:
    """The address of a place for one test."""
    scheme = files.protocol if isinstance(files.protocol, str) else min(files.protocol, key=len)
    return f"{scheme}://bucket/job"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for module, times in QUICK.items():
        for name, seconds in times.items():
            monkeypatch.setattr(module, name, seconds)


def names(files) -> set[str]:
    files.invalidate_cache()
    return {path.removeprefix("bucket/job/") for path in files.find("bucket/job")}


def test_files_come_and_go(files, bucket):
    files.pipe_file("bucket/job/out/a.mp4", b"video")
    files.pipe_file("bucket/job/out/metadata.json", b"{}")
    files.pipe_file("bucket/job/out/.rfjax/process-0/state/x", b"state")
    files.pipe_file("bucket/job/output/b.mp4", b"another folder's")
    copy = local(f"{bucket}/out")
    assert (copy / "a.mp4").read_bytes() == b"video"
    assert local(f"{bucket}/out/metadata.json").read_bytes() == b"{}"
    with destination(f"{bucket}/out") as place:
        assert {path.name for path in place.folder.iterdir()} - {mirrors._LOCK} == {"a.mp4", "metadata.json", ".rfjax"}
        shutil.rmtree(place.folder / ".rfjax")
        (place.folder / "c d.mp4").write_bytes(b"new")
    assert names(files) == {"out/a.mp4", "out/c d.mp4", "out/metadata.json", "output/b.mp4"}
    assert files.cat_file("bucket/job/out/c d.mp4") == b"new"


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there(scheme, checkpoint, capsys):
    flags = ["generate", "--checkpoint", str(checkpoint), "--output", f"{scheme}://nothing/out"]
    assert cli.main(flags) == 2
    assert f"cannot write to {scheme}://nothing/out: " in (said := capsys.readouterr().err)
    assert "is there such a bucket?" in said


@pytest.fixture
def flags(files, bucket, checkpoint) -> list[str]:
    """Everything comes from the bucket and goes there."""
    files.put(f"{checkpoint}/", "bucket/job/tiny/", recursive=True)
    lines = [json.dumps({"prompt": prompt, "latent_frames": frames}) for prompt, frames in PROMPTS.items()]
    files.pipe_file("bucket/job/prompts.jsonl", "\n".join(lines).encode())
    given = {"checkpoint": "tiny", "prompt-file": "prompts.jsonl"}
    return ["generate", "--batch-size", "2", *(f"--{flag}={bucket}/{name}" for flag, name in given.items())]


def expected(flags: list[str], tmp_path: Path) -> dict[str, bytes]:
    """The videos of a run without an address."""
    with started([*flags, "--output", str(tmp_path / "expected")], tmp_path) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    return {path.name: path.read_bytes() for path in (tmp_path / "expected").glob("*.mp4")}


def check_complete(files, videos: dict[str, bytes]) -> None:
    found = names(files)
    assert {name: files.cat_file(f"bucket/job/out/{name}") for name in videos} == videos
    assert {entry["state"] for entry in json.loads(files.cat_file("bucket/job/out/jobs.json"))["jobs"]} == {"done"}
    records = json.loads(files.cat_file("bucket/job/out/metadata.json"))["videos"]
    assert {record["file"] for record in records} == videos.keys()
    assert {f"out/{record['timeline']}" for record in records} <= found
    assert not [name for name in found if ".rfjax" in name]


def started(flags: list[str], tmp_path: Path) -> subprocess.Popen:
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "TMPDIR": str(tmp_path)}
    # Without LLVM's optimizations, as the suite compiles, the last bits depend on a video's place in the batch.
    del environment["XLA_FLAGS"]
    command = [sys.executable, "-c", COMMAND, *flags]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_on_machines_that_never_come_back_the_bytes_are_the_same(files, bucket, flags, tmp_path):
    """What the next run goes on with lies in the bucket alone."""
    videos, rng, seen, kills = expected(flags, tmp_path), random.Random(0), set(), 0
    while True:
        with started([*flags, "--output", f"{bucket}/out", "--checkpoint-every", "1"], tmp_path) as process:
            # Killed when a new state has begun to arrive: whole in the bucket, half there, or followed by another.
            while process.poll() is None and kills < KILLS:
                if new := {name for name in names(files) if "/state/" in name} - seen:
                    seen |= new
                    time.sleep(rng.uniform(0, 1))
                    process.send_signal(signal.SIGKILL)
                    break
            _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, said
            break
        kills += 1
    assert kills == KILLS
    check_complete(files, videos)


@pytest.mark.slow
def test_processes_share_an_address(files, bucket, flags, tmp_path):
    videos = expected(flags, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    both = [
        started(
            [*flags, "--output", f"{bucket}/out", "--checkpoint-every", "1", "--processes", f"{where},2,{index}"],
            tmp_path,
        )
        for index in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    check_complete(files, videos)


@pytest.mark.slow
def test_a_job_in_use_is_refused_and_one_that_is_done_is_left(files, bucket, flags, tmp_path, capsys):
    with destination(f"{bucket}/out"):
        assert cli.main([*flags, "--output", f"{bucket}/out"]) == 2
        assert f"{bucket}/out is in use by process {os.getpid()} on {socket.gethostname()}" in capsys.readouterr().err
    assert cli.main([*flags, "--output", f"{bucket}/out"]) == 0
    assert f"5 videos in {bucket}/out" in capsys.readouterr().out
    assert cli.main([*flags, "--output", f"{bucket}/out"]) == 0
    assert f"5 of 5 videos are in {bucket}/out already" in capsys.readouterr().out
    check_complete(files, {f"{prompt}-0.mp4": files.cat_file(f"bucket/job/out/{prompt}-0.mp4") for prompt in PROMPTS})
