"""Schedules of prompts as they are written in a file."""

from pathlib import Path

import pytest

from rfjax.commands.prompt_schedule import ScheduledPrompt, read_schedule, switch_frames
from rfjax.errors import UserError


def written(tmp_path, text):
    path = tmp_path / "schedule.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_entries_are_read(tmp_path):
    path = written(tmp_path, "- {at: 0, prompt: a fox}\n- at: 10.5\n  prompt: ' a bear '\n  cut: true\n")
    assert read_schedule(path) == [ScheduledPrompt(0.0, "a fox"), ScheduledPrompt(10.5, "a bear", True)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{at: 0, prompt: a}", "holds no list; write entries such as"),
        ("[]", "holds no list"),
        ("- {at: 0}", r"entry 1 is {'at': 0}; a mapping with at and prompt is needed"),
        ("- a fox", "entry 1 is 'a fox'; a mapping"),
        ("- {at: 0, prompt: a, cu: true}", "entry 1 has 'cu'; it may have: at, prompt, cut; did you mean 'cut'"),
        ("- {at: five, prompt: a}", "entry 1: at is 'five'; seconds of at least 0"),
        ("- {at: .nan, prompt: a}", "entry 1: at is nan"),
        ("- {at: true, prompt: a}", "entry 1: at is True"),
        ("- {at: 0, prompt: ' '}", "entry 1: prompt is ' '; it needs at least one word"),
        ("- {at: 0, prompt: yes}", "entry 1: prompt is True; text is needed, in quotes"),
        ("- {at: 0, prompt: 2024-13-01}", "is not valid YAML: month must be in 1..12"),
        ("- {at: 1.0e+308, prompt: a}", r"entry 1: at is 1e\+308; seconds of at least 0 and less than 1e\+07"),
        ("- {at: 0, prompt: a, cut: 1}", "entry 1: cut is 1; true or false"),
        ("- {at: 2, prompt: a}", "entry 1 is at 2 s; the first prompt begins at 0"),
        ("- {at: 0, prompt: a, cut: true}", "entry 1 has cut; there is no scene before it"),
        (
            "- {at: 0, prompt: a}\n- {at: 9, prompt: b}\n- {at: 5, prompt: c}",
            "entry 3 is at 5 s, which does not come after entry 2 at 9 s",
        ),
        ("- {at: 0, prompt: a}\n- {at: 0, prompt: b}", "entry 2 is at 0 s, which does not come after entry 1"),
        ("- {at: 0, prompt: a", "is not valid YAML"),
    ],
)
def test_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_schedule(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the prompt schedule"):
        read_schedule(tmp_path / "none.yaml")


def starts(*seconds, latent_frames=60, fps=16):
    schedule = [ScheduledPrompt(float(at), "a") for at in (0, *seconds)]
    return list(switch_frames(schedule, Path("s.yaml"), 3, 4, fps, latent_frames))


def test_a_prompt_begins_with_the_first_chunk_at_or_after_its_second():
    for tenth in range(1, 100):
        at = tenth / 10
        (start,) = starts(at)
        assert (1 + 4 * (start - 1)) / 16 >= at > (1 + 4 * (start - 4)) / 16
    assert starts(9 / 16) == [3]  # the second chunk begins with video frame 9
    assert starts(0.001, 5) == [3, 21]
    assert starts(5, fps=8) == [12]


def test_prompts_that_find_no_chunk():
    with pytest.raises(UserError, match=r"entry 2 is at 15 s, later than the last chunk of the 14\.81 s begins"):
        starts(15)
    with pytest.raises(
        UserError, match=r"entries 2 and 3 \(at 5 and 5\.05 s\) fall into the same chunk; a chunk lasts 0\.75"
    ):
        starts(5, 5.05)
