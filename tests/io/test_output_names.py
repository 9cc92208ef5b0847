"""File names made of prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfjax.io.names import output_name, video_name


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "In a still frame, a stop sign.",
        "it's 5 o'clock: now?",
        "猫が雪の中を走る",
        "émoji 🦊",
        "a",
        "and then...",
    ],
)
def test_prompt_is_kept_verbatim_for_vbench(prompt):
    assert video_name(prompt, 3) == f"{prompt}-3.mp4"


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("black/white", "black-white~"),
        ("../../etc/passwd", "-.-..-etc-passwd~"),
        ("a\\b", "a-b~"),
        ("tab\there", "tab-here~"),
        ("nul\0byte", "nul-byte~"),
        (".hidden", "-hidden~"),
        ("..", "-.~"),
        ("/", "-~"),
    ],
)
def test_what_a_file_name_cannot_hold_is_replaced(prompt, start):
    assert video_name(prompt, 0).startswith(start)
    assert video_name(prompt, 0) == video_name(prompt, 0)


def test_changed_prompts_do_not_collide():
    assert video_name("a/b", 0) != video_name("a-b", 0) != video_name("a\\b", 0) != video_name("a/b", 0)


def test_longest_name_that_fits_is_kept():
    fits = "x" * (240 - len("-0.mp4"))
    assert video_name(fits, 0) == f"{fits}-0.mp4"
    assert "~" in video_name(fits, 10)


def test_long_prompts_are_cut_between_characters_and_do_not_collide():
    long = "雪" * 200
    one, other = video_name(long + "a", 0), video_name(long + "b", 0)
    assert one != other
    for name in (one, other, output_name(long, 12, ".timeline.png")):
        assert 235 <= len(name.encode()) <= 240
    assert one.startswith("雪" * 60)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0, 10**6))
def test_any_prompt_makes_a_safe_name(prompt, sample):
    name = video_name(prompt, sample)
    assert len(name.encode()) <= 240
    assert not name.startswith(".")
    assert name.endswith(f"-{sample}.mp4")
    assert not any(character in "/\\" or ord(character) < 32 for character in name)
