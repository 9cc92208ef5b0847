"""Relax Forcing: sink, one history frame chosen by score, tail (arXiv 2603.21366, zengqunzhao/Relax-Forcing)."""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rfjax.errors import UserError
from rfjax.memory.base import HISTORY, NONE, SINK, TAIL, MemoryShape
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, Stored
from rfjax.memory.registry import register

LARGEST_RESERVOIR = 10_000
"""The candidate rule is tabulated for every frame of the reservoir; this is 40 minutes."""


@register("relax_forcing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RelaxForcing(FramePolicy):
    """Attend to Sink, History, Tail and the own chunk: 7 frames with the defaults, however long the video.

    A candidate is scored `cos(p(candidate), p(Sink)) - redundancy_weight * cos(p(candidate), p(Tail))`, where p is the
    mean of the first layer's keys over tokens and heads. Which frames are candidates depends on the chunk's place
    alone, so a frame is stored only while some later chunk can still ask for it: 47 frames at once instead of the
    reservoir's 120, with equal results. Source: `wan/modules/causal_model.py` of the public code; unlike there, each
    sample of a batch has its own choice.
    """

    reservoir_frames: int = 120
    """Frames, own chunk included, beyond which the oldest that are not sink no longer count."""
    sink_frames: int = 2
    """First frames of the video."""
    history_frames: int = 1
    """Frames chosen from the middle by score."""
    tail_frames: int = 1
    """Last frames before the own chunk."""
    history_candidates: int = 4
    """Frames of the middle's second half that are scored."""
    redundancy_weight: float = 2.0
    """How strongly likeness to the tail counts against a candidate."""
    positions: Literal["hybrid", "true"] = "hybrid"
    """Where Sink and History stand: directly before Tail ("hybrid"), or at their true indices (the ablation)."""

    def __post_init__(self):
        for name in ("sink_frames", "history_frames", "tail_frames", "history_candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"relax_forcing: {name} is {getattr(self, name)}; 1 or more is needed")
        if self.history_candidates < self.history_frames:
            raise UserError(
                f"relax_forcing: history_candidates is {self.history_candidates}; "
                f"history_frames {self.history_frames} need at least as many"
            )
        if not self.history_candidates <= self.reservoir_frames <= LARGEST_RESERVOIR:
            raise UserError(
                f"relax_forcing: reservoir_frames is {self.reservoir_frames}; history_candidates "
                f"{self.history_candidates} need at least as many, and {LARGEST_RESERVOIR} are the most"
            )

    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """The most frames that can still be asked for at any one time."""
        self._local_limit(shape.chunk_frames)
        return _plan(self._sizes(shape.chunk_frames)).capacity

    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """The candidate rule read backwards."""
        plan, n = _plan(self._sizes(shape.chunk_frames)), shape.chunk_frames
        steady = frame + jnp.asarray(plan.steady_lifetime)[frame % n]
        early = jnp.asarray(plan.last_reader)[jnp.clip(frame, 0, len(plan.last_reader) - 1)]
        return jnp.where(frame < len(plan.last_reader), early, steady)

    def describe(self, keys: Float[Array, "L B n T C"], shape: MemoryShape) -> Float[Array, "B n D"]:
        """Mean of the first layer's keys over tokens and heads, float32."""
        heads = keys[0].reshape(*keys.shape[1:4], shape.heads, shape.head_dim)
        return heads.astype(jnp.float32).mean(axis=(2, 3))

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Everything while the video is young; then Sink, the best candidates, Tail."""
        dense_until = self.sink_frames + 1 + self.tail_frames
        slots = self.sink_frames + self.history_frames + self.tail_frames
        candidates, scores, selected = self._select(stored, start)

        early = jnp.where(jnp.arange(slots) < start, jnp.arange(slots), -1)
        early_roles = jnp.where(
            early < self.sink_frames, SINK, jnp.where(early < start - self.tail_frames, HISTORY, TAIL)
        )

        sink, tail = jnp.arange(self.sink_frames), start + jnp.arange(-self.tail_frames, 0)
        frames = jnp.concatenate([sink, selected, tail])
        count = jnp.sum(selected >= 0)
        before_tail = -self.tail_frames
        if self.positions == "hybrid":
            sink_at = before_tail - count - self.sink_frames + sink
            history_at = before_tail - count + jnp.arange(self.history_frames)
        else:
            sink_at, history_at = sink - start, selected - start
        late = jnp.concatenate([sink_at, history_at, tail - start])
        late_roles = np.repeat([SINK, HISTORY, TAIL], [self.sink_frames, self.history_frames, self.tail_frames])

        dense = start <= dense_until
        frames = jnp.where(dense, early, frames)
        return Choice(
            frames=frames,
            positions=jnp.where(dense, early - start, late),
            roles=jnp.where(frames < 0, NONE, jnp.where(dense, early_roles, late_roles)),
            selected=jnp.where(dense, -1, selected),
            candidates=jnp.where(dense, -1, candidates),
            scores=jnp.where(dense, jnp.nan, scores),
        )

    def _select(self, stored: Stored, start):
        """Return candidates [c] (-1 none), their scores and the best `history_frames` of them in time order."""
        table = _plan(self._sizes(stored.shape.chunk_frames)).candidates
        local = jnp.minimum(start, len(table) - 1)
        candidates = jnp.asarray(table)[local]
        candidates = jnp.where(candidates < 0, -1, candidates + (start - local))

        def prototype(frames):
            slots = jnp.argmax(stored.frames == frames[:, None], axis=1)
            mean = stored.features[slots].mean(axis=0)
            return mean / jnp.maximum(jnp.linalg.norm(mean), 1e-12)

        sink = prototype(jnp.arange(self.sink_frames))
        tail = prototype(start + jnp.arange(-self.tail_frames, 0))
        each = jax.vmap(lambda frame: prototype(frame[None]))(candidates)
        scores = jnp.where(candidates < 0, jnp.nan, each @ sink - self.redundancy_weight * (each @ tail))
        best = jnp.argsort(jnp.where(candidates < 0, -jnp.inf, scores), descending=True, stable=True)
        selected = candidates[best[: self.history_frames]]
        # Time order, with what is missing last.
        selected = jnp.sort(jnp.where(selected < 0, FOREVER, selected))
        return candidates, scores, jnp.where(selected == FOREVER, -1, selected)

    def _local_limit(self, chunk_frames: int) -> int:
        """Frames of the reservoir beside the own chunk.

        Raises:
            UserError: its middle is too short for so many history frames.
        """
        outside = self.sink_frames + self.tail_frames + chunk_frames
        needed = outside + next(
            length
            for length in itertools.count(2)
            if len(candidate_indices(length, self.history_candidates)) >= self.history_frames
        )
        if self.reservoir_frames < needed:
            raise UserError(
                f"relax_forcing: reservoir_frames is {self.reservoir_frames}; sink {self.sink_frames}, history "
                f"{self.history_frames}, tail {self.tail_frames} and the chunk's {chunk_frames} need at least {needed}"
            )
        return self.reservoir_frames - chunk_frames

    def _sizes(self, chunk_frames: int) -> "_Sizes":
        return _Sizes(
            self._local_limit(chunk_frames), self.sink_frames, self.tail_frames, self.history_candidates, chunk_frames
        )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the plan depends on, in frames."""

    local_limit: int
    """Of the reservoir, beside the own chunk."""
    sink: int
    tail: int
    candidates: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the candidate rule says in advance, for all videos."""

    candidates: np.ndarray
    """[local + 1, candidates] frames to score when `local` frames are in the reservoir, -1 for none."""
    last_reader: np.ndarray
    """Last chunk start that may attend each early frame."""
    steady_lifetime: np.ndarray
    """[chunk] frames from a later frame, by its index modulo the chunk, to the last chunk that may attend it."""
    capacity: int


@functools.cache
def _plan(sizes: _Sizes) -> _Plan:
    table = np.full((sizes.local_limit + 1, sizes.candidates), -1, np.int32)
    for local in range(sizes.sink + sizes.tail + 2, sizes.local_limit + 1):
        middle = candidate_indices(local - sizes.sink - sizes.tail, sizes.candidates)
        table[local, : len(middle)] = sizes.sink + middle

    def needed(start: int) -> set[int]:
        local = min(start, sizes.local_limit)
        if start <= sizes.sink + 1 + sizes.tail:
            return set(range(start))
        rows = table[local][table[local] >= 0] + (start - local)
        return {*range(sizes.sink), *rows.tolist(), *range(start - sizes.tail, start)}

    # Offsets are constant once the reservoir is full: follow the rule until each early frame has its last reader.
    early = -(-(sizes.local_limit + 1) // sizes.chunk) * sizes.chunk
    horizon = early + 2 * (sizes.local_limit + sizes.chunk)
    last_reader = np.full(horizon + sizes.chunk, -1, np.int32)
    reads = {start: needed(start) for start in range(0, horizon, sizes.chunk)}
    for start, frames in reads.items():
        last_reader[list(frames)] = start
    last_reader[: sizes.sink] = FOREVER
    lifetime = [int(last_reader[early + r] - (early + r)) for r in range(sizes.chunk)]
    capacity = max(
        int(np.sum(last_reader[:start] >= start)) for start in range(0, early + sizes.local_limit, sizes.chunk)
    )
    return _Plan(table, last_reader[:early], np.asarray(lifetime, np.int32), capacity)


def candidate_indices(length: int, count: int) -> np.ndarray:
    """Candidates among the `length` middle frames, counted from the first of them.

    The second half of the middle, cut at `count + 1` even steps that include its end, without repeats and without the
    last. The steps are float32 and run from both ends, as torch.linspace does.
    """
    half = length // 2
    count = min(count, length - half)
    if count == 1:
        return np.asarray([half], np.int32)
    step = np.float32(length - 1 - half) / np.float32(count)
    i = np.arange(count + 1, dtype=np.float32)
    points = np.where(i < (count + 1) // 2, np.float32(half) + step * i, np.float32(length - 1) - step * (count - i))
    return np.unique(points.astype(np.int32))[:-1]
