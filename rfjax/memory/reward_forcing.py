"""Reward Forcing: a sink into which the chunks that leave slowly fade (arXiv 2512.04678, JaydenLyh/Reward-Forcing)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rfjax.errors import UserError
from rfjax.memory.base import BLEND, SINK, TAIL, MemoryShape
from rfjax.memory.blends import BlendPolicy, BlendStore, empty_blend_store
from rfjax.memory.registry import register


@register("reward_forcing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardForcing(BlendPolicy):
    """Sink of one chunk, tail 3 and the own 3 frames at contiguous time positions.

    Frame i of each chunk that leaves the tail is folded into frame i of the sink, token by token:
    `sink = (1 - rate) * sink + rate * leaving`. Made for Reward Forcing's own weights. Source:
    `wan/modules/causal_model.py` of the public code, which folds in bfloat16 and so all but freezes the sink; here the
    sink is kept in float32 beside the store, which costs as much again as storing 6 more frames in bfloat16 (1.7 GB a
    video for the 1.3B network at 480x832).
    """

    tail_frames: int = 3
    """Last frames before the own chunk, a multiple of the chunk."""
    rate: float = 0.001
    """Weight of a leaving frame in the sink; 0 keeps the sink as it began."""

    def __post_init__(self):
        if self.tail_frames < 1:
            raise UserError(f"reward_forcing: tail_frames is {self.tail_frames}; 1 or more is needed")
        if not 0 <= self.rate <= 1:
            raise UserError(f"reward_forcing: rate is {self.rate}; a number from 0 to 1 is needed")

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> BlendStore:
        """Return an empty store of sink and tail.

        Raises:
            UserError: the tail is no multiple of the chunk.
        """
        chunk = shape.chunk_frames
        if self.tail_frames % chunk:
            raise UserError(
                f"reward_forcing: tail_frames is {self.tail_frames}; a multiple of the chunk's {chunk} is needed"
            )
        return empty_blend_store(shape, chunk + self.tail_frames, chunk, shape.frame_tokens, dtype)

    def fold(
        self,
        blends: Float[Array, "L B n T C"],
        lying: Float[Array, "L B n T C"],
        leaving: Float[Array, "L B n T C"],
        begun: Bool[Array, "B 1 1 1"],
    ) -> Float[Array, "L B n T C"]:
        """Fold each frame into its own; the sink begins as the video's first chunk."""
        sink = jnp.where(begun, blends, lying)
        return sink + self.rate * (leaving - sink)

    def newest(self, leaving: Int[Array, "B n"]) -> Int[Array, "B n"]:
        """Return the frame that was folded into each."""
        return leaving

    def roles(self, blended: Bool[Array, "N"]) -> Int[Array, "N"]:
        """SINK for the first chunk, BLEND once others are folded into it, TAIL for the others."""
        first = jnp.arange(len(blended)) < len(blended) - self.tail_frames
        return jnp.where(blended, BLEND, jnp.where(first, SINK, TAIL))
