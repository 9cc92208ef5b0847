"""Slow, obvious transcription of Context Forcing's Slow-Fast memory: one layer of one sample.

Source: TIGER-AI-Lab/Context-Forcing, `wan/modules/causal_model.py` at 1b94149 (branch `rope_length > 0`) and
`configs/context_dmd_inference.yaml` at a3cdeb6, in the form that the project's spec gives it: the decision is taken and
the frame stored on the clean pass, and until all slots are filled every frame is attended in order.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Entry:
    """One attended frame; the position is counted from the own chunk's first frame."""

    frame: int
    position: int
    key: np.ndarray
    value: np.ndarray


class SlowFast:
    """Sink | Slow | Fast, in slot order; `fast` counts the own chunk too.

    threshold: consolidate where the cosine to the chunk before is smaller.
    every: only chunks whose number (start / chunk) is a multiple of this may be consolidated.
    uniform: consolidate every such chunk, without asking for the cosine.
    bounded: positions are slot numbers; else true frame indices.
    """

    def __init__(
        self,
        chunk: int = 3,
        sink: int = 3,
        slow: int = 12,
        fast: int = 6,
        threshold: float = 0.95,
        every: int = 1,
        uniform: bool = False,
        bounded: bool = True,
    ):
        self.chunk, self.sink, self.slow, self.fast = chunk, sink, slow, fast
        self.threshold, self.every, self.uniform, self.bounded = threshold, every, uniform, bounded
        self.keys: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}
        self.means: dict[int, np.ndarray] = {}
        self.cosines: dict[int, float] = {}
        self.consolidated: list[int] = []

    def frames(self, start: int) -> list[int]:
        """Which frame lies in each slot before the own chunk's; some may be there twice."""
        if start + self.chunk <= self.sink + self.slow + self.fast:
            return list(range(start))
        slow_slots = list(range(self.sink, self.sink + self.slow))
        newest = self.consolidated[-self.slow :] if self.slow else []
        slow_slots[: len(newest)] = newest
        past = self.fast - self.chunk
        return list(range(self.sink)) + slow_slots + list(range(start - past, start))

    def attended(self, start: int) -> list[Entry]:
        frames = self.frames(start)
        if self.bounded:
            positions = [slot - len(frames) for slot in range(len(frames))]
        else:
            positions = [frame - start for frame in frames]
        return [Entry(f, p, self.keys[f], self.values[f]) for f, p in zip(frames, positions, strict=True)]

    def commit(self, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        for i in range(self.chunk):
            self.keys[start + i], self.values[start + i] = keys[i], values[i]
        mean = keys.astype(np.float64).mean(axis=(0, 1))
        self.means[start] = mean
        if start < self.fast:
            return
        before = self.means[start - self.chunk]
        self.cosines[start] = float(mean @ before / (np.linalg.norm(mean) * np.linalg.norm(before)))
        if (start // self.chunk) % self.every:
            return
        if self.uniform or self.cosines[start] < self.threshold:
            self.consolidated.append(start)
