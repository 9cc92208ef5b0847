"""Prompts in files: a prompt a line, or a JSON object a line where each has settings of its own."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rfjax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how long its videos are; a length that is None is that of the command line."""

    prompt: str
    seconds: float | None = None
    latent_frames: int | None = None


def read_requests(path: Path) -> list[Request]:
    """Return a file's prompts; in a `.jsonl` file each line is `{"prompt": TEXT, "seconds": S}`.

    In place of `seconds` there may be `latent_frames`, or neither.

    Raises:
        UserError: the file is missing, not UTF-8 or empty, or a line is wrong.
    """
    if path.suffix != ".jsonl":
        return [Request(prompt) for prompt in read_prompt_file(path)]
    return [_request(f"line {number} of the prompt file {path}", line) for number, line in _lines(path)]


def _request(where: str, line: str) -> Request:
    known = [field.name for field in dataclasses.fields(Request)]
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{where} is {line}; an object such as {{"prompt": "a cat", "seconds": 30}} is needed')
    for name in values:
        if name not in known:
            raise UserError(f"{where} has {name!r}; it may have: {', '.join(known)}{nearest(name, known)}")
    prompt, seconds, frames = values["prompt"].strip(), values.get("seconds"), values.get("latent_frames")
    if not has_word(prompt):
        raise UserError(f"{where}: prompt is {prompt!r}; it needs at least one word")
    if seconds is not None and frames is not None:
        raise UserError(f"{where} has both seconds and latent_frames; one of them is needed")
    if seconds is not None and (type(seconds) not in (int, float) or not (math.isfinite(seconds) and seconds > 0)):
        raise UserError(f"{where}: seconds is {seconds!r}; a positive number is needed")
    if frames is not None and (type(frames) is not int or frames < 1):
        raise UserError(f"{where}: latent_frames is {frames!r}; a whole number of at least 1 is needed")
    return Request(prompt, None if seconds is None else float(seconds), frames)


def read_prompt_file(path: Path) -> list[str]:
    """Return a file's prompts without the white space around them; empty lines are left out.

    Raises:
        UserError: the file is missing, not UTF-8 or empty, or a line has no word.
    """
    prompts = _lines(path)
    for number, prompt in prompts:
        if not has_word(prompt):
            raise UserError(f"line {number} of the prompt file {path} is {prompt!r}; it needs at least one word")
    return [prompt for _, prompt in prompts]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers and without the white space around them."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"the prompt file {path} holds no prompt; write one a line")
    return lines


def has_word(prompt: str) -> bool:
    """Whether anything is left of a prompt when the tokenizer has cleaned it."""
    from rfjax.models.tokenizer import clean_prompt  # imports JAX

    return bool(clean_prompt(prompt))
