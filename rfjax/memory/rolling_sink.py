"""Rolling Sink: the first frames, walked forth and back as a sink (arXiv 2602.07775, haodong2000/Rolling-Sink)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from rfjax.errors import UserError
from rfjax.memory.base import SINK, TAIL, MemoryShape
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, Stored, plain_choice
from rfjax.memory.registry import register


@register("rolling_sink")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RollingSink(FramePolicy):
    """Attend to a full window at true positions, of which only the tail, the chunk before, is what truly stands there.

    All earlier places hold copies of the first frames: 0, 1, .. 17, 17, 16, .. 0, 0, 1, .. in the order of the places,
    so a frame may be attended twice at once. Training-free, for Self-Forcing's weights. Source:
    `wan/modules/causal_model.py` of the public code, where the clean pass rewrites the cache; here the same frames are
    gathered when read, from the first 18 and the last 3. As published, every chunk also starts from the same
    noise, which is no part of the memory.
    """

    sink_frames: int = 15
    """Places before the tail that hold first frames of the video, a multiple of the chunk."""

    def __post_init__(self):
        if self.sink_frames < 1:
            raise UserError(f"rolling_sink: sink_frames is {self.sink_frames}; 1 or more is needed")

    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """The frames that are walked, and the tail."""
        chunk = shape.chunk_frames
        if self.sink_frames % chunk:
            raise UserError(
                f"rolling_sink: sink_frames is {self.sink_frames}; a multiple of the chunk's {chunk} is needed"
            )
        return self.sink_frames + 2 * chunk

    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """The walked frames stay; the others are in the tail of the next chunk."""
        chunk = shape.chunk_frames
        return jnp.where(frame < self.sink_frames + chunk, FOREVER, frame + chunk)

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Fill the places before the chunk."""
        chunk = stored.shape.chunk_frames
        walked = self.sink_frames + chunk
        positions = jnp.arange(-walked, 0)
        places = start + positions
        step, forth = places % walked, places // walked % 2 == 0
        in_tail = positions >= -chunk
        frames = jnp.where(in_tail, places, jnp.where(forth, step, walked - 1 - step))
        return plain_choice(jnp.where(places < 0, -1, frames), positions, jnp.where(in_tail, TAIL, SINK))
