"""Memories of whole frames: decisions for one sample in the policy, all moving of data here.

See `rfjax.memory.base` for the contract and the letters of the shapes.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from rfjax.errors import UserError
from rfjax.memory.base import NONE, CleanChunk, MemoryShape, Trace, View
from rfjax.pytree import pytree

FOREVER = 2**30
"""`last_reader` of a frame that is never freed."""


@pytree(static=["shape"])
@dataclasses.dataclass(frozen=True)
class FrameStore:
    """Whole frames kept in slots; a slot's place says nothing, its `frames` entry says which frame it holds."""

    keys: Float[Array, "L B N T C"]
    """Keys after the norm, before the rotary embedding."""
    values: Float[Array, "L B N T C"]
    frames: Int[Array, "B N"]
    """True index of the frame in each slot, -1 where the slot is empty."""
    features: Float[Array, "B N E"]
    """What the policy's `describe` made of each frame's keys, for later decisions."""
    shape: MemoryShape
    """Static sizes that the store was made for."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a decision may look at: one sample's stored frames, without their keys and values."""

    frames: Int[Array, "N"]
    """True index of the frame in each slot, -1 where the slot is empty."""
    features: Float[Array, "N E"]
    """What `FramePolicy.describe` made of each frame."""
    shape: MemoryShape


@pytree()
@dataclasses.dataclass(frozen=True)
class Choice:
    """A `FramePolicy`'s decision for one sample and one chunk, valid entries in any place."""

    frames: Int[Array, "S"]
    """True index of each frame to attend, -1 for none."""
    positions: Int[Array, "S"]
    """Its time position, counted from the chunk's first frame."""
    roles: Int[Array, "S"]
    """NONE, SINK, HISTORY or TAIL."""
    selected: Int[Array, "history"]
    """Frames chosen by score, in time order, -1 for none."""
    candidates: Int[Array, "candidates"]
    """Frames among which they were chosen, -1 for none."""
    scores: Float[Array, "candidates"]
    """Score of each candidate, NaN where there is none."""


def plain_choice(frames: Int[Array, "S"], positions: Int[Array, "S"], roles: Int[Array, "S"]) -> Choice:
    """Return a decision that took no scores."""
    none = jnp.zeros(0, jnp.int32)
    return Choice(frames, positions, jnp.where(frames < 0, NONE, roles), none, none, jnp.zeros(0, jnp.float32))


class FramePolicy(abc.ABC):
    """Base of the policies that keep whole frames unchanged, the same ones in all layers."""

    name: ClassVar[str]

    attends_store: ClassVar[bool] = False
    """Whether a chunk attends to every stored frame. Then the store itself is the view, and nothing is gathered.

    Filled slots must then be the first ones, which holds because a new frame takes the first free slot, as long as
    `last_reader` never frees more frames than the following chunk brings.
    """

    @abc.abstractmethod
    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """How many frames must be stored at once. Raises UserError where the settings do not fit the shape."""

    @abc.abstractmethod
    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """First frame of the last chunk that may attend to each given frame (anything below it if none may)."""

    @abc.abstractmethod
    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Decide what one sample's chunk that begins with frame `start` attends to."""

    def describe(self, keys: Float[Array, "L B n T C"], shape: MemoryShape) -> Float[Array, "B n E"]:
        """Summarise each frame of a chunk for later decisions. Nothing by default."""
        return jnp.zeros((*keys.shape[1:3], 0), jnp.float32)

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> FrameStore:
        """Return an empty store."""
        return empty_store(self, shape, self.capacity(shape, video_frames), dtype)

    def read(self, state: FrameStore, start: Int[Array, "B"]) -> View:
        """Gather the frames chosen for each sample, valid ones first."""
        return self.gather(state, start, self.choose)

    def gather(
        self, state: FrameStore, start: Int[Array, "B"], choose: Callable[[Stored, Int[Array, ""]], Choice]
    ) -> View:
        """Gather the frames that `choose` takes for each sample, valid ones first."""

        def decide(frames, features, start):
            choice = choose(Stored(frames, features, state.shape), start)
            _check_choice(self.name, choice)
            return self._ordered(choice)

        choice = jax.vmap(decide)(state.frames, state.features, start)
        keys, values = state.keys, state.values
        if not self.attends_store:
            slots = jnp.argmax(state.frames[:, None, :] == choice.frames[:, :, None], axis=2)
            samples = jnp.arange(slots.shape[0])[:, None]
            keys, values = keys[:, samples, slots], values[:, samples, slots]
        return whole_frames_view(keys, values, choice)

    def _ordered(self, choice: Choice) -> Choice:
        """Return one sample's choice, gathered frames with the valid ones first; slots are filled in that order."""
        choice = jax.tree.map(_narrow, choice)
        if self.attends_store:
            return choice
        order = jnp.argsort(choice.frames < 0, stable=True)
        return dataclasses.replace(
            choice, frames=choice.frames[order], positions=choice.positions[order], roles=choice.roles[order]
        )

    def commit(self, state: FrameStore, chunk: CleanChunk) -> FrameStore:
        """Free the frames that no later chunk can ask for and store those of the chunk that one can."""
        new, count = chunk.frames, chunk.frames.shape[1]
        following = new[:, :1] + count
        live = (state.frames >= 0) & (self.last_reader(state.frames, state.shape) >= following)
        wanted = self.last_reader(new, state.shape) >= following
        # The k-th wanted frame goes to the k-th free slot; the others to a slot beyond the last, which is none.
        beyond = state.frames.shape[1]
        free = jnp.pad(jnp.argsort(live, axis=1, stable=True), ((0, 0), (0, count)), constant_values=beyond)
        rank = jnp.cumsum(wanted, axis=1) - 1
        slots = jnp.where(wanted, jnp.take_along_axis(free, jnp.maximum(rank, 0), axis=1), beyond)
        state = dataclasses.replace(state, frames=jnp.where(live, state.frames, -1))
        return self._put(state, chunk, slots)

    def recache(self, state: FrameStore, frames: CleanChunk) -> FrameStore:
        """Renew the given frames where they are stored."""
        return self._put(state, frames, slots_of(state.frames, frames.frames))

    def _put(self, state: FrameStore, chunk: CleanChunk, slots: Int[Array, "B n"]) -> FrameStore:
        """Store the frames of a chunk in the given slots; one beyond the last is none."""
        samples = jnp.arange(slots.shape[0])[:, None]
        return dataclasses.replace(
            state,
            keys=write(state.keys, chunk.keys, slots[None]),
            values=write(state.values, chunk.values, slots[None]),
            frames=state.frames.at[samples, slots].set(chunk.frames, mode="drop"),
            features=state.features.at[samples, slots].set(self.describe(chunk.keys, state.shape), mode="drop"),
        )


def empty_store(policy: FramePolicy, shape: MemoryShape, slots: int, dtype: DTypeLike) -> FrameStore:
    """Return a store of so many empty slots, with room for what the policy's `describe` tells of a frame."""
    kv = (shape.layers, shape.batch, slots, shape.frame_tokens, shape.heads * shape.head_dim)
    chunk = jax.ShapeDtypeStruct((*kv[:2], shape.chunk_frames, *kv[3:]), dtype)
    features = jax.eval_shape(lambda keys: policy.describe(keys, shape), chunk)
    return FrameStore(
        keys=jnp.zeros(kv, dtype),
        values=jnp.zeros(kv, dtype),
        frames=jnp.full((shape.batch, slots), -1, jnp.int32),
        features=jnp.zeros((shape.batch, slots, features.shape[-1]), features.dtype),
        shape=shape,
    )


def whole_frames_view(keys: Float[Array, "L B S T C"], values: Float[Array, "L B S T C"], choice: Choice) -> View:
    """Make the view of whole frames that all layers attend to alike, from a choice with a leading axis of samples."""
    entries = {
        field.name: getattr(choice, field.name)[:, None] for field in dataclasses.fields(choice)
    }  # an axis of layers
    trace = Trace(
        frames=entries["frames"][..., None],
        positions=entries["positions"][..., None],
        roles=entries["roles"][..., None],
        selected_frames=entries["selected"],
        candidates=entries["candidates"],
        scores=entries["scores"],
    )
    length = jnp.sum(choice.frames >= 0, axis=1, dtype=jnp.int32)
    return View(keys, values, choice.positions[None, :, :, None], None, length, trace)


def slots_of(stored: Int[Array, "*B N"], frames: Int[Array, "*B n"]) -> Int[Array, "*B n"]:
    """Return the slot that holds each given frame, one beyond the last where none does."""
    if stored.shape[-1] == 0:  # a video of a single chunk stores nothing
        return jnp.zeros_like(frames)
    same = (stored[..., None, :] == frames[..., :, None]) & (frames[..., :, None] >= 0)
    return jnp.where(same.any(axis=-1), jnp.argmax(same, axis=-1), stored.shape[-1])


def write(
    store: Float[Array, "L B N T C"], new: Float[Array, "L B n T C"], slots: Int[Array, "Y B n"]
) -> Float[Array, "L B N T C"]:
    """Put each new frame into its slot, in place, unless that is beyond the last.

    One slice at a time: XLA's scatter takes 3.6 times as long on a CPU and widens a bfloat16 store to float32 there.
    """
    if store.shape[2] == 0:
        return store
    groups, batch, count = slots.shape
    layers = store.shape[0] // groups
    one = (layers, 1, 1, *store.shape[3:])

    def put(k, store):
        group, sample, i = k // (batch * count), k // count % batch, k % count
        slot = slots[group, sample, i].astype(k.dtype)  # 64 bits where JAX counts in them
        at = (group * layers, sample, jnp.minimum(slot, store.shape[2] - 1), 0, 0)
        frame = jax.lax.dynamic_slice(new, (group * layers, sample, i, 0, 0), one)
        kept = jax.lax.dynamic_slice(store, at, one)
        return jax.lax.dynamic_update_slice(store, jnp.where(slot < store.shape[2], frame, kept), at)

    return jax.lax.fori_loop(0, slots.size, put, store) if store.shape[2] and count else store


def _check_choice(name: str, choice: object) -> None:
    """Refuse a decision whose arrays do not belong together: gathering would clamp what is missing."""
    if not isinstance(choice, Choice):
        raise UserError(
            f"policy {name!r}: choose returned {type(choice).__name__}; a rfjax.memory.Choice is needed, as from "
            "plain_choice"
        )
    shapes = {field.name: list(np.shape(getattr(choice, field.name))) for field in dataclasses.fields(choice)}
    for together in (("frames", "positions", "roles"), ("candidates", "scores"), ("selected",)):
        first, *others = (shapes[part] for part in together)
        if len(first) != 1 or any(other != first for other in others):
            said = ", ".join(f"{part} {shapes[part]}" for part in together)
            raise UserError(f"policy {name!r}: choose returned {said}; one axis of the same length is needed")


def _narrow(values: Array) -> Array:
    """Return whole numbers as int32 and others as float32, also where JAX counts in 64 bits by default."""
    return values.astype(jnp.int32 if jnp.issubdtype(values.dtype, jnp.integer) else jnp.float32)
