"""Slow, obvious transcription of Deep Forcing (arXiv 2512.05081) for one layer and one sample.

Written from the public code, cvlab-kaist/DeepForcing at ea9961a (wan/modules/causal_model.py, causal_model_DS.py,
pipeline/causal_inference.py). Every token is kept as one object in a plain list, in the order of the cache. Keys and
queries come in after the norm and before the rotary embedding.

Drive `DeepForcing` once a chunk: `begin(start, queries of the first denoising pass)`, then `attended(start)`, which
holds for all passes of the chunk, then `commit(start, queries, keys, values of the clean pass)`.
"""

import dataclasses

import numpy as np


def deep_sink_only(start: int, chunk: int, buffer: int, sink: int) -> list[tuple[int, int]]:
    """Without compression: all frames while they fit, then the sink, moved along, and the last frames in place."""
    assert buffer % chunk == 0
    assert sink <= buffer - chunk
    if start + chunk <= buffer:
        return [(frame, frame - start) for frame in range(start)]
    tail = buffer - chunk - sink
    first = [(frame, frame - buffer) for frame in range(sink)]
    return first + [(frame, frame - start) for frame in range(start - tail, start)]


@dataclasses.dataclass
class Token:
    """One remembered token."""

    frame: int  # the frame that it was generated in
    place: int  # row * width + column in that frame; never changes
    position: int  # time position as an absolute frame index; only the sink's ever changes
    key: np.ndarray  # [C], before the rotary embedding
    value: np.ndarray  # [C]
    selections: int = 0  # how many compressions have selected it by score


@dataclasses.dataclass
class Entry:
    """One token as a chunk attends to it."""

    frame: int
    place: int
    position: int  # counted from the own chunk's first frame
    key: np.ndarray
    value: np.ndarray


def rotated(vector: np.ndarray, heads: int, time: int, row: int, column: int) -> np.ndarray:
    """Wan's three-axis rotary embedding of one [C] vector: pairs of neighbours, time first, then rows, then columns."""
    result = np.array(vector, np.float64).reshape(heads, -1)
    head_dim = result.shape[1]
    space = 2 * (head_dim // 6)
    first = 0
    for place, size in ((time, head_dim - 2 * space), (row, space), (column, space)):
        for pair in range(size // 2):
            angle = place * 10000.0 ** (-2 * pair / size)
            even, odd = first + 2 * pair, first + 2 * pair + 1
            a, b = result[:, even].copy(), result[:, odd].copy()
            result[:, even] = a * np.cos(angle) - b * np.sin(angle)
            result[:, odd] = a * np.sin(angle) + b * np.cos(angle)
        first += size
    return result.reshape(-1)


class DeepForcing:
    """Deep sink and participative compression, with the memory of one layer."""

    def __init__(
        self,
        heads: int,
        grid: tuple[int, int],
        chunk: int = 3,
        buffer: int = 21,
        sink: int = 10,
        budget: int = 16,
        recent: int = 4,
        max_selections: int = 7,
    ):
        assert buffer % chunk == 0
        assert chunk <= recent <= 2 * chunk
        assert sink + recent <= budget <= buffer
        self.heads, self.width, self.tokens = heads, grid[1], grid[0] * grid[1]
        self.chunk, self.buffer, self.sink, self.budget = chunk, buffer, sink, budget
        self.recent, self.max_selections = recent, max_selections
        self.memory: list[Token] = []  # the cache without the own chunk: sink, selected tokens, then whole frames
        self.clean_queries: dict[int, np.ndarray] = {}  # frame -> [T, C]
        self.begun = -1
        self.scores: dict[tuple[int, int], float] = {}  # (frame, place) -> participation, of the last compression
        self.selected: list[tuple[int, int]] = []  # (frame, place) chosen by the last compression

    def begin(self, start: int, queries: np.ndarray | None) -> None:
        """Compresses if the own chunk would not fit; `queries` [n, T, C] are the first denoising pass's.

        With `queries=None` the last frames' clean queries decide instead. That is not what the public code does: it is
        what a policy can do that must have chosen before it sees the chunk.
        """
        assert start % self.chunk == 0
        assert start > self.begun
        self.begun = start
        if len(self.memory) + self.chunk * self.tokens <= self.buffer * self.tokens:
            return
        seen = dict(self.clean_queries)
        if queries is not None:
            seen |= {start + i: queries[i] for i in range(self.chunk)}
        self._compress(start, {frame: seen[frame] for frame in sorted(seen)[-self.recent :]})

    def _compress(self, start: int, queries: dict[int, np.ndarray]) -> None:
        sink_end = self.sink * self.tokens
        recent_start = len(self.memory) - (self.recent - self.chunk) * self.tokens
        sink, recent = self.memory[:sink_end], self.memory[recent_start:]
        middle = self.memory[sink_end:recent_start]
        places = range(self.tokens)
        total = np.sum([self._rotated(queries[f][place], f, place) for f in queries for place in places], axis=0)
        head_dim = len(total) // self.heads
        self.scores = {
            (token.frame, token.place): float(
                total @ self._rotated(token.key, token.position, token.place) / (np.sqrt(head_dim) * self.heads)
            )
            for token in middle
        }
        allowed = [token for token in middle if not self.max_selections or token.selections < self.max_selections]
        allowed.sort(key=lambda token: -self.scores[token.frame, token.place])
        best = allowed[: (self.budget - self.sink - self.recent) * self.tokens]
        chosen = [token for token in middle if any(token is one for one in best)]  # back in the cache's order
        self.selected = [(token.frame, token.place) for token in chosen]
        for token in chosen:
            token.selections += 1
        self.memory = sink + chosen + recent
        # The sink lies as many positions before `start` as the whole cache, own chunk included, has (whole) frames.
        frames = (len(self.memory) + self.chunk * self.tokens) // self.tokens
        for token in sink:
            token.position = start - frames + token.frame

    def attended(self, start: int) -> list[Entry]:
        assert start == self.begun
        return [Entry(t.frame, t.place, t.position - start, t.key, t.value) for t in self.memory]

    def commit(self, start: int, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Everything of the clean pass, each [n, T, C]."""
        assert start == self.begun
        for i in range(self.chunk):
            frame = start + i
            self.clean_queries[frame] = queries[i]
            for place in range(self.tokens):
                self.memory.append(Token(frame, place, frame, keys[i, place], values[i, place]))

    def _rotated(self, vector: np.ndarray, time: int, place: int) -> np.ndarray:
        return rotated(vector, self.heads, time, place // self.width, place % self.width)
