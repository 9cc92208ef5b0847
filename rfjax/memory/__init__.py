"""What is kept of the past, and where on the time axis it is attended: one small file a policy.

Nothing here knows of a network. See `base` for the contract.
"""

from rfjax.memory.base import (
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
from rfjax.memory.footprint import Footprint, footprint
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, FrameStore, Stored, plain_choice
from rfjax.memory.registry import POLICIES, create, parse, register
from rfjax.memory.relaxed import RelaxForcing
from rfjax.memory.window import AttentionSink, SelfForcing

__all__ = [
    "FOREVER",
    "HISTORY",
    "NONE",
    "POLICIES",
    "SINK",
    "TAIL",
    "AttentionSink",
    "Choice",
    "CleanChunk",
    "Footprint",
    "FramePolicy",
    "FrameStore",
    "MemoryPolicy",
    "MemoryShape",
    "RelaxForcing",
    "SelfForcing",
    "Stored",
    "Trace",
    "View",
    "create",
    "footprint",
    "parse",
    "plain_choice",
    "register",
]
