"""A user's own folder of videos: cut into clips, what cannot be used is listed, what is missing is said."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_data import write_video

from rfjax.data.reading import open_dataset
from rfjax.data.video_folder import VideoFolderConfig, build, fit, read_captions, resampled, resampled_length
from rfjax.errors import UserError


def config(videos: Path, **changes) -> VideoFolderConfig:
    return VideoFolderConfig(**{"videos": videos, "frames": 5, "height": 16, "width": 24, **changes})


def say_nothing(kept: int, done: int, total: int) -> None:
    pass


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *captions.items()])


def skipped(folder: Path) -> dict[str, str]:
    with open(folder / "skipped.csv", newline="") as file:
        return {row["video"]: row["reason"] for row in csv.DictReader(file)}


def levels(example) -> list[int]:
    """Gray level of each frame of a clip."""
    video = example["video"].astype(int)
    assert np.ptp(video, axis=(1, 2, 3)).max() <= 3
    return [round(frame.mean()) for frame in video]


def test_videos_become_consecutive_clips_with_their_captions(tmp_path):
    videos = tmp_path / "videos"
    write_video(videos / "b.mp4", [10 * i for i in range(13)])
    write_video(videos / "deep" / "a.mp4", [200 - 10 * i for i in range(5)])
    write_captions(videos, {"b.mp4": " rising,\n light ", "./deep/a.mp4": "falling"})
    told = []
    summary = build(tmp_path / "clips", config(videos), lambda *numbers: told.append(numbers))
    assert summary == "3 clips in train, of 2 videos; 0 skipped, see skipped.csv"
    assert told == [(0, 1, 2), (0, 2, 2)]
    source = open_dataset(tmp_path / "clips", "train")
    assert [source[i]["caption"] for i in range(len(source))] == ["rising, light", "rising, light", "falling"]
    for index, wanted in enumerate(([0, 10, 20, 30, 40], [50, 60, 70, 80, 90], [200, 190, 180, 170, 160])):
        assert source[index]["video"].shape == (5, 16, 24, 3)
        np.testing.assert_allclose(levels(source[index]), wanted, atol=2)


def test_what_cannot_be_used_is_listed_and_left_out(tmp_path):
    videos = tmp_path / "videos"
    whole = write_video(videos / "good.mp4", [100] * 5)
    write_video(videos / "short.mp4", [100] * 4)
    write_video(videos / "mute.mp4", [100] * 5)
    write_video(videos / "empty.mp4", [100] * 5)
    content = write_video(videos / "long.mp4", list(range(0, 240, 3)), 64, 96).read_bytes()
    (videos / "long.mp4").unlink()
    (videos / "half.mp4").write_bytes(content[: len(content) * 2 // 3])
    (videos / "torn.mp4").write_bytes(whole.read_bytes()[:100])
    (videos / "text.mp4").write_text("no video")
    (videos / "notes.txt").write_text("neither")
    names = ["good", "short", "half", "torn", "text", "gone"]
    write_captions(videos, {**{f"{name}.mp4": "gray" for name in names}, "empty.mp4": " "})
    summary = build(tmp_path / "clips", config(videos), say_nothing)
    assert summary == "1 clips in train, of 1 videos; 7 skipped, see skipped.csv"
    assert len(open_dataset(tmp_path / "clips", "train")) == 1
    reasons = skipped(tmp_path / "clips")
    assert list(reasons) == sorted(reasons)
    assert reasons["gone.mp4"] == "no such file"
    assert reasons["mute.mp4"] == reasons["empty.mp4"] == "no caption"
    assert reasons["short.mp4"] == "4 frames at 16 a second, fewer than 5"
    assert re.search(r"damaged|Invalid data", reasons["half.mp4"])
    assert "no video stream" in reasons["torn.mp4"]
    assert "cannot read" in reasons["text.mp4"]
    assert len(reasons) == 7


def test_a_share_of_the_videos_is_kept_for_tests(tmp_path):
    videos = tmp_path / "videos"
    for number in range(4):
        write_video(videos / f"{number}.mp4", [50 * number] * 10)
    write_captions(videos, {f"{number}.mp4": f"video {number}" for number in range(4)})
    build(tmp_path / "clips", config(videos, test_share=0.3), say_nothing)
    build(tmp_path / "again", config(videos, test_share=0.3), say_nothing)
    captions = {}
    for split in ("train", "test"):
        source, again = open_dataset(tmp_path / "clips", split), open_dataset(tmp_path / "again", split)
        captions[split] = [source[i]["caption"] for i in range(len(source))]
        assert captions[split] == sorted(captions[split])
        assert captions[split] == [again[i]["caption"] for i in range(len(again))]
    assert [len(captions[split]) for split in ("train", "test")] == [4, 4]
    assert not set(captions["train"]) & set(captions["test"])
    with pytest.raises(UserError, match=r"test share 0\.9 of 4 videos .* leaves none to train on"):
        build(tmp_path / "none", config(videos, test_share=0.9), say_nothing)
    assert not (tmp_path / "none").exists()


def test_resampling_shows_at_every_time_what_is_shown_then():
    def picked(count: int, fps: float, wanted: int) -> list[int]:
        frames = [np.full((1, 1, 3), index, np.uint8) for index in range(count)]
        made = [int(frame[0, 0, 0]) for frame in resampled(frames, fps, wanted)]
        assert len(made) == resampled_length(count, fps, wanted)
        return made

    assert picked(5, 16.0, 16) == [0, 1, 2, 3, 4]
    assert picked(3, 8.0, 16) == [0, 0, 1, 1, 2, 2]
    assert picked(7, 32.0, 16) == [0, 2, 4, 6]
    assert picked(8, 24.0, 16) == [0, 1, 3, 4, 6, 7]
    assert picked(200, 30000 / 1001, 16) == [int(k * 30000 / 1001 / 16 + 1e-6) for k in range(107)]


def test_pictures_are_cut_in_the_middle_and_resized():
    frame = np.zeros((32, 96, 3), np.uint8)
    frame[:, 24:72] = (200, 100, 50)
    picture = fit(frame, 16, 24).astype(int)
    assert picture.shape == (16, 24, 3)
    assert abs(picture - (200, 100, 50)).max() <= 3
    high = np.zeros((60, 24, 3), np.uint8)
    high[22:38] = 255
    assert fit(high, 16, 24).min() >= 250
    ramp = np.repeat(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    np.testing.assert_allclose(fit(ramp, 16, 24)[8, 2:-2, 1], np.arange(2.5, 240, 10)[2:-2], atol=2)


def test_captions_of_the_usual_names_and_of_json_lines(tmp_path):
    wanted = {"a.mp4": 'a "red", round thing', "b/c.mp4": "ein Ö"}
    for video in ("path", "file", "file_name", "video"):
        for caption in ("caption", "text", "prompt"):
            with open(tmp_path / "any.csv", "w", newline="", encoding="utf-8-sig") as file:
                csv.writer(file).writerows([("number", caption, video), *((1, text, v) for v, text in wanted.items())])
            assert read_captions(config(tmp_path, captions=tmp_path / "any.csv")) == wanted
            lines = [json.dumps({video: v, caption: text, "other": [1]}) for v, text in wanted.items()]
            (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n\n")
            assert read_captions(config(tmp_path)) == wanted


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_captions_with_separators_of_lines_that_end_none_stay_whole(tmp_path, separator):
    (tmp_path / "c.csv").write_text(f"file,caption\na.mp4,a cat{separator}on a mat\n", encoding="utf-8")
    assert read_captions(config(tmp_path, captions=tmp_path / "c.csv")) == {"a.mp4": "a cat on a mat"}


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("c.csv", "file,caption\na.mp4,a cat, a dog\n", "line 2 of .* more columns than the first; quote captions"),
        ("c.csv", "name,caption\na.mp4,a cat\n", "line 1 of .* has name, caption; one of path, file"),
        ("c.csv", "file,caption\n,a cat\n", "line 2 of .* names no video"),
        ("c.csv", "file,caption\na.mp4,a cat\n./a.mp4,a dog\n", r"line 3 of .* is the second of a\.mp4"),
        ("c.csv", "file,caption\n", "name no video; a line a video is needed"),
        ("c.jsonl", "", "name no video"),
        ("c.jsonl", '{"file": "a.mp4"}\n', "line 1 of .* has file; one of caption, text, prompt is needed"),
        ("c.jsonl", '{"file": "a.mp4", "caption": 3}\n', "line 1 of .* has caption 3; a text is needed"),
        ("c.jsonl", "a.mp4, a cat\n", "line 1 of .* is not a JSON object"),
        ("c.txt", "a.mp4, a cat\n", r"end in '\.txt'; \.csv or \.jsonl is needed"),
        ("c.csv", "file,caption\na.mp4,\xff\n", "not UTF-8"),
        ("missing.csv", None, "cannot read the captions"),
    ],
)
def test_a_file_of_captions_that_cannot_be_understood_is_named_with_its_line(tmp_path, name, text, match):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=match) as caught:
        read_captions(config(tmp_path, captions=tmp_path / name))
    assert "\n" not in str(caught.value)


def test_nothing_to_use_is_said_and_nothing_written(tmp_path):
    videos = tmp_path / "videos"
    with pytest.raises(UserError, match="not a folder that exists"):
        build(tmp_path / "clips", config(videos), say_nothing)
    write_video(videos / "a.mp4", [100] * 4)
    with pytest.raises(UserError, match=r"has no captions; put captions\.csv or captions\.jsonl there"):
        build(tmp_path / "clips", config(videos), say_nothing)
    write_captions(videos, {"a.mp4": "gray"})
    (videos / "captions.jsonl").touch()
    with pytest.raises(UserError, match=r"has captions\.csv and captions\.jsonl; put captions\.csv or captions\.jsonl"):
        build(tmp_path / "clips", config(videos), say_nothing)
    (videos / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"none of the 1 videos .*; the first, a\.mp4: 4 frames at 16 a second, fewer"):
        build(tmp_path / "clips", config(videos), say_nothing)
    assert {path.name for path in tmp_path.iterdir()} == {"videos"}
    with pytest.raises(UserError, match="already holds files"):
        build(videos, config(videos), say_nothing)
