"""Slow, obvious transcriptions of the policies' rules, kept apart from the code that they check.

Each follows one sample of a video: lists of Python numbers, everything stored, no slots.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Attended:
    """What one chunk attends to: (frame, position) pairs in time order, and what was chosen by score."""

    pairs: list[tuple[int, int]]
    selected: list[int]
    candidates: list[int]
    scores: list[float]


def contiguous(frames: list[int]) -> list[tuple[int, int]]:
    return [(frame, i - len(frames)) for i, frame in enumerate(frames)]


def window(start: int, chunk: int, frames: int | None, sink: int) -> list[tuple[int, int]]:
    """Self-Forcing: the sink and as many of the last frames as fit beside the own chunk, at true positions."""
    past = list(range(start))
    room = len(past) if frames is None else frames - chunk - sink
    kept = past[:sink] + (past[sink:][-room:] if room else [])
    return [(frame, frame - start) for frame in kept]


def attention_sink(start: int, sink: int, tail: int) -> list[tuple[int, int]]:
    """First and last frames, closed up."""
    past = list(range(start))
    return contiguous(past[:sink] + (past[sink:][-tail:] if tail else []))


def relax(keys: dict[int, np.ndarray], start: int, chunk: int, settings: dict) -> Attended:
    """Relax Forcing with its whole reservoir; `keys` holds the first layer's [T, heads, head_dim] of every frame."""
    sink, tail, history = settings["sink_frames"], settings["tail_frames"], settings["history_frames"]
    local = min(start, settings["reservoir_frames"] - chunk)
    reservoir = list(range(sink)) + list(range(start - local + sink, start)) if start > local else list(range(start))
    if start <= sink + 1 + tail:
        return Attended([(frame, frame - start) for frame in reservoir], [], [], [])
    middle = reservoir[sink : len(reservoir) - tail]
    half = len(middle) // 2
    count = min(settings["history_candidates"], len(middle) - half)
    if count == 1:
        places = [half]
    else:
        steps = [half + (len(middle) - 1 - half) * i / count for i in range(count + 1)]
        places = sorted({int(step + 1e-6) for step in steps})[:-1]
    candidates = [middle[place] for place in places]

    def prototype(frames):
        mean = np.mean([keys[frame].astype(np.float64).mean(axis=(0, 1)) for frame in frames], axis=0)
        return mean / np.linalg.norm(mean)

    first, last = prototype(range(sink)), prototype(range(start - tail, start))
    weight = settings["redundancy_weight"]
    scores = [float(prototype([c]) @ first - weight * (prototype([c]) @ last)) for c in candidates]
    best = sorted(range(len(candidates)), key=lambda i: -scores[i])[:history]
    selected = sorted(candidates[i] for i in best)
    tail_part = list(range(start - tail, start))
    if settings["positions"] == "hybrid":
        pairs = contiguous(list(range(sink)) + selected + tail_part)
    else:
        pairs = [(frame, frame - start) for frame in [*range(sink), *selected, *tail_part]]
    return Attended(pairs, selected, candidates, scores)
