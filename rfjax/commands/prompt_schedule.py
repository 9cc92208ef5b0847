"""`--prompt-schedule FILE`: prompts that change in the middle of a video."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rfjax.errors import UserError, nearest
from rfjax.io.prompts import has_word

LATEST = 1e7
"""Seconds that a video cannot reach."""


@dataclasses.dataclass(frozen=True)
class ScheduledPrompt:
    """One entry of a schedule."""

    at: float
    """Second of the video from which the prompt holds."""
    prompt: str
    cut: bool = False
    """Whether a new scene begins, rather than the same one going on."""


def read_schedule(path: Path) -> list[ScheduledPrompt]:
    """Read a schedule: a YAML list of entries `{at: SECOND, prompt: TEXT, cut: BOOL}`, the first at 0.

    Raises:
        UserError: the file is missing or not such a list, an entry is incomplete, or time goes backwards.
    """
    entries = _read_list(path)
    schedule = [_entry(f"{path}: entry {number}", entry) for number, entry in enumerate(entries, 1)]
    if schedule[0].at != 0:
        raise UserError(f"{path}: entry 1 is at {schedule[0].at:g} s; the first prompt begins at 0")
    if schedule[0].cut:
        raise UserError(f"{path}: entry 1 has cut; there is no scene before it")
    for number, (before, entry) in enumerate(itertools.pairwise(schedule), 2):
        if entry.at <= before.at:
            raise UserError(
                f"{path}: entry {number} is at {entry.at:g} s, which does not come after entry {number - 1} at "
                f"{before.at:g} s"
            )
    return schedule


def _read_list(path: Path) -> list[Any]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the prompt schedule {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"the prompt schedule {path} is not valid YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"the prompt schedule {path} holds no list; write entries such as '- {{at: 0, prompt: a fox}}'")
    return entries


def _entry(where: str, entry: Any) -> ScheduledPrompt:
    known = [field.name for field in dataclasses.fields(ScheduledPrompt)]
    if not isinstance(entry, dict) or not {"at", "prompt"} <= entry.keys():
        raise UserError(f"{where} is {entry!r}; a mapping with at and prompt is needed")
    for key in entry:
        if key not in known:
            raise UserError(f"{where} has {key!r}; it may have: {', '.join(known)}{nearest(str(key), known)}")
    at, prompt, cut = entry["at"], entry["prompt"], entry.get("cut", False)
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < LATEST:
        raise UserError(f"{where}: at is {at!r}; seconds of at least 0 and less than {LATEST:g} are needed")
    if not isinstance(prompt, str):
        raise UserError(
            f"{where}: prompt is {prompt!r}; text is needed, in quotes where YAML takes it for something else"
        )
    if not has_word(prompt):
        raise UserError(f"{where}: prompt is {prompt!r}; it needs at least one word")
    if not isinstance(cut, bool):
        raise UserError(f"{where}: cut is {cut!r}; true or false is needed")
    return ScheduledPrompt(float(at), prompt.strip(), cut)


def switch_frames(
    schedule: Sequence[ScheduledPrompt], path: Path, chunk: int, factor: int, fps: int, latent_frames: int
) -> dict[int, ScheduledPrompt]:
    """Return the prompts but the first by the latent frame from which each holds.

    That is the first frame of the first chunk that begins at the prompt's second or later.

    Args:
        schedule: from `read_schedule`.
        path: of the file, for messages.
        chunk: latent frames a chunk.
        factor: video frames of every latent frame but the first, which is a single one.
        fps: video frames a second.
        latent_frames: of the whole video.

    Raises:
        UserError: a prompt would begin after the end of the video, or in the same chunk as the one before.
    """
    starts: dict[int, ScheduledPrompt] = {}
    for number, entry in enumerate(schedule[1:], 2):
        first = max(0, math.ceil(round(entry.at * fps, 6)) - 1) / factor + 1  # latent frame of that video frame
        start = max(1, math.ceil(first / chunk)) * chunk
        if start >= latent_frames:
            seconds = (1 + factor * (latent_frames - 1)) / fps
            raise UserError(
                f"{path}: entry {number} is at {entry.at:g} s, later than the last chunk of the {seconds:.4g} s begins"
            )
        if start in starts:
            raise UserError(
                f"{path}: entries {number - 1} and {number} (at {schedule[number - 2].at:g} and {entry.at:g} s) fall "
                f"into the same chunk; a chunk lasts {chunk * factor / fps:g} s"
            )
        starts[start] = entry
    return starts
