"""What is kept of the past, and where on the time axis it is attended: one small file a policy.

Nothing here knows of a network. See `base` for the contract.
"""

from rfjax.memory.base import (
    BLEND,
    HISTORY,
    NONE,
    SINK,
    TAIL,
    CleanChunk,
    MemoryPolicy,
    MemoryShape,
    Trace,
    View,
)
from rfjax.memory.blends import BlendPolicy, BlendStore
from rfjax.memory.deep import DeepForcing, DeepSinkOnly
from rfjax.memory.footprint import Footprint, footprint
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, FrameStore, Stored, plain_choice
from rfjax.memory.infinity_rope import InfinityRope
from rfjax.memory.longlive import LongLive
from rfjax.memory.memrope import MemRope
from rfjax.memory.registry import POLICIES, create, parse, parse_text, register
from rfjax.memory.relaxed import RelaxForcing
from rfjax.memory.reward_forcing import RewardForcing
from rfjax.memory.rolling_sink import RollingSink
from rfjax.memory.rolling_window import RollingForcing
from rfjax.memory.slow_fast import ContextForcing
from rfjax.memory.window import AttentionSink, SelfForcing

__all__ = [
    "BLEND",
    "FOREVER",
    "HISTORY",
    "NONE",
    "POLICIES",
    "SINK",
    "TAIL",
    "AttentionSink",
    "BlendPolicy",
    "BlendStore",
    "Choice",
    "CleanChunk",
    "ContextForcing",
    "DeepForcing",
    "DeepSinkOnly",
    "Footprint",
    "FramePolicy",
    "FrameStore",
    "InfinityRope",
    "LongLive",
    "MemRope",
    "MemoryPolicy",
    "MemoryShape",
    "RelaxForcing",
    "RewardForcing",
    "RollingForcing",
    "RollingSink",
    "SelfForcing",
    "Stored",
    "Trace",
    "View",
    "create",
    "footprint",
    "parse",
    "parse_text",
    "plain_choice",
    "register",
]
