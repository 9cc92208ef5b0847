"""MemRoPE: first frames, a long and a short average of all that left, last frames (arXiv 2603.12513)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rfjax.errors import UserError
from rfjax.memory.base import BLEND, SINK, TAIL, MemoryShape
from rfjax.memory.blends import BlendPolicy, BlendStore, empty_blend_store
from rfjax.memory.registry import register

AVERAGES = 2
"""The long one and the short one."""


@register("memrope")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemRope(BlendPolicy):
    """Sink 3, two averages, tail 4 and the own 3 frames at contiguous time positions.

    The mean of the leaving frames, over all of their tokens, is folded into both averages with a rate of each; an
    average is attended as a frame whose tokens are all alike. The two frames after the sink make room for the averages
    and are lost. Training-free, for the weights of Self-Forcing or LongLive. Source: `wan/modules/causal_model.py` of
    the public code (YoungRaeKimm/MemRoPE), whose averages are bfloat16, and so 11% off after 200 chunks.
    """

    sink_frames: int = 3
    """First frames of the video, always kept."""
    tail_frames: int = 4
    """Last frames before the own chunk."""
    long_rate: float = 0.01
    """Weight of a leaving chunk in the long average."""
    short_rate: float = 0.1
    """Weight of a leaving chunk in the short average."""

    def __post_init__(self):
        for name, least in (("sink_frames", 0), ("tail_frames", 1)):
            if getattr(self, name) < least:
                raise UserError(f"memrope: {name} is {getattr(self, name)}; {least} or more is needed")
        for name in ("long_rate", "short_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"memrope: {name} is {getattr(self, name)}; a number from 0 to 1 is needed")

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> BlendStore:
        """Return an empty store of sink, averages and tail.

        Raises:
            UserError: they are no multiple of the chunk, or the tail is shorter than it.
        """
        slots, chunk = self.sink_frames + AVERAGES + self.tail_frames, shape.chunk_frames
        if self.tail_frames < chunk or slots % chunk:
            raise UserError(
                f"memrope: tail_frames is {self.tail_frames}; at least the chunk's {chunk} are needed, and with "
                f"sink_frames {self.sink_frames} and {AVERAGES} averages a multiple of them"
            )
        return empty_blend_store(shape, slots, AVERAGES, 1, dtype)

    def fold(
        self,
        blends: Float[Array, "L B 2 1 C"],
        lying: Float[Array, "L B 2 T C"],
        leaving: Float[Array, "L B n T C"],
        begun: Bool[Array, "B 1 1 1"],
    ) -> Float[Array, "L B 2 1 C"]:
        """Fold the mean over frames and tokens; the averages begin as the first such mean."""
        mean = jnp.mean(leaving, axis=(2, 3), keepdims=True, dtype=jnp.float32)
        rates = jnp.stack([jnp.asarray(rate, jnp.float32) for rate in (self.long_rate, self.short_rate)])[:, None, None]
        return jnp.where(begun, blends + rates * (mean - blends), mean)

    def newest(self, leaving: Int[Array, "B n"]) -> Int[Array, "B 1"]:
        """Return the chunk's last frame: both averages hold all of it."""
        return leaving[:, -1:]

    def roles(self, blended: Bool[Array, "N"]) -> Int[Array, "N"]:
        """SINK for the first frames, BLEND for the averages, TAIL for the others."""
        return jnp.where(jnp.arange(len(blended)) < self.sink_frames, SINK, jnp.where(blended, BLEND, TAIL))
