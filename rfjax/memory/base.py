"""The memory contract: a fixed-shape store of frames, the view that a chunk attends to, and the policy protocol.

A policy is three pure functions over a pytree of fixed shapes: `init` makes the state, `read` gathers what the next
chunk attends to, once a chunk, and `commit` adds the finished chunk. Keys are stored after the key norm and before
the rotary embedding, so that a policy may place any frame at any time position when it is read.

Most policies keep whole frames and differ in two decisions only: which frames the chunk at `start` attends, where on
the time axis, and until when a frame may still be asked for. `FramePolicy` takes these two decisions for one sample
and does all moving of data, for the batch.

Shapes: L layers, B samples, N stored frames, S attended frames, T tokens a frame, C = heads * head_dim, n = frames a
chunk. Heads stay flattened because the last two axes (12, 128) would be padded by a third in TPU memory.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rfjax.pytree import pytree

NONE, SINK, HISTORY, TAIL = 0, 1, 2, 3
"""Roles of an attended frame, as they stand in `Trace.roles`."""

FOREVER = 2**30
"""`last_reader` of a frame that is never freed."""


@dataclasses.dataclass(frozen=True)
class MemoryShape:
    """Sizes of the network and the batch that a memory is made for."""

    layers: int
    """Of the transformer; each has keys and values of its own."""
    batch: int
    """Videos made together."""
    heads: int
    """Of each attention."""
    head_dim: int
    """Channels of a head."""
    frame_tokens: int
    """Tokens of one latent frame."""
    chunk_frames: int
    """Latent frames generated together."""


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


@pytree()
@dataclasses.dataclass(frozen=True)
class Trace:
    """What one chunk attended beside itself. -1 stands for none in every index."""

    frames: Int[Array, "*chunks B S"]
    """True index of each attended frame."""
    positions: Int[Array, "*chunks B S"]
    """Time position of each attended frame, counted from the chunk's first frame."""
    roles: Int[Array, "*chunks B S"]
    """NONE, SINK, HISTORY or TAIL."""
    selected_frames: Int[Array, "*chunks B history"]
    """Frames that the policy chose by score, in time order."""
    candidates: Int[Array, "*chunks B candidates"]
    """Frames among which it chose."""
    scores: Float[Array, "*chunks B candidates"]
    """Score of each candidate, NaN where there is none."""


@pytree()
@dataclasses.dataclass(frozen=True)
class View:
    """The frames that a chunk attends to, gathered into fixed slots, valid ones first."""

    keys: Float[Array, "L B S T C"]
    """Keys before the rotary embedding."""
    values: Float[Array, "L B S T C"]
    positions: Int[Array, "B S"]
    """Time position at which each frame is to be rotated, counted from the chunk's first frame."""
    length: Int[Array, "B"]
    """How many of the S slots are valid."""
    trace: Trace

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Whether each slot holds a frame."""
        return jnp.arange(self.positions.shape[1]) < self.length[:, None]


@runtime_checkable
class MemoryPolicy(Protocol):
    """What every memory policy provides. Policies are pytrees: numbers are traced leaves, sizes are static."""

    name: ClassVar[str]

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> Any:
        """Return the empty state; only a policy that never forgets makes it depend on the video's length.

        Raises:
            UserError: the settings do not fit the shape.
        """
        ...

    def read(self, state: Any, start: Int[Array, "B"]) -> View:
        """Gather what the chunk whose first frame is `start` attends to."""
        ...

    def commit(
        self, state: Any, keys: Float[Array, "L B n T C"], values: Float[Array, "L B n T C"], start: Int[Array, "B"]
    ) -> Any:
        """Return the state with the chunk's clean keys and values added."""
        ...


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
    """Base of the policies that keep whole frames unchanged: decisions for one sample there, moving of data here."""

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
        slots = self.capacity(shape, video_frames)
        channels = shape.heads * shape.head_dim
        kv = (shape.layers, shape.batch, slots, shape.frame_tokens, channels)
        chunk = jax.ShapeDtypeStruct((*kv[:2], shape.chunk_frames, *kv[3:]), dtype)
        features = jax.eval_shape(lambda keys: self.describe(keys, shape), chunk)
        return FrameStore(
            keys=jnp.zeros(kv, dtype),
            values=jnp.zeros(kv, dtype),
            frames=jnp.full((shape.batch, slots), -1, jnp.int32),
            features=jnp.zeros((shape.batch, slots, features.shape[-1]), features.dtype),
            shape=shape,
        )

    def read(self, state: FrameStore, start: Int[Array, "B"]) -> View:
        """Gather the frames chosen for each sample, valid ones first."""

        def decide(frames, features, start):
            return self._decide(Stored(frames, features, state.shape), start)

        choice = jax.vmap(decide)(state.frames, state.features, start)
        keys, values = state.keys, state.values
        if not self.attends_store:
            slots = jnp.argmax(state.frames[:, None, :] == choice.frames[:, :, None], axis=2)
            samples = jnp.arange(slots.shape[0])[:, None]
            keys, values = keys[:, samples, slots], values[:, samples, slots]
        trace = Trace(
            frames=choice.frames,
            positions=choice.positions,
            roles=choice.roles,
            selected_frames=choice.selected,
            candidates=choice.candidates,
            scores=choice.scores,
        )
        return View(keys, values, choice.positions, jnp.sum(choice.frames >= 0, axis=1, dtype=jnp.int32), trace)

    def _decide(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Return one sample's choice, gathered frames with the valid ones first; slots are filled in that order."""
        choice = jax.tree.map(_narrow, self.choose(stored, start))
        if self.attends_store:
            return choice
        order = jnp.argsort(choice.frames < 0, stable=True)
        return dataclasses.replace(
            choice, frames=choice.frames[order], positions=choice.positions[order], roles=choice.roles[order]
        )

    def commit(
        self,
        state: FrameStore,
        keys: Float[Array, "L B n T C"],
        values: Float[Array, "L B n T C"],
        start: Int[Array, "B"],
    ) -> FrameStore:
        """Free the frames that no later chunk can ask for and store those of the chunk that one can."""
        chunk_frames = keys.shape[2]
        new = start[:, None] + jnp.arange(chunk_frames, dtype=jnp.int32)
        following = start[:, None] + chunk_frames
        live = (state.frames >= 0) & (self.last_reader(state.frames, state.shape) >= following)
        wanted = self.last_reader(new, state.shape) >= following
        # The k-th wanted frame goes to the k-th free slot; the others to a slot beyond the last, which is none.
        beyond = state.frames.shape[1]
        free = jnp.pad(jnp.argsort(live, axis=1, stable=True), ((0, 0), (0, chunk_frames)), constant_values=beyond)
        rank = jnp.cumsum(wanted, axis=1) - 1
        slots = jnp.where(wanted, jnp.take_along_axis(free, jnp.maximum(rank, 0), axis=1), beyond)
        samples = jnp.arange(slots.shape[0])[:, None]
        features = self.describe(keys, state.shape)
        return dataclasses.replace(
            state,
            keys=_write(state.keys, keys, slots),
            values=_write(state.values, values, slots),
            frames=jnp.where(live, state.frames, -1).at[samples, slots].set(new, mode="drop"),
            features=state.features.at[samples, slots].set(features, mode="drop"),
        )


def _narrow(values: Array) -> Array:
    """Return whole numbers as int32 and others as float32, also where JAX counts in 64 bits by default."""
    return values.astype(jnp.int32 if jnp.issubdtype(values.dtype, jnp.integer) else jnp.float32)


def _write(
    store: Float[Array, "L B N T C"], new: Float[Array, "L B n T C"], slots: Int[Array, "B n"]
) -> Float[Array, "L B N T C"]:
    """Put each new frame into its slot, in place, unless that is beyond the last.

    One slice at a time: XLA's scatter takes 3.6 times as long on a CPU and widens a bfloat16 store to float32 there.
    """
    count = slots.shape[1]
    one = (store.shape[0], 1, 1, *store.shape[3:])

    def put(k, store):
        sample, i = k // count, k % count
        slot = slots[sample, i]
        at = (0, sample, jnp.minimum(slot, store.shape[2] - 1), 0, 0)
        frame = jax.lax.dynamic_slice(new, (0, sample, i, 0, 0), one)
        kept = jax.lax.dynamic_slice(store, at, one)
        return jax.lax.dynamic_update_slice(store, jnp.where(slot < store.shape[2], frame, kept), at)

    return jax.lax.fori_loop(0, slots.size, put, store) if store.shape[2] else store
