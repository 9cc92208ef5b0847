"""The dataset of drawn clips: exact, the same again, whole or not at all, and without TensorFlow."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfjax.data.moving_shapes import MovingShapesConfig, build
from rfjax.data.reading import Dataset, check_crop, open_dataset
from rfjax.data.shapes import Scene, caption, held_out, render
from rfjax.errors import UserError


def small(**changes: Any) -> MovingShapesConfig:
    return MovingShapesConfig(**{"train": 1, "test": 1, "frames": 9, "height": 16, "width": 24, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    build(folder, small(train=5, test=3))
    return folder


def test_a_piece_larger_than_the_pictures_is_refused(folder):
    source = open_dataset(folder, "train")
    assert isinstance(source, Dataset)
    check_crop(source, (16, 24))
    with pytest.raises(UserError, match=r"data.crop is 16x32, but the clips of .*shapes are 16x24; ask for a smaller"):
        check_crop(source, (16, 32))


def test_every_clip_is_its_scene_drawn(folder):
    for split, count in (("train", 5), ("test", 3)):
        source = open_dataset(folder, split)
        assert len(source) == count
        for index in range(count):
            example = source[index]
            scene = Scene.from_json(example["scene"])
            assert held_out(scene) == (split == "test")
            assert example["caption"] == caption(scene)
            assert example["video"].dtype == np.uint8
            np.testing.assert_array_equal(example["video"], render(scene, 9, 16, 24))


def test_more_clips_leave_the_first_ones_as_they_are_and_another_seed_does_not(folder, tmp_path):
    build(tmp_path / "more", small(train=7, test=4))
    build(tmp_path / "other", small(train=5, test=3, seed=1))
    for split, count in (("train", 5), ("test", 3)):
        scenes = [
            [open_dataset(path, split)[index]["scene"] for index in range(count)]
            for path in (folder, tmp_path / "more", tmp_path / "other")
        ]
        assert scenes[0] == scenes[1]
        assert not set(scenes[0]) & set(scenes[2])


def test_building_says_nothing(tmp_path, capfd):
    build(tmp_path / "quiet", small())
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_holds_something_is_left_alone(folder):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="already holds files; the output must be a new or empty folder"):
        build(folder, small())
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 0}, "train of moving shapes is 0; it must be 1 or more"),
        ({"test": -1}, "test of moving shapes is -1; it must be 1 or more"),
        ({"frames": 0}, "frames of moving shapes is 0; it must be 1 or more"),
        ({"height": 8}, "height of moving shapes is 8; it must be 16 or more"),
        ({"width": 12}, "width of moving shapes is 12; it must be 16 or more"),
        ({"height": 32}, "width of moving shapes is 24; it must be the height, 32, or more"),
        ({"seed": -2}, "seed of moving shapes is -2; it must be 0 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path / "data", small(**changes))
    assert not list(tmp_path.iterdir())


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfjax.data.moving_shapes.render", fail)
    with pytest.raises(UserError, match=r"cannot write .*data: No space left on device"):
        build(tmp_path / "deep" / "data", small(train=2, test=1))
    assert not list(tmp_path.iterdir())


def test_a_killed_build_leaves_nothing_that_opens(tmp_path):
    program = (
        "from pathlib import Path; from rfjax.data.moving_shapes import *; import sys\n"
        "build(Path(sys.argv[1]), MovingShapesConfig(train=10**6, test=1, frames=9, height=16, width=24))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "data")])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.array_record*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        assert process.poll() is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    folders = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()]
    assert len(folders) > 1
    for path in [tmp_path / "data", *folders]:
        with pytest.raises(UserError):
            open_dataset(path, "train")
    build(tmp_path / "data", small())
    assert len(open_dataset(tmp_path / "data", "train")) == 1


ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from rfjax.data.moving_shapes import MovingShapesConfig, build
from rfjax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    build(Path(sys.argv[1]), MovingShapesConfig(train=20, test=1, frames=9, height=32, width=48))
except UserError as error:
    print(error)
"""


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path / "data")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"cannot write {tmp_path / 'data'}: File too large\n"
    assert not list(tmp_path.iterdir())


WITHOUT_TENSORFLOW = """
import importlib.util, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, *rest)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("tensorflow") is None
from pathlib import Path
from rfjax.data.moving_shapes import MovingShapesConfig, build
from rfjax.data.reading import batches, open_dataset
folder = Path(sys.argv[1])
build(folder, MovingShapesConfig(train=3, test=1, frames=5, height=16, width=24))
reader = batches(open_dataset(folder, "train"), batch_size=2, seed=0)
assert next(reader)["video"].shape == (2, 5, 16, 24, 3)
assert "tensorflow" not in sys.modules
"""


def test_building_and_reading_need_no_tensorflow(tmp_path):
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TENSORFLOW, str(tmp_path / "data")], check=True)
