"""Slow, obvious transcriptions of the three policies whose sink changes: Reward Forcing, MemRoPE and Rolling Sink.

Written from the public code, each for one sample and one layer, with every frame kept in a dict:

- Reward Forcing: JaydenLyh/Reward-Forcing at 4317f5a, wan/modules/causal_model.py
- MemRoPE: YoungRaeKimm/MemRoPE at b89bf5b, wan/modules/causal_model.py
- Rolling Sink: haodong2000/Rolling-Sink at 6eaed1e (the same rule in Rolling-Sink/Rolling-Sink at d7fc0d9), same path

Keys are those before the rotary embedding. Positions count from the own chunk's first frame.
"""

import dataclasses

import numpy as np

LONG = -1
SHORT = -2


@dataclasses.dataclass
class Entry:
    """One attended frame: which (LONG and SHORT for averages), where, and its [T, C] keys and values."""

    frame: int
    position: int
    key: np.ndarray
    value: np.ndarray


class RewardForcing:
    """Frame i of each evicted chunk fades into sink frame i; an entry of the sink is named by the frame it began as."""

    def __init__(self, chunk: int = 3, sink: int = 3, tail: int = 3, rate: float = 0.001):
        # With other sizes the public code overwrites the sink with whatever is evicted.
        assert sink == chunk
        assert tail % chunk == 0
        self.chunk, self.sink, self.tail, self.rate = chunk, sink, tail, rate
        self.keys: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}

    def attended(self, start: int) -> list[Entry]:
        frames = sorted(self.keys)
        return [Entry(f, i - len(frames), self.keys[f], self.values[f]) for i, f in enumerate(frames)]

    def commit(self, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        for i in range(self.chunk):
            self.keys[start + i] = keys[i].astype(np.float64)
            self.values[start + i] = values[i].astype(np.float64)
        after_sink = [frame for frame in sorted(self.keys) if frame >= self.sink]
        if len(after_sink) <= self.tail:
            return
        evicted = after_sink[: self.chunk]
        for i in range(self.sink):
            self.keys[i] = (1 - self.rate) * self.keys[i] + self.rate * self.keys[evicted[i]]
            self.values[i] = (1 - self.rate) * self.values[i] + self.rate * self.values[evicted[i]]
        for frame in evicted:
            del self.keys[frame], self.values[frame]


class MemRope:
    """First frames, two averages of everything evicted (one vector each, repeated over the tokens), last frames."""

    def __init__(
        self, chunk: int = 3, sink: int = 3, recent: int = 4, long_rate: float = 0.01, short_rate: float = 0.1
    ):
        self.chunk, self.sink, self.recent = chunk, sink, recent
        self.rates = {LONG: long_rate, SHORT: short_rate}
        self.keys: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}
        self.average_keys: dict[int, np.ndarray] = {}
        self.average_values: dict[int, np.ndarray] = {}

    def attended(self, start: int) -> list[Entry]:
        frames = sorted(self.keys)
        rows = [(frame, self.keys[frame], self.values[frame]) for frame in frames]
        if self.average_keys:
            averages = [(name, self.average_keys[name], self.average_values[name]) for name in (LONG, SHORT)]
            rows = rows[: self.sink] + averages + rows[self.sink :]
        return [Entry(frame, i - len(rows), key, value) for i, (frame, key, value) in enumerate(rows)]

    def commit(self, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        for i in range(self.chunk):
            self.keys[start + i] = keys[i].astype(np.float64)
            self.values[start + i] = values[i].astype(np.float64)
        if not self.average_keys:
            if len(self.keys) <= self.sink + 2 + self.recent:
                return
            # The averages take the places of the two frames after the sink, which are lost without being averaged.
            for frame in (self.sink, self.sink + 1):
                del self.keys[frame], self.values[frame]
        after_sink = [frame for frame in sorted(self.keys) if frame >= self.sink]
        evicted = after_sink[: len(after_sink) - self.recent]
        self.fold(self.average_keys, [self.keys[frame] for frame in evicted])
        self.fold(self.average_values, [self.values[frame] for frame in evicted])
        for frame in evicted:
            del self.keys[frame], self.values[frame]

    def fold(self, averages: dict[int, np.ndarray], evicted: list[np.ndarray]) -> None:
        tokens = evicted[0].shape[0]
        mean = np.concatenate(evicted, axis=0).mean(axis=0)  # over the frames and over their tokens: [C]
        for name, rate in self.rates.items():
            if name not in averages:
                averages[name] = np.tile(mean, (tokens, 1))
            else:
                averages[name] = (1 - rate) * averages[name] + rate * np.tile(mean, (tokens, 1))


def rolling_sink(start: int, chunk: int = 3, sink: int = 15) -> list[tuple[int, int]]:
    """(frame, position) in time order; the tail is one chunk. Replays the cache from the first chunk on."""
    first = sink + chunk  # how many of the first frames are walked forth and back
    assert first % chunk == 0
    cache: list[tuple[int, int]] = []  # (frame whose keys and values lie there, place on the time axis)
    for s in range(0, start, chunk):
        cache = cache[-first:]
        if s >= first + chunk:
            # Before its own frames are added, this chunk's clean pass rewrites the chunk before it.
            place = s - chunk
            step = place % first
            if (place // first) % 2 == 0:
                frames = [step + i for i in range(chunk)]
            else:
                frames = [first - 1 - step - i for i in range(chunk)]
            cache[-chunk:] = [(frame, place + i) for i, frame in enumerate(frames)]
        cache = cache + [(s + i, s + i) for i in range(chunk)]
    return [(frame, place - start) for frame, place in cache[-first:]]
