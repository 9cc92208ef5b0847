"""The console's line, TensorBoard's files read back, and sample videos."""

import io
import os
import struct
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto import event_pb2

from rfjax.errors import UserError
from rfjax.io.video import read_video
from rfjax.training.metrics import Metrics, duration

NUMBERS = {"model/loss": 0.123456, "model/gradient_norm": 12.5, "model/learning_rate": 1e-4}

PROTO: Any = event_pb2


def events(file):
    """All events of a file: records of length, its checksum, data, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(PROTO.Event.FromString(data[12 : 12 + size]))
        data = data[12 + size + 4 :]
    return found


def shown(folder):
    """What TensorBoard shows, by tag and step: a start makes it forget the steps from there on."""
    files = sorted((folder / "tensorboard").iterdir())
    points = []
    for event in (event for file in files for event in events(file)):
        if event.session_log.status == 1:
            points = [point for point in points if point[1] < event.step]
        points += [(value.tag, event.step, value) for value in event.summary.value]
    assert len({point[:2] for point in points}) == len(points), "a point is shown twice"
    return {(tag, step): value for tag, step, value in points}


def open_metrics(folder, total=100, width=200):
    file = io.StringIO()
    return Metrics(folder, Console(file=file, width=width), total), file


def test_numbers_are_read_back_from_tensorboard_files(tmp_path):
    metrics, _ = open_metrics(tmp_path)
    with metrics:
        for step in (10, 20):
            metrics.log(step, {**NUMBERS, "model/loss": step / 7}, 3.5)
    points = shown(tmp_path)
    assert points["model/loss", 20].simple_value == pytest.approx(20 / 7)
    assert points["model/learning_rate", 10].simple_value == pytest.approx(1e-4)
    assert points["examples_per_second", 10].simple_value == 3.5
    assert len(points) == 8


def test_going_on_shows_no_step_twice(tmp_path):
    first, _ = open_metrics(tmp_path)
    second, _ = open_metrics(tmp_path)
    with first, second:  # the first is still open: it was killed
        for step in (10, 20, 30):
            first.log(step, NUMBERS, 1.0)
        second.begin(15)
        for step in (20, 30, 40):
            second.log(step, {"model/loss": float(step)}, 1.0)
    points = shown(tmp_path)
    losses = {step: value.simple_value for (tag, step), value in points.items() if tag == "model/loss"}
    assert losses == {10: pytest.approx(0.123456), 20: 20, 30: 30, 40: 40}


def test_a_line_a_log(tmp_path, monkeypatch):
    clock = iter([1000.0, 1030.0])
    monkeypatch.setattr("rfjax.training.metrics.time.monotonic", lambda: next(clock))
    metrics, out = open_metrics(tmp_path, total=5000)
    with metrics:
        metrics.log(1, NUMBERS, 0.0123456)
        metrics.log(51, {"generator/loss": 1.0, "critic/loss": 2e-7}, 1234.5)
    assert [" ".join(line.split()) for line in out.getvalue().splitlines()] == [
        "step 1 of 5000 | loss 0.1235 gradient_norm 12.5 learning_rate 0.0001 | 0.0123 examples/s",
        "step 51 of 5000 | generator: loss 1 | critic: loss 2e-07 | 1.23e+03 examples/s | 49 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99.0, "99 s"),
        (100.0, "2 min"),
        (3599.0, "1 h 00 min"),
        (11_100.0, "3 h 05 min"),
        (187_200.0, "2 d 04 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_video_is_a_file_and_a_moving_picture(tmp_path):
    colours = np.array([[200, 0, 0], [0, 0, 200], [0, 200, 0], [200, 200, 200]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 32, 640, 3))
    metrics, _ = open_metrics(tmp_path)
    with metrics:
        metrics.video(500, "sample-0", frames, 16)
    file = tmp_path / "samples" / "00000500-sample-0.mp4"
    assert np.abs(read_video(file).astype(int) - frames).max() < 12
    image = shown(tmp_path)["samples/sample-0", 500].image
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert picture.size == (320, 16)
        assert (image.width, image.height) == picture.size
        assert picture.info["duration"] == 120  # GIF counts hundredths of a second
        picture.seek(1)  # the second of two, the third frame
        with pytest.raises(EOFError):
            picture.seek(2)
        np.testing.assert_allclose(np.asarray(picture.convert("RGB"))[3, 3], (0, 200, 0), atol=12)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_costs_numbers_but_not_the_training(tmp_path, monkeypatch):
    metrics, out = open_metrics(tmp_path)
    opened = metrics._board._open

    with metrics:
        metrics.log(1, NUMBERS, 1.0)
        metrics._board.close()
        monkeypatch.setattr(metrics._board, "_open", lambda path: opened("/dev/full"))
        metrics.log(2, NUMBERS, 1.0)
        metrics.log(3, NUMBERS, 1.0)
        monkeypatch.setattr(metrics._board, "_open", opened)
        metrics.log(4, NUMBERS, 1.0)
        (tmp_path / "samples").rmdir()
        metrics.video(4, "sample", np.zeros((2, 16, 16, 3), np.uint8), 16)
    said = [line for line in out.getvalue().splitlines() if line.startswith("warning")]
    assert len(said) == 2
    assert said[0] == f"warning: cannot write to {tmp_path / 'tensorboard'}: No space left on device; training goes on"
    assert "sample.mp4" in said[1]


def test_missing_tensorboardx_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
    with pytest.raises(UserError, match=r"needs tensorboardX.*rfjax\[train\]"):
        open_metrics(tmp_path)
