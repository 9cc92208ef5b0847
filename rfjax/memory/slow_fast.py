"""Context Forcing: Slow-Fast memory with bounded positions (arXiv 2602.06028, TIGER-AI-Lab/Context-Forcing)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from rfjax.errors import UserError
from rfjax.memory.base import HISTORY, NONE, SINK, TAIL, CleanChunk, MemoryShape, Trace, View
from rfjax.memory.frames import FOREVER, slots_of, write
from rfjax.memory.registry import register
from rfjax.pytree import pytree


@pytree()
@dataclasses.dataclass(frozen=True)
class SlowFastMemory:
    """Slots of Sink, Slow and Fast, in this order; the frames in Slow differ from layer to layer.

    Slow and Fast are rings. Until all slots are full, slot i holds frame i, and what was consolidated meanwhile is
    noted in `slow` alone.
    """

    keys: Float[Array, "L B N T C"]
    """Keys after the norm, before the rotary embedding."""
    values: Float[Array, "L B N T C"]
    frames: Int[Array, "L B N"]
    """True index of the frame in each slot, -1 where the slot is empty; a frame may be in two."""
    slow: Int[Array, "L B W"]
    """Consolidated frame that each of the W slots of Slow is for, -1 for none yet."""
    feature: Float[Array, "L B C"]
    """Mean key of the last chunk, float32."""
    candidate: Int[Array, "B"]
    """First frame of the last chunk where it might be consolidated, else -1."""
    similarity: Float[Array, "L B"]
    """Cosine of the last chunk's feature to that of the chunk before."""


@register("context_forcing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextForcing:
    """Attend to Sink, Slow, Fast and the own chunk: 21 frames with the defaults, however long the video.

    Fast holds the last frames. Slow holds the first frames of surprising chunks, the last `slow_frames` of them: those
    whose mean key (over tokens and frames) has a cosine below `threshold` to that of the chunk before. Each layer and
    each sample decides for itself, on the clean pass, from the first chunk that starts outside the video's first
    `fast_frames`. Until all slots are full, every frame is attended in order; then consolidated frames take the places
    of the first ones in Slow. As in the public code, a frame may be attended twice: in Slow as one of the video's first
    and as a consolidated one, or in Slow and in Fast.

    Source: `wan/modules/causal_model.py` of the public code, which however decides on the noisiest pass and for the
    whole batch, and stores that pass's keys and values.
    """

    sink_frames: int = 3
    """First frames of the video, always kept."""
    slow_frames: int = 12
    """Consolidated frames; the oldest gives way to the next one."""
    fast_frames: int = 6
    """Last frames, own chunk included."""
    threshold: float = 0.95
    """Cosine below which a chunk is surprising; unused with "uniform"."""
    consolidate: Literal["surprise", "uniform"] = "surprise"
    """Which of the tested chunks are consolidated: the surprising ones, or all (the ablation)."""
    every_chunks: int = 1
    """Only chunks whose number is a multiple of this are tested; always against the chunk directly before."""
    positions: Literal["bounded", "true"] = "bounded"
    """Where frames stand: closed up in the order Sink, Slow, Fast, or at their true indices (the ablation)."""

    def __post_init__(self):
        for name, least in (("sink_frames", 0), ("slow_frames", 1), ("fast_frames", 1), ("every_chunks", 1)):
            if getattr(self, name) < least:
                raise UserError(f"context_forcing: {name} is {getattr(self, name)}; {least} or more is needed")
        if self.sink_frames > self.fast_frames:
            raise UserError(
                f"context_forcing: sink_frames is {self.sink_frames}; at most fast_frames {self.fast_frames} are "
                "possible, or Sink itself would be consolidated"
            )
        if not -1 <= self.threshold <= 1:
            raise UserError(f"context_forcing: threshold is {self.threshold}; a cosine from -1 to 1 is needed")

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> SlowFastMemory:
        """Return an empty memory."""
        chunk, total = shape.chunk_frames, self.sink_frames + self.slow_frames + self.fast_frames
        if self.fast_frames <= chunk:
            raise UserError(
                f"context_forcing: fast_frames is {self.fast_frames}; more than the chunk's {chunk} are needed"
            )
        if total % chunk:
            raise UserError(
                f"context_forcing: sink_frames {self.sink_frames}, slow_frames {self.slow_frames} and fast_frames "
                f"{self.fast_frames} are {total}; a multiple of the chunk's {chunk} is needed"
            )
        layers_samples = (shape.layers, shape.batch)
        kv = (*layers_samples, total - chunk, shape.frame_tokens, shape.heads * shape.head_dim)
        return SlowFastMemory(
            keys=jnp.zeros(kv, dtype),
            values=jnp.zeros(kv, dtype),
            frames=jnp.full(kv[:3], -1, jnp.int32),
            slow=jnp.full((*layers_samples, self.slow_frames), -1, jnp.int32),
            feature=jnp.zeros((*layers_samples, kv[-1]), jnp.float32),
            candidate=jnp.full(shape.batch, -1, jnp.int32),
            similarity=jnp.full(layers_samples, jnp.nan, jnp.float32),
        )

    def read(self, state: SlowFastMemory, start: Int[Array, "B"]) -> View:
        """Attend to all that is stored: the store itself is the view.

        The trace has the consolidated frames as selected, the last chunk's first frame, where it might have been one,
        as the candidate, and its cosine as the score.
        """
        state = _afresh(state, start)
        slots = state.frames.shape[-1]
        length = jnp.minimum(start, slots).astype(jnp.int32)
        positions = self._positions(state, start)

        place, past = jnp.arange(slots, dtype=jnp.int32), slots - self.sink_frames - self.slow_frames
        roles = jnp.where(place < self.sink_frames, SINK, jnp.where(place < length[:, None] - past, HISTORY, TAIL))
        roles = jnp.where(state.frames < 0, NONE, roles)
        slow = jnp.sort(jnp.where(state.slow < 0, FOREVER, state.slow), axis=-1)
        tested = jnp.where(state.candidate < 0, jnp.nan, state.similarity)
        trace = Trace(
            frames=_samples_first(state.frames)[..., None],
            positions=_samples_first(positions)[..., None],
            roles=_samples_first(roles.astype(jnp.int32))[..., None],
            selected_frames=_samples_first(jnp.where(slow == FOREVER, -1, slow)),
            candidates=_samples_first(jnp.broadcast_to(state.candidate, tested.shape))[..., None],
            scores=_samples_first(tested)[..., None],
        )
        return View(state.keys, state.values, positions[..., None], None, length, trace)

    def _positions(self, state: SlowFastMemory, start: Int[Array, "B"]) -> Int[Array, "L B N"]:
        """Time position of each slot, counted from `start`: the true one, or by rank once all slots are full."""
        true = state.frames - start[:, None]
        if self.positions == "true":
            return true
        slots, before_fast = true.shape[-1], self.sink_frames + self.slow_frames
        sink = jnp.arange(-slots, self.sink_frames - slots, dtype=jnp.int32)
        # Consolidated frames by age, then the video's first ones, which keep their slots.
        age = jnp.where(state.slow < 0, FOREVER + jnp.arange(self.slow_frames, dtype=jnp.int32), state.slow)
        rank = jnp.sum(age[..., None, :] < age[..., :, None], axis=-1, dtype=jnp.int32)
        sink = jnp.broadcast_to(sink, (*rank.shape[:2], self.sink_frames))
        bounded = jnp.concatenate([sink, self.sink_frames - slots + rank, true[..., before_fast:]], axis=-1)
        return jnp.where(start[:, None] <= slots, true, bounded)

    def commit(self, state: SlowFastMemory, chunk: CleanChunk) -> SlowFastMemory:
        """Decide whether the chunk's first frame is consolidated, and take the chunk into Fast."""
        start, slots = chunk.frames[:, 0], state.frames.shape[-1]
        state, place = self._decide(_afresh(state, start), chunk)

        # Once all slots are full: what each slot of Slow is to hold, and where that lies now, if not in the chunk.
        full = start >= slots
        slow_slots = slice(self.sink_frames, self.sink_frames + self.slow_frames)
        held = state.frames[..., slow_slots]
        wanted = jnp.where(full[:, None] & (state.slow >= 0), state.slow, held)
        sources = slots_of(state.frames, jnp.where(wanted == held, -1, wanted))
        slow = jnp.where(full & (place < self.slow_frames), self.sink_frames + place, slots)
        fast = self._fast_slots(chunk.frames, slots).astype(slow.dtype)

        def store(kept, new):
            kept = _copy(kept, sources, self.sink_frames)
            return write(write(kept, new, fast[None]), new[:, :, :1], slow[..., None])

        frames = state.frames.at[..., slow_slots].set(wanted)
        samples = jnp.arange(fast.shape[0])[:, None]
        return dataclasses.replace(
            state,
            keys=store(state.keys, chunk.keys),
            values=store(state.values, chunk.values),
            frames=frames.at[:, samples, fast].set(chunk.frames, mode="drop"),
        )

    def _decide(self, state: SlowFastMemory, chunk: CleanChunk) -> tuple[SlowFastMemory, Int[Array, "L B"]]:
        """Note the chunk's feature and the decision; return also its place in Slow, one beyond the last for none."""
        start, count = chunk.frames[:, 0], chunk.frames.shape[1]
        feature = _mean_key(chunk.keys)
        similarity = _cosine(feature, state.feature)
        tested = (start >= self.fast_frames) & (start // count % self.every_chunks == 0)
        chosen = tested & ((similarity < self.threshold) | (self.consolidate == "uniform"))
        # The first empty place, or the oldest frame's.
        place = jnp.where(chosen, jnp.argmin(state.slow, axis=-1), self.slow_frames)
        taken = jnp.arange(self.slow_frames) == place[..., None]
        state = dataclasses.replace(
            state,
            slow=jnp.where(taken, start[:, None], state.slow),
            feature=feature,
            candidate=jnp.where(tested, start, -1),
            similarity=similarity,
        )
        return state, place

    def _fast_slots(self, frames: Int[Array, "B n"], slots: int) -> Int[Array, "B n"]:
        """Slot of each frame of a chunk; one beyond the last where Fast is too short for it."""
        before_fast = self.sink_frames + self.slow_frames
        past = slots - before_fast
        ring = before_fast + (frames - before_fast) % past
        following = frames[:, :1] + frames.shape[1]
        return jnp.where(frames < slots, frames, jnp.where(frames < following - past, slots, ring))

    def recache(self, state: SlowFastMemory, frames: CleanChunk) -> SlowFastMemory:
        """Renew the given frames where they are stored, in both slots of a frame that is there twice.

        The next chunk is then compared with the last one as it is under the new prompt.
        """
        slots = state.frames.shape[-1]
        given = jnp.broadcast_to(frames.frames, (*state.frames.shape[:2], frames.frames.shape[1]))
        first, from_last = slots_of(state.frames, given), slots_of(state.frames[..., ::-1], given)
        last = jnp.where(from_last == slots, slots, slots - 1 - from_last)

        def renew(store, new):
            return write(write(store, new, first), new, last)

        chunk = self.sink_frames + self.slow_frames + self.fast_frames - slots
        return dataclasses.replace(
            state,
            keys=renew(state.keys, frames.keys),
            values=renew(state.values, frames.values),
            feature=_mean_key(frames.keys[:, :, -chunk:]),
        )


def _afresh(state: SlowFastMemory, start: Int[Array, "B"]) -> SlowFastMemory:
    """Forget everything in the samples whose video begins."""
    begins = start == 0
    return dataclasses.replace(
        state,
        frames=jnp.where(begins[:, None], -1, state.frames),
        slow=jnp.where(begins[:, None], -1, state.slow),
        candidate=jnp.where(begins, -1, state.candidate),
    )


def _mean_key(keys: Float[Array, "L B n T C"]) -> Float[Array, "L B C"]:
    return keys.mean(axis=(2, 3), dtype=jnp.float32)


def _cosine(a: Float[Array, "*shape C"], b: Float[Array, "*shape C"]) -> Float[Array, "*shape"]:
    lengths = [jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-8) for x in (a, b)]
    return jnp.sum(a * b, axis=-1) / (lengths[0] * lengths[1])


def _copy(store: Float[Array, "L B N T C"], sources: Int[Array, "L B W"], first: int) -> Float[Array, "L B N T C"]:
    """Copy slot `sources[..., i]` to slot `first + i`, in place, unless it is beyond the last.

    Only once in a video, when all slots are full, is there anything to copy. In ascending order no copy overwrites what
    a later one needs: the frame for place i lies at slot fast_frames + i or above, and sink_frames is not larger.
    """
    flat = sources.ravel()
    needed = flat < store.shape[2]
    entries = jnp.flatnonzero(needed, size=flat.size, fill_value=0)

    def copy(k, store):
        layer, sample, place = jnp.unravel_index(entries[k], sources.shape)
        frame = jax.lax.dynamic_slice(store, (layer, sample, flat[entries[k]], 0, 0), (1, 1, 1, *store.shape[3:]))
        return jax.lax.dynamic_update_slice(store, frame, (layer, sample, first + place, 0, 0))

    return jax.lax.fori_loop(0, jnp.sum(needed), copy, store)


def _samples_first(values: Array) -> Array:
    return jnp.moveaxis(values, 0, 1)
