"""The output folder's records, and files that appear whole or not at all."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rfjax.errors import UserError
from rfjax.io import outputs
from rfjax.io.atomic import replacing, write_json


def record(file: str, timeline: str = "t.png", **settings) -> dict:
    return {
        "file": file,
        "timeline": timeline,
        "settings": {"seed": 0, "policy": {"name": "a", "sizes": [1, 2]}} | settings,
    }


def add(folder, *added: dict) -> None:
    with outputs.updating(folder) as records:
        records.update({new["file"]: new for new in added})


def test_records_are_added_and_replaced_by_file(tmp_path):
    add(tmp_path, record("a.mp4"))
    add(tmp_path, record("猫.mp4"))
    add(tmp_path, record("a.mp4", seed=5))
    assert outputs.read_records(tmp_path) == {"a.mp4": record("a.mp4", seed=5), "猫.mp4": record("猫.mp4")}
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


def test_metadata_is_plain_json_with_a_record_a_line(tmp_path):
    add(tmp_path, record("a.mp4"), record("b.mp4"))
    text = (tmp_path / "metadata.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"videos": [record("a.mp4"), record("b.mp4")]}
    assert [json.loads(line.rstrip(",")) for line in text.splitlines()[1:-1]] == [record("a.mp4"), record("b.mp4")]


def test_runs_at_the_same_time_keep_each_others_records(tmp_path):
    names = [f"{number}.mp4" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: add(tmp_path, record(name)), names))
    assert outputs.read_records(tmp_path).keys() == set(names)
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


def test_failure_while_updating_keeps_the_records_and_frees_the_folder(tmp_path):
    add(tmp_path, record("a.mp4"))

    def fail():
        with outputs.updating(tmp_path) as records:
            records.clear()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    add(tmp_path, record("b.mp4"))
    assert outputs.read_records(tmp_path).keys() == {"a.mp4", "b.mp4"}


def test_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        add(tmp_path / "nowhere", record("a.mp4"))


def test_only_stale_temporary_files_are_removed(tmp_path):
    for name, age in ((".rfjax-0.part", 2), (".rfjax-1.part", 0), ("a cat-0.mp4", 2)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - age * 24 * 3600))
    (tmp_path / ".rfjax-2.part").mkdir()
    outputs.remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".rfjax-1.part", ".rfjax-2.part", "a cat-0.mp4"}


def check(folder, settings, lengths):
    outputs.check_settings(folder, outputs.read_records(folder), settings, lengths)


def test_same_settings_pass_and_others_are_named(tmp_path):
    add(tmp_path, record("a.mp4"))
    (tmp_path / "a.mp4").touch()
    check(tmp_path, {"seed": 0, "policy": {"name": "a", "sizes": (1, 2)}}, {})
    with pytest.raises(UserError, match="made with seed 0, this run has 3; choose another --output, or --overwrite"):
        check(tmp_path, record("a.mp4", seed=3)["settings"], {})
    with pytest.raises(UserError, match=r'made with policy \{"name": "a", .*\}, this run has \{"name": "b"\}'):
        check(tmp_path, record("a.mp4", policy={"name": "b"})["settings"], {})


def test_videos_of_other_lengths_may_be_there_but_not_one_that_is_asked_for(tmp_path):
    add(tmp_path, record("a.mp4", latent_frames=21))
    (tmp_path / "a.mp4").touch()
    settings = record("b.mp4", latent_frames=42)["settings"]
    check(tmp_path, settings, {"b.mp4": 42})
    check(tmp_path, settings, {"a.mp4": 21, "b.mp4": 42})
    with pytest.raises(UserError, match="made with latent_frames 21, this run has 42"):
        check(tmp_path, settings, {"a.mp4": 42})


def test_record_of_a_deleted_video_does_not_bind(tmp_path):
    add(tmp_path, record("a.mp4"))
    check(tmp_path, record("a.mp4", seed=3)["settings"], {})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"videos": 3}', '{"videos": [{"file": "a"}]}', '{"videos": [1]}']
)
def test_other_peoples_metadata_is_a_user_error(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=r"metadata\.json was not written by rfjax"):
        outputs.read_records(tmp_path)


def test_timeline_of_the_first_video_has_the_short_name():
    assert outputs.timeline_name({}, "a cat", 0) == "memory_timeline.png"
    records = {"a cat-0.mp4": record("a cat-0.mp4", "memory_timeline.png")}
    assert outputs.timeline_name(records, "a cat", 0) == "memory_timeline.png"
    assert outputs.timeline_name(records, "a cat", 1) == "a cat-1.timeline.png"
    assert outputs.timeline_name(records, "a dog", 0) == "a dog-0.timeline.png"


def test_folder_is_checked_without_being_made(tmp_path):
    outputs.check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot look at the output folder x+: File name too long"):
        outputs.check_writable(Path("x" * 300))
    with pytest.raises(UserError, match="is not a folder"):
        outputs.check_writable(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot be made"):
        outputs.make_folder(tmp_path / "file" / "below")


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_reads_back_and_keeps_lists_of_numbers_on_one_line(tmp_path):
    value = {"a": [[1, 2], []], "b": {"猫": [0.5, None], "empty": {}}, "c": [], "d": [{"x": True}, "line\nbreak"]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "[0.5, null]" in text
    assert "猫" in text


def test_json_cannot_hold_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [float("nan")])
    assert list(tmp_path.iterdir()) == []
