"""Prompt files in which every prompt has a length of its own."""

import pytest

from rfjax.errors import UserError
from rfjax.io.prompts import Request, read_requests


def test_lines_are_prompts_and_objects_have_lengths(tmp_path):
    (tmp_path / "a.txt").write_text(' a cat \n\n{"prompt": "a"}\n')
    assert read_requests(tmp_path / "a.txt") == [Request("a cat"), Request('{"prompt": "a"}')]
    lines = ['{"prompt": " a cat ", "seconds": 30}', "", '{"prompt": "a dog", "latent_frames": 21}', '{"prompt": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_requests(tmp_path / "a.jsonl") == [Request("a cat", 30.0), Request("a dog", None, 21), Request("b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", "line 2 of the prompt file .*a.jsonl is not JSON"),
        ("3", "line 2 of the prompt file .*a.jsonl is 3; an object such as"),
        ('{"seconds": 3}', "an object such as"),
        ('{"prompt": "a", "second": 3}', "has 'second'; it may have: prompt, seconds, latent_frames; did you mean"),
        ('{"prompt": "&nbsp;"}', "prompt is '&nbsp;'; it needs at least one word"),
        ('{"prompt": "a", "seconds": -1}', "seconds is -1; a positive number is needed"),
        ('{"prompt": "a", "seconds": NaN}', "seconds is nan; a positive number is needed"),
        ('{"prompt": "a", "seconds": true}', "seconds is True; a positive number is needed"),
        ('{"prompt": "a", "latent_frames": 1.5}', "latent_frames is 1.5; a whole number"),
        ('{"prompt": "a", "latent_frames": 3, "seconds": 1}', "has both seconds and latent_frames"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_requests(tmp_path / "a.jsonl")
