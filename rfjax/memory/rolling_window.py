"""Rolling Forcing: the last frames, and for its joint window the first ones too (arXiv 2509.25161).

Source: TencentARC/RollingForcing `wan/modules/causal_model.py` (CausalWanSelfAttention), `pipeline/
rolling_forcing_inference.py`.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from rfjax.errors import UserError
from rfjax.memory.base import MemoryShape, View
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, FrameStore, Stored, plain_choice
from rfjax.memory.registry import register
from rfjax.memory.window import roles_of


@register("rolling_forcing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RollingForcing(FramePolicy):
    """The memory that Rolling Forcing was trained with, for `rfjax.sampling.rolling`.

    The joint window attends to the anchor, the video's first frames, closed up to the last frames before the window.
    The clean pass of a finished chunk attends to the last frames alone, at their true positions; so does every pass of
    the plain chunk rollout, in which this is `self_forcing` with a window.
    """

    anchor_frames: int = 3
    """First frames of the video, attended by every joint window."""
    window_frames: int = 21
    """Attended frames, anchor and own frames included."""

    def __post_init__(self):
        for name, least in (("anchor_frames", 0), ("window_frames", 1)):
            if getattr(self, name) < least:
                raise UserError(f"rolling_forcing: {name} is {getattr(self, name)}; {least} or more is needed")

    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """The anchor and what the clean pass attends to."""
        least = max(self.anchor_frames, 1) + shape.chunk_frames
        if self.window_frames < least:
            raise UserError(
                f"rolling_forcing: window_frames is {self.window_frames}; anchor_frames {self.anchor_frames} and the "
                f"chunk's {shape.chunk_frames} need at least {least}"
            )
        return self.anchor_frames + self.window_frames - shape.chunk_frames

    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """The anchor stays; no window reaches further back than the clean pass."""
        return jnp.where(frame < self.anchor_frames, FOREVER, frame + self.window_frames - shape.chunk_frames)

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """The clean pass: the last frames, where they truly stand."""
        return self._first_and_last(start, 0, self.window_frames - stored.shape.chunk_frames)

    def read_window(self, state: FrameStore, start: Int[Array, "B"], frames: int) -> View:
        """Gather what a joint window of so many frames attends to: the anchor, and as many of the last as it has room.

        Args:
            state: the memory.
            start: first frame of the window.
            frames: of the window.
        """
        room = max(self.window_frames - self.anchor_frames - frames, 0)
        return self.gather(state, start, lambda _, start: self._first_and_last(start, self.anchor_frames, room))

    def _first_and_last(self, start: Int[Array, ""], most_first: int, most_last: int) -> Choice:
        """Choose the video's first frames and the last before `start`, at contiguous positions that end there."""
        first = jnp.minimum(start, most_first)
        count = first + jnp.minimum(start - first, most_last)
        place = jnp.arange(most_first + most_last)
        frames = jnp.where(place < first, place, start - count + place)
        frames = jnp.where(place < count, frames, -1)
        return plain_choice(frames, place - count, roles_of(frames, self.anchor_frames))
