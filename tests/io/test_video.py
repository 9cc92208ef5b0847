"""The streaming MP4 writer."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.codec.codec import UnknownCodecError

from rfjax.errors import UserError
from rfjax.io.video import VideoWriter, read_video


def moving_gradient(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([4 * x + t, 6 * y, 128 + 0 * x], axis=-1).clip(0, 255).astype(np.uint8)


def test_batches_come_back_in_order_and_in_colour(tmp_path):
    video = moving_gradient(13)
    with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(video[:1])
        writer.write(video[1:5])
        writer.write(video[5:])
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - video).mean() < 3
    assert writer.frames == 13


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_pure_colours_survive(tmp_path, colour):
    with VideoWriter(tmp_path / "a.mp4", 16, 16) as writer:
        writer.write(np.full((3, 16, 16, 3), colour, np.uint8))
    assert np.abs(read_video(tmp_path / "a.mp4").astype(int) - colour).max() <= 3


def test_stream_is_what_players_and_vbench_expect(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 32, 48, fps=24) as writer:
        writer.write(moving_gradient(5))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 24
        assert stream.frames == 5
        assert stream.codec_context.colorspace == 6  # SMPTE 170M, which is BT.601


def test_final_name_appears_only_at_close(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 32, 48)
    writer.write(moving_gradient(60))
    assert [path.name.startswith(".") for path in tmp_path.iterdir()] == [True]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_existing_video_stays_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    writer = VideoWriter(tmp_path / "a.mp4", 32, 48)
    writer.write(moving_gradient(3))
    assert (tmp_path / "a.mp4").read_text() == "old"
    writer.close()
    assert len(read_video(tmp_path / "a.mp4")) == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_an_aborted_video(tmp_path, error):
    def fail_halfway():
        with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
            writer.write(moving_gradient(40))
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="MALLOC_PERTURB_ belongs to glibc")
def test_same_frames_make_the_same_file_whatever_memory_held_before(tmp_path):
    np.save(
        tmp_path / "frames.npy",
        moving_gradient(21) + np.random.default_rng(0).integers(0, 9, (21, 32, 48, 3), np.uint8),
    )
    code = (
        "import sys, numpy as np\nfrom rfjax.io.video import VideoWriter\n"
        "with VideoWriter(sys.argv[2], 32, 48) as writer: writer.write(np.load(sys.argv[1]))"
    )
    for filler in ("1", "170"):
        command = [sys.executable, "-c", code, str(tmp_path / "frames.npy"), str(tmp_path / f"{filler}.mp4")]
        subprocess.run(command, check=True, env={**os.environ, "MALLOC_PERTURB_": filler})
    assert (tmp_path / "1.mp4").read_bytes() == (tmp_path / "170.mp4").read_bytes()


def test_abort_after_close_keeps_the_video(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 32, 48)
    writer.write(moving_gradient(3))
    writer.close()
    writer.abort()
    assert len(read_video(tmp_path / "a.mp4")) == 3


def test_name_of_255_bytes_can_be_written(tmp_path):
    path = tmp_path / ("é" * 125 + "a.mp4")
    with VideoWriter(path, 16, 16) as writer:
        writer.write(moving_gradient(1, 16, 16))
    assert path.is_file()


def test_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere/a\.mp4: No such file"):
        VideoWriter(tmp_path / "nowhere" / "a.mp4", 32, 48)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UnknownCodecError("libx264")])
def test_video_that_cannot_be_begun_is_a_user_error_and_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(av, "open", lambda *_, **__: SimpleNamespace(add_stream=fail))
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4: (No space left|libx264)"):
        VideoWriter(tmp_path / "a.mp4", 32, 48)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_user_error_and_leaves_nothing(tmp_path, monkeypatch):
    writer = VideoWriter(tmp_path / "a.mp4", 32, 48)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_stream", SimpleNamespace(encode=full))
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(moving_gradient(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"no video at all"])
def test_what_is_no_video_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the video"):
        read_video(tmp_path / "a.mp4")
