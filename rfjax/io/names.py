"""File names made of prompts, in the form that VBench reads: `<prompt>-<sample>.mp4`."""

import hashlib
import re

_LIMIT = 240
"""Bytes of a file name: file systems allow 255, and VBench-Long appends to the name."""

_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029]")


def output_name(prompt: str, sample: int, suffix: str) -> str:
    """Return `<prompt>-<sample><suffix>`, the prompt verbatim wherever a file name can hold it.

    Path separators, control characters and a leading dot become `-` (at `_` VBench-Long would cut the name), and what
    exceeds 240 bytes of UTF-8 is cut. A prompt changed in one of these ways is followed by `~` and eight characters of
    its hash, so that two prompts never share a name.
    """
    return _fitted(prompt, f"-{sample}{suffix}")


def folder_name(text: str) -> str:
    """Return a text as the name of a folder, by the rules of `output_name`."""
    return _fitted(text, "")


def _fitted(text: str, ending: str) -> str:
    stem = re.sub(r"^\.", "-", _FORBIDDEN.sub("-", text))
    room = _LIMIT - len(ending.encode())
    if stem == text and len(stem.encode()) <= room:
        return stem + ending
    mark = "~" + hashlib.sha256(text.encode()).hexdigest()[:8]
    cut = stem.encode()[: room - len(mark)].decode(errors="ignore")
    return cut + mark + ending


def video_name(prompt: str, sample: int) -> str:
    """Return the file name of a video, as VBench expects it; see `output_name`."""
    return output_name(prompt, sample, ".mp4")
