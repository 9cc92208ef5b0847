"""Folders of links for VBench."""

import os

import pytest

from rfjax.errors import UserError
from rfjax.io import vbench
from rfjax.io.vbench import link_videos


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return [folder / f"{name}.mp4" for name in files]


@pytest.mark.parametrize("links", [True, False])
def test_the_folder_has_the_videos_and_nothing_else(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(vbench.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    videos = write(tmp_path / "made", one=b"1", two=b"2")
    (tmp_path / "made" / "metadata.json").write_text("{}")
    for _ in range(2):
        link_videos(tmp_path / "vbench" / "relax", videos)
    made = sorted((tmp_path / "vbench" / "relax").iterdir())
    assert [path.name for path in made] == ["one.mp4", "two.mp4"]
    assert [path.read_bytes() for path in made] == [b"1", b"2"]
    assert os.path.samefile(made[0], videos[0]) == links


def test_a_video_made_anew_replaces_its_link_and_its_clips(tmp_path):
    videos = write(tmp_path / "made", one=b"1", two=b"2")
    folder = tmp_path / "vbench"
    link_videos(folder, videos)
    for stem in ("one", "two"):
        (folder / "split_clip" / stem).mkdir(parents=True)
    videos[0].unlink()
    videos[0].write_bytes(b"another")
    link_videos(folder, videos[:1])
    assert {path.name for path in folder.iterdir()} == {"one.mp4", "split_clip"}
    assert (folder / "one.mp4").read_bytes() == b"another"
    assert not (folder / "split_clip" / "one").exists()
    assert not (folder / "split_clip" / "two").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot link the videos in .*file/vbench: Not a directory"):
        link_videos(tmp_path / "file" / "vbench", [])
