"""Lengths and sizes asked for on the command line."""

import pytest

from rfjax.commands.plan import latent_frames
from rfjax.errors import UserError


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [
        (0.001, 16, 3),
        (9 / 16, 16, 3),  # 1 + 4 * 2 frames exactly
        (9.5 / 16, 16, 6),
        (5, 16, 21),  # 81 frames
        (5.0625, 16, 21),
        (5.1, 16, 24),
        (10, 16, 42),
        (30, 16, 123),  # 120 latent frames would be 29.8 s
        (10, 8, 21),
    ],
)
def test_seconds_become_the_fewest_whole_chunks_that_last_as_long(seconds, fps, expected):
    frames = latent_frames(3, 4, float(seconds), None, fps)
    assert frames == expected
    assert (1 + 4 * (frames - 1)) / fps >= seconds > (1 + 4 * (frames - 4)) / fps


def test_latent_frames_are_taken_as_given():
    assert latent_frames(3, 4, None, 240, 16) == 240
    with pytest.raises(UserError, match=r"--latent-frames is 2; it must be a multiple of the chunk's 3, such as 3$"):
        latent_frames(3, 4, None, 2, 16)
