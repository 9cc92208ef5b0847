"""Infinity-RoPE: the first frame and the last two, closed up (arXiv 2511.20649; yesiltepe-hidir/infinity-rope)."""

import dataclasses

from rfjax.memory.registry import register
from rfjax.memory.window import AttentionSink


@register("infinity_rope")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InfinityRope(AttentionSink):
    """Sink 1, tail 2 and the own 3 frames at contiguous time positions: a small attention sink.

    The method's KV flush at a new prompt keeps what this window keeps in any case, so it equals a plain switch. Its
    scene cut is the sampler's, for all policies: for one chunk the memory stands 42 frames further away. Source:
    `wan/modules/causal_model.py` and `pipeline/causal_inference.py` of the public code, which keeps three frames where
    the paper's abstract says two.
    """

    sink_frames: int = 1
    """First frames of the video, always kept."""
    tail_frames: int = 2
    """Last frames before the own chunk."""
