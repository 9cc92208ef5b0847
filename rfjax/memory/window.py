"""Windows: the last frames, with or without the first ones."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from rfjax.errors import UserError
from rfjax.memory.base import SINK, TAIL, MemoryShape
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, Stored, plain_choice
from rfjax.memory.registry import register


def roles_of(frames: Int[Array, "N"], sink_frames: int) -> Int[Array, "N"]:
    """SINK for the video's first frames, TAIL for the others."""
    return jnp.where(frames < sink_frames, SINK, TAIL)


@register("self_forcing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfForcing(FramePolicy):
    """The memory that Self-Forcing was trained with: everything, or a sliding window, at true time positions.

    Source: Self-Forcing `wan/modules/causal_model.py` (`local_attn_size`, `sink_size`).
    """

    window_frames: int | None = None
    """Attended frames, sink and own chunk included; None keeps every frame of the video."""
    sink_frames: int = 0
    """First frames of the video that are always kept."""

    attends_store = True

    def __post_init__(self):
        if self.sink_frames < 0:
            raise UserError(f"self_forcing: sink_frames is {self.sink_frames}; 0 or more is needed")
        if self.window_frames is not None and self.window_frames < 1:
            raise UserError(f"self_forcing: window_frames is {self.window_frames}; a positive number is needed")

    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """All frames before the last chunk, or the window without the own chunk."""
        if self.window_frames is None:
            return max(video_frames - shape.chunk_frames, 0)
        past = self.window_frames - shape.chunk_frames
        if past < 0 or (self.sink_frames and past <= self.sink_frames):
            raise UserError(
                f"self_forcing: window_frames is {self.window_frames}; sink_frames {self.sink_frames} and the chunk's "
                f"{shape.chunk_frames} need at least {self.sink_frames + shape.chunk_frames + bool(self.sink_frames)}"
            )
        return past

    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """A frame leaves once as many later ones are stored as the window holds beside the sink."""
        if self.window_frames is None:
            return jnp.full_like(frame, FOREVER)
        tail = self.window_frames - shape.chunk_frames - self.sink_frames
        return jnp.where(frame < self.sink_frames, FOREVER, frame + tail)

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Attend to all that is stored, where it truly stands."""
        return plain_choice(stored.frames, stored.frames - start, roles_of(stored.frames, self.sink_frames))


@register("attention_sink")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSink(FramePolicy):
    """First and last frames at contiguous time positions that end at the own chunk: Relax Forcing's baseline."""

    sink_frames: int = 3
    """First frames of the video, always kept."""
    tail_frames: int = 15
    """Last frames before the own chunk."""

    attends_store = True

    def __post_init__(self):
        for name in ("sink_frames", "tail_frames"):
            if getattr(self, name) < 0:
                raise UserError(f"{self.name}: {name} is {getattr(self, name)}; 0 or more is needed")

    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """Sink and tail."""
        return self.sink_frames + self.tail_frames

    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """Sink frames stay; the others are in the tail of the next `tail_frames` frames."""
        return jnp.where(frame < self.sink_frames, FOREVER, frame + self.tail_frames)

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Attend to all that is stored, closed up in time order."""
        frames = stored.frames
        later = jnp.sum(frames[None, :] > frames[:, None], axis=1)
        return plain_choice(frames, -1 - later, roles_of(frames, self.sink_frames))
