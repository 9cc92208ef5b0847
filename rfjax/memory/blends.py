"""Memories in which the frames that leave are folded into blends: what Reward Forcing and MemRoPE share.

Slots fill up in time order, and the store itself is the view. Then the first slots stay, the last of them as blends,
and the others are a ring: a new frame takes the slot of the one that is `tail_frames` older, which is folded in. See
`rfjax.memory.base` for the contract and the letters of the shapes; b blends have t = T tokens, or t = 1 where a blend's
tokens are all alike.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rfjax.memory.base import CleanChunk, MemoryShape, View
from rfjax.memory.frames import Choice, plain_choice, slots_of, whole_frames_view, write
from rfjax.pytree import pytree


@pytree()
@dataclasses.dataclass(frozen=True)
class BlendStore:
    """Whole frames and blends in slots."""

    keys: Float[Array, "L B N T C"]
    """Keys after the norm, before the rotary embedding."""
    values: Float[Array, "L B N T C"]
    frames: Int[Array, "B N"]
    """True index of the frame in each slot, of the newest one of a blend; -1 where the slot is empty."""
    key_blends: Float[Array, "L B b t C"]
    """The blends, float32: rounded to 16 bits they would freeze, because a step is smaller than half a unit there."""
    value_blends: Float[Array, "L B b t C"]


class BlendPolicy(abc.ABC):
    """Base of the policies that fold each chunk that leaves into blends, alike for keys and values."""

    name: ClassVar[str]
    tail_frames: int

    @abc.abstractmethod
    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> BlendStore:
        """Return an empty store. Raises UserError where the settings do not fit the shape."""

    @abc.abstractmethod
    def fold(
        self,
        blends: Float[Array, "L B b t C"],
        lying: Float[Array, "L B b T C"],
        leaving: Float[Array, "L B n T C"],
        begun: Bool[Array, "B 1 1 1"],
    ) -> Float[Array, "L B b t C"]:
        """Fold a chunk into the blends, in float32.

        Args:
            blends: before; meaningless where not `begun`.
            lying: what lies in the blends' slots, whole frames where not `begun`.
            leaving: the chunk's frames.
            begun: whether an earlier chunk of the sample's video was folded.
        """

    @abc.abstractmethod
    def newest(self, leaving: Int[Array, "B n"]) -> Int[Array, "B #b"]:
        """Return the newest frame of each blend that the given frames were folded into."""

    @abc.abstractmethod
    def roles(self, blended: Bool[Array, "N"]) -> Int[Array, "N"]:
        """Return the role of each slot, told whether a blend lies there."""

    def read(self, state: BlendStore, start: Int[Array, "B"]) -> View:
        """Attend to all that is stored, closed up in time order."""
        choice = jax.vmap(self._choose)(state.frames, start)
        return whole_frames_view(state.keys, state.values, choice)

    def _choose(self, frames: Int[Array, "N"], start: Int[Array, ""]) -> Choice:
        slots = jnp.arange(len(frames), dtype=jnp.int32)
        kept = slots < len(frames) - self.tail_frames
        # The tail truly stands directly before the chunk; what stays closes up to it once frames are missing between.
        positions = jnp.where(kept, slots - jnp.minimum(start, len(frames)), frames - start)
        return plain_choice(frames, positions, self.roles(self._blended(frames)).astype(jnp.int32))

    def _blended(self, frames: Int[Array, "*B N"]) -> Bool[Array, "*B N"]:
        """Whether a blend lies in each slot: a whole frame would lie in the slot of its own number there."""
        slots = jnp.arange(frames.shape[-1])
        return (slots < len(slots) - self.tail_frames) & (frames != slots)

    def commit(self, state: BlendStore, chunk: CleanChunk) -> BlendStore:
        """Store the chunk, and fold the frames whose slots it takes."""
        new, size, blends = chunk.frames, state.frames.shape[1], state.key_blends.shape[2]
        stay = size - self.tail_frames
        # `write` counts in JAX's default integers, as slots from a sort or a search are.
        slots = jnp.where(new < stay, new, stay + (new - stay) % self.tail_frames)
        full, begun = new[:, :1] >= size, new[:, :1] > size
        blend_slots = jnp.where(full, jnp.arange(stay - blends, stay), size)
        samples = jnp.arange(new.shape[0])[:, None]

        def push(store, blends, new):
            lying, leaving = store[:, :, stay - blends.shape[2] : stay], store[:, samples, slots]
            folded = self.fold(blends, lying, leaving, begun[:, :, None, None])
            blends = jnp.where(full[:, :, None, None], folded, blends)
            rounded = jnp.broadcast_to(blends.astype(store.dtype), lying.shape)
            return write(write(store, rounded, blend_slots[None]), new, slots[None]), blends

        keys, key_blends = push(state.keys, state.key_blends, chunk.keys)
        values, value_blends = push(state.values, state.value_blends, chunk.values)
        frames = state.frames.at[samples, blend_slots].set(self.newest(new - self.tail_frames), mode="drop")
        return BlendStore(keys, values, frames.at[samples, slots].set(new), key_blends, value_blends)

    def recache(self, state: BlendStore, frames: CleanChunk) -> BlendStore:
        """Renew the given frames where they are stored whole; blends stay."""
        whole = jnp.where(self._blended(state.frames), -1, state.frames)
        slots = slots_of(whole, frames.frames)[None]
        return dataclasses.replace(
            state, keys=write(state.keys, frames.keys, slots), values=write(state.values, frames.values, slots)
        )


def empty_blend_store(shape: MemoryShape, slots: int, blends: int, blend_tokens: int, dtype: DTypeLike) -> BlendStore:
    """Return a store of so many empty slots and blends."""
    store = (shape.layers, shape.batch, slots, shape.frame_tokens, shape.heads * shape.head_dim)
    blended = (shape.layers, shape.batch, blends, blend_tokens, shape.heads * shape.head_dim)
    return BlendStore(
        keys=jnp.zeros(store, dtype),
        values=jnp.zeros(store, dtype),
        frames=jnp.full((shape.batch, slots), -1, jnp.int32),
        key_blends=jnp.zeros(blended, jnp.float32),
        value_blends=jnp.zeros(blended, jnp.float32),
    )
