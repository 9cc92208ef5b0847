"""LongLive: first and last frames where they truly stand (arXiv 2509.22622; NVlabs/LongLive, branch v1.0)."""

import dataclasses

from jaxtyping import Array, Int

from rfjax.memory.frames import Choice, Stored, plain_choice
from rfjax.memory.registry import register
from rfjax.memory.window import AttentionSink, roles_of


@register("longlive")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LongLive(AttentionSink):
    """Sink 3, tail 6 and the own 3 frames at true time positions: the attention sink without closing the gap.

    Made for LongLive's own weights. Its recache on a new prompt is the sampler's, for all policies; the sink stays
    as it was then (the public configurations' `global_sink`). Source: `wan/modules/causal_model.py` of the public code.
    """

    sink_frames: int = 3
    """First frames of the video, always kept."""
    tail_frames: int = 6
    """Last frames before the own chunk."""

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Attend to all that is stored, where it truly stands."""
        return plain_choice(stored.frames, stored.frames - start, roles_of(stored.frames, self.sink_frames))
