"""Slow, obvious transcriptions of the two policies with prompt switches: LongLive v1 and Infinity-RoPE.

Written from the public code: NVlabs/LongLive, branch v1.0 at e52d9ef (pipeline/interactive_causal_inference.py,
wan/modules/causal_model.py, causal_model_infinity.py) and yesiltepe-hidir/infinity-rope at 63d7b84
(pipeline/causal_inference.py, wan/modules/causal_model.py, inference.py). No line of it is copied.

Frames are latent frames; `start` is the first frame of the chunk being generated. A policy returns the
(frame, position) pairs that the chunk attends to beside itself, in time order, positions counted from the
chunk's own first frame. The same pairs serve the denoising passes and the clean pass.
"""

import dataclasses
import math
import re


def longlive_switch_starts(indices: list[int], total: int, chunk: int = 3) -> list[int]:
    """The chunk starts at which the prompts change: the first at or after each index, at most one change a chunk."""
    starts = []
    waiting = list(indices)
    for start in range(0, total, chunk):
        if waiting and start >= waiting[0]:
            waiting.pop(0)
            starts.append(start)
    return starts


def longlive_sink(
    start: int, sink: int = 3, window: int = 12, switches: tuple[int, ...] = (), global_sink: bool = True
) -> list[int]:
    """The frames in the sink slots while the chunk at `start` is made; `switches` are chunk starts."""
    frames = list(range(sink))
    for switch in sorted(switches):
        if switch <= start and switch > window and not global_sink:
            frames = list(range(switch - window, switch - window + sink))
    return [frame for frame in frames if frame < start]


def longlive(
    start: int,
    chunk: int,
    sink: int = 3,
    window: int = 12,
    switches: tuple[int, ...] = (),
    global_sink: bool = True,
    contiguous: bool = False,
) -> list[tuple[int, int]]:
    """Sink and last frames; `window` counts sink, past and own chunk. `contiguous` is the code's infinite attention."""
    first = longlive_sink(start, sink, window, switches, global_sink)
    room = window - sink - chunk
    last = [frame for frame in range(start - room, start) if frame >= sink]
    frames = first + last
    if contiguous:
        return [(frame, i - len(frames)) for i, frame in enumerate(frames)]
    return [(frame, frame - start) for frame in frames]


@dataclasses.dataclass
class Recache:
    """The one extra pass of LongLive before the first chunk under a new prompt."""

    passed: list[int]  # latents given to the network, clean, at timestep 0
    attended: list[tuple[int, int]]  # (frame, position): keys that every passed frame attends to, no mask
    positions: dict[int, int]  # query (and new key) position of each passed frame, same origin as `attended`
    rewritten: list[int]  # frames whose keys and values are new, under the new prompt
    kept: list[int]  # frames whose keys and values stay as stored, under the old prompt
    stored: list[int]  # what the slots hold afterwards, in slot order


def longlive_recache(
    switch: int, sink: int = 3, window: int = 12, global_sink: bool = True, contiguous: bool = False
) -> Recache | None:
    """What happens at chunk start `switch`, before the chunk's first denoising pass. None: only new text keys."""
    if switch == 0:
        return None
    passed = list(range(max(0, switch - window), switch))
    if global_sink and switch > window:
        kept = list(range(sink))
        rewritten = passed[sink:]
    else:
        kept = []
        rewritten = passed
    stored = kept + rewritten
    if contiguous:
        place = {frame: i for i, frame in enumerate(passed)}
        attended = [(frame, i) for i, frame in enumerate(stored)]
    else:
        place = {frame: frame for frame in passed}
        attended = [(frame, frame) for frame in stored]
    return Recache(passed, attended, place, rewritten, kept, stored)


def infinity_rope(
    start: int,
    chunk: int,
    switches: tuple[int, ...] = (),
    cuts: tuple[int, ...] = (),
    sink: int = 1,
    tail: int = 2,
    cut_position: int = 45,
) -> list[tuple[int, int]]:
    """Sink and tail closed up before the chunk; a cut moves the chunk alone to `cut_position`, for that chunk only.

    Slots are numbered from 0. `switches` (KV flush) change nothing here: the flush keeps the same frames that the
    window keeps in any case. (The code's flush at start == chunk would put two never-written slots in place of
    frames 1 and 2; not followed.)
    """
    assert all(cut in switches for cut in cuts)
    frames = [frame for frame in range(start) if frame < sink or frame >= start - tail]
    own = cut_position if start in cuts else len(frames)
    return [(frame, slot - own) for slot, frame in enumerate(frames)]


@dataclasses.dataclass
class Schedule:
    prompts: list[str]
    switches: list[int]  # first frames of the 2nd, 3rd, ... prompt
    cuts: list[int]  # those of them that are scene cuts
    total: int | None  # latent frames; None where some segment has no duration (then it is given by hand)


def infinity_rope_schedule(line: str, chunk: int = 3, fps: int = 16, default_chunks: int = 14) -> Schedule:
    """A line of the prompt file: "first[5s] | second[10s#] | third[10s] ; subtitle | ...", as the code reads it.

    The '#' cuts at the END of its own segment (the README says at its beginning).
    """
    duration = re.compile(r"\[([0-9]+(?:\.[0-9]*)?)\s*s(?:\]|#\])")
    prompts, switches, cuts = [], [], []
    start, seconds = 0, 0.0
    timed = True
    parts = [part.strip() for part in line.split(";")[0].split("|")]
    for i, part in enumerate(parts):
        found = duration.search(part)
        if found:
            seconds += float(found.group(1))
            chunks = max(1, int(float(found.group(1)) * fps / (4 * chunk)))
            prompts.append(duration.sub("", part).strip())
        else:
            timed = False
            chunks = default_chunks
            prompts.append(part)
        start += chunks * chunk
        if i < len(parts) - 1:
            switches.append(start)
            if "#" in part:
                cuts.append(start)
    total = max(chunk, math.ceil(int(seconds * fps) // 4 / chunk) * chunk) if timed and seconds > 0 else None
    return Schedule(prompts, switches, cuts, total)
