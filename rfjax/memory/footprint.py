"""How large a policy's memory is, known before anything is allocated."""

import dataclasses

import jax
from jaxtyping import DTypeLike

from rfjax.memory.base import MemoryPolicy, MemoryShape
from rfjax.memory.check import check_policy


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Frames and bytes of a memory."""

    attended_frames: int
    """Frames that a chunk attends to once the memory is full, its own included."""
    state_bytes: int
    """What is kept from chunk to chunk."""
    view_bytes: int
    """What is gathered and rotated for one chunk."""


def footprint(policy: MemoryPolicy, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> Footprint:
    """Measure the policy's state and view for a batch, abstractly.

    Raises:
        UserError: the policy's settings do not fit the shape, or it does not follow the contract.
    """
    state, view = check_policy(policy, shape, video_frames, dtype)
    return Footprint(
        attended_frames=view.keys.shape[2] + shape.chunk_frames,
        state_bytes=_size(state),
        view_bytes=_size((view.keys, view.values)),
    )


def _size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
