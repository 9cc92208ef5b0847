"""`jobs.json`: whole at any moment, and true after a run has ended."""

import json

import pytest

from rfjax.errors import UserError
from rfjax.io import manifest
from rfjax.io.manifest import JOBS, Manifest, read_jobs


def entry(file, state="pending", **more):
    return {"file": file, "prompt": file[:-6], "sample": 0, "chunks": 4, "state": state, **more}


def test_states_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_SECONDS_BETWEEN_CHUNKS", 0)
    jobs = Manifest(tmp_path, [entry("a-0.mp4"), entry("b-0.mp4")])
    assert read_jobs(tmp_path) == {"a-0.mp4": entry("a-0.mp4"), "b-0.mp4": entry("b-0.mp4")}
    jobs.running("a-0.mp4", 0)
    jobs.running("a-0.mp4", 1)
    jobs.failed("b-0.mp4", "no memory")
    assert read_jobs(tmp_path)["a-0.mp4"] == entry("a-0.mp4", "running", chunk=1)
    assert read_jobs(tmp_path)["b-0.mp4"] == entry("b-0.mp4", "failed", reason="no memory")
    jobs.done("a-0.mp4")
    jobs.pending("b-0.mp4")
    assert list(read_jobs(tmp_path).values()) == [entry("a-0.mp4", "done"), entry("b-0.mp4")]


def test_chunks_are_written_now_and_then_but_the_first_at_once(tmp_path):
    jobs = Manifest(tmp_path, [entry("a-0.mp4")])
    jobs.running("a-0.mp4", 0)
    jobs.running("a-0.mp4", 1)
    assert read_jobs(tmp_path)["a-0.mp4"]["chunk"] == 0


def test_what_a_killed_run_left_running_waits_again(tmp_path):
    Manifest(tmp_path, [entry("a-0.mp4")]).running("a-0.mp4", 0)
    Manifest(tmp_path, [entry("b-0.mp4")])
    assert read_jobs(tmp_path) == {"a-0.mp4": entry("a-0.mp4"), "b-0.mp4": entry("b-0.mp4")}


def test_a_run_that_stops_leaves_nothing_running(tmp_path):
    jobs = Manifest(tmp_path, [entry("a-0.mp4")])
    jobs.running("a-0.mp4", 2)
    jobs.stop()
    assert read_jobs(tmp_path) == {"a-0.mp4": entry("a-0.mp4")}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": 3}', '{"jobs": [{"file": "a"}]}', '{"jobs": [1]}'])
def test_other_peoples_file_is_a_user_error(tmp_path, text):
    (tmp_path / JOBS).write_text(text)
    with pytest.raises(UserError, match=r"jobs\.json was not written by rfjax"):
        read_jobs(tmp_path)


def test_it_is_json_of_a_line_a_video(tmp_path):
    Manifest(tmp_path, [entry("ä-0.mp4"), entry("b-0.mp4")])
    text = (tmp_path / JOBS).read_text(encoding="utf-8")
    assert len(text.splitlines()) == 4
    assert json.loads(text)["jobs"][0]["prompt"] == "ä"
