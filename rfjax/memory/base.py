"""The memory contract: a fixed-shape store of frames, the view that a chunk attends to, and the policy protocol.

A policy is three pure functions over a pytree of fixed shapes: `init` makes the state, `read` gathers what the next
chunk attends to, once a chunk, and `commit` adds the finished chunk. A fourth, `recache`, renews what is stored when
the prompt changes. Keys are stored after the key norm and before the rotary embedding, so that a policy may place any
frame at any time position when it is read.

Most policies keep whole frames and differ in two decisions only: which frames the chunk at `start` attends, where on
the time axis, and until when a frame may still be asked for. For these, `rfjax.memory.frames.FramePolicy` does all
moving of data.

Shapes: L layers, B samples, N stored frames, S attended frames, T tokens a frame, C = heads * head_dim, n = frames a
chunk. Y is L where every layer attends to frames of its own, else 1; P is T where every token of a slot has a frame of
its own, else 1. Heads stay flattened because the last two axes (12, 128) would be padded by a third in TPU memory.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rfjax.pytree import pytree

NONE, SINK, HISTORY, TAIL, BLEND = 0, 1, 2, 3, 4
"""Roles of an attended frame, as they stand in `Trace.roles`."""


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
    rows: int
    """Of tokens in a latent frame."""
    columns: int
    """Of tokens in a latent frame."""
    chunk_frames: int
    """Latent frames generated together."""

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.rows * self.columns


@pytree()
@dataclasses.dataclass(frozen=True)
class CleanChunk:
    """What the clean pass makes of finished frames, for the memory; see `rfjax.models.transformer.Projections`."""

    frames: Int[Array, "B n"]
    """True index of each frame, -1 where there is none."""
    queries: Float[Array, "L B n T C"]
    """After the norm, before the rotary embedding."""
    keys: Float[Array, "L B n T C"]
    """After the norm, before the rotary embedding."""
    values: Float[Array, "L B n T C"]


@pytree()
@dataclasses.dataclass(frozen=True)
class Trace:
    """What one chunk attended beside itself. -1 stands for none in every frame index."""

    frames: Int[Array, "*chunks B Y S P"]
    """True index of each attended frame; what is a blend of frames has the newest of them."""
    positions: Int[Array, "*chunks B Y S P"]
    """Its time position, counted from the chunk's first frame."""
    roles: Int[Array, "*chunks B Y S P"]
    """NONE, SINK, HISTORY, TAIL or BLEND."""
    selected_frames: Int[Array, "*chunks B Y history"]
    """Frames that the policy chose by score, in time order."""
    candidates: Int[Array, "*chunks B Y candidates"]
    """Frames among which it chose."""
    scores: Float[Array, "*chunks B Y candidates"]
    """Score of each candidate, NaN where there is none."""


@pytree()
@dataclasses.dataclass(frozen=True)
class View:
    """The frames that a chunk attends to, gathered into fixed slots, valid ones first."""

    keys: Float[Array, "L B S T C"]
    """Keys before the rotary embedding."""
    values: Float[Array, "L B S T C"]
    positions: Int[Array, "Y B S P"]
    """Time position at which each frame or token is to be rotated, counted from the chunk's first frame."""
    places: Int[Array, "Y B S T"] | None
    """Place of each token in its frame, row by row; None where slots hold whole frames."""
    length: Int[Array, "B"]
    """How many of the S slots are valid."""
    trace: Trace

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Whether each slot holds a frame."""
        return jnp.arange(self.keys.shape[2]) < self.length[:, None]


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

    def commit(self, state: Any, chunk: CleanChunk) -> Any:
        """Return the state with a finished chunk added."""
        ...

    def recache(self, state: Any, frames: CleanChunk) -> Any:
        """Return the state with those of its frames renewed that are among the given ones, made under a new prompt.

        Given are the newest frames of the video, one to four chunks of them, in the order of time.
        """
        ...
