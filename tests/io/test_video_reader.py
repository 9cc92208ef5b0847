"""Reading a video a frame at a time."""

import struct

import av
import numpy as np
import pytest

from rfjax.errors import UserError
from rfjax.io.video import VideoWriter, read_video
from rfjax.io.video_reader import read_frames


@pytest.fixture
def path(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    with VideoWriter(tmp_path / "a.mp4", 32, 48, fps=24) as writer:
        writer.write(video)
    return tmp_path / "a.mp4"


def test_frames_are_those_of_the_whole_video_every_time(path):
    frames = read_frames(path)
    assert (frames.fps, frames.announced) == (24, 30)
    for _ in range(2):
        np.testing.assert_array_equal(np.stack(list(frames)), read_video(path))


UPRIGHT, QUARTER = (1, 0, 0, 1), (0, -1, 1, 0)
"""How a track's header says that its picture is to be shown as it is, or turned to the left."""


def matrix(a: int, b: int, c: int, d: int) -> bytes:
    """In fixed point: 16.16, the last column 2.30."""
    return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


def test_a_video_filmed_lying_down_is_shown_upright(path):
    content = path.read_bytes()
    header = content.index(b"tkhd")
    place = content.index(matrix(*UPRIGHT), header)
    frames = list(read_frames(path))
    path.write_bytes(content[:place] + matrix(*QUARTER) + content[place + 36 :])
    turned = list(read_frames(path))
    assert turned[0].shape == (48, 32, 3)
    np.testing.assert_array_equal(np.stack(turned), [np.rot90(frame) for frame in frames])


def test_first_frame_comes_before_the_last_is_decoded(path):
    frames = iter(read_frames(path))
    assert next(frames).shape == (32, 48, 3)
    path.write_bytes(b"")
    assert next(frames).shape == (32, 48, 3)


@pytest.mark.parametrize("content", [None, b"", b"no video at all"])
def test_what_is_no_video_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the video .*a\.mp4: "):
        read_frames(tmp_path / "a.mp4")


def test_sound_without_pictures_is_a_user_error(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match=r"a\.wav holds no video stream"):
        read_frames(tmp_path / "a.wav")


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_video_cut_short_is_a_user_error(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"a\.mp4( is damaged: \d+ of its 30 frames|: )"):
        list(read_frames(path))


def test_damage_gives_all_frames_or_a_user_error(path):
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    outcomes, messages = set(), set()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole) if generator.random() < 0.3 else 3000)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            outcomes.add(len(list(read_frames(path))))
        except UserError as error:
            messages.add(str(error))
    assert 30 in outcomes
    assert len(messages) > 1
    assert all("a.mp4" in message for message in messages)


def test_a_title_need_not_be_utf8(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Zuerich"
        stream = container.add_stream("mpeg4", rate=24, width=48, height=32)
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert b"Zuerich" in content
    path.write_bytes(content.replace(b"Zuerich", b"Z\xfcrich "))
    assert len(list(read_frames(path))) == 1
