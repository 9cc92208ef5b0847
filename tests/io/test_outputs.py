"""The output folder's records, and files that appear whole or not at all."""

import json

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


def test_records_are_added_and_replaced_by_file(tmp_path):
    outputs.add_record(tmp_path, record("a.mp4"))
    outputs.add_record(tmp_path, record("b.mp4"))
    outputs.add_record(tmp_path, record("a.mp4", seed=5))
    assert [r["file"] for r in outputs.read_records(tmp_path)] == ["b.mp4", "a.mp4"]
    assert outputs.read_records(tmp_path)[1]["settings"]["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.json"]


def test_same_settings_pass_and_others_are_named(tmp_path):
    outputs.add_record(tmp_path, record("a.mp4"))
    (tmp_path / "a.mp4").touch()
    outputs.check_settings(tmp_path, {"seed": 0, "policy": {"name": "a", "sizes": (1, 2)}})
    with pytest.raises(UserError, match="made with seed 0, this run has 3; choose another --output, or --overwrite"):
        outputs.check_settings(tmp_path, record("a.mp4", seed=3)["settings"])
    with pytest.raises(UserError, match=r'made with policy \{"name": "a", .*\}, this run has \{"name": "b"\}'):
        outputs.check_settings(tmp_path, record("a.mp4", policy={"name": "b"})["settings"])


def test_record_of_a_deleted_video_does_not_bind(tmp_path):
    outputs.add_record(tmp_path, record("a.mp4"))
    outputs.check_settings(tmp_path, record("a.mp4", seed=3)["settings"])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"videos": 3}', '{"videos": [{"file": "a"}]}', '{"videos": [1]}']
)
def test_other_peoples_metadata_is_a_user_error(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=r"metadata\.json was not written by rfjax"):
        outputs.read_records(tmp_path)


def test_timeline_of_a_single_video_has_the_short_name_until_it_is_taken(tmp_path):
    assert outputs.timeline_name(tmp_path, "a cat", 0, alone=True) == "memory_timeline.png"
    assert outputs.timeline_name(tmp_path, "a cat", 0, alone=False) == "a cat-0.timeline.png"
    outputs.add_record(tmp_path, record("a cat-0.mp4", "memory_timeline.png"))
    assert outputs.timeline_name(tmp_path, "a cat", 0, alone=True) == "memory_timeline.png"
    assert outputs.timeline_name(tmp_path, "a dog", 0, alone=True) == "a dog-0.timeline.png"


def test_folder_is_checked_without_being_made(tmp_path):
    outputs.check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
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
