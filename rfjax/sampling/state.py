"""What passes from chunk to chunk, and how it is attended."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, DTypeLike, Float, Int

from rfjax.config import ModelConfig
from rfjax.memory import MemoryPolicy, MemoryShape, View
from rfjax.models.layout import remembered
from rfjax.models.transformer import AttendedMemory, rotate_memory
from rfjax.parallel.samples import Axes, sample_axes
from rfjax.pytree import pytree

TEXT_AXIS = 1
"""Of a `TextContext`'s arrays, the axis that counts samples."""
_MANY_CHUNKS = 64
"""A video as long as any that a policy may refuse as too short for it; no array is made."""


@pytree()
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """Everything that passes from one chunk to the next."""

    memory: Any
    """The policy's state."""
    start: Int[Array, "B"]
    """Index of the first frame of the chunk to come, for each sample."""
    gap: Int[Array, "B"]
    """How much further than usual the next chunk stands from all it remembers, in frames (a scene cut)."""
    recent: Float[Array, "B R H W C"]
    """Newest latents, where a later change of prompt needs them (R = 0 where none does)."""


def empty_state(
    policy: MemoryPolicy,
    shape: MemoryShape,
    video_frames: int,
    dtype: DTypeLike,
    latent_shape: tuple[int, ...],
    recent_frames: int = 0,
) -> RolloutState:
    """Return the state before a video's first chunk.

    Args:
        policy: decides what is kept.
        shape: of the memory, from `memory_shape`.
        video_frames: latent frames of the whole video.
        dtype: of keys and values.
        latent_shape: [H, W, C] of a latent frame.
        recent_frames: newest latents to be kept for a change of prompt.
    """
    none = jnp.zeros(shape.batch, jnp.int32)
    recent = jnp.zeros((shape.batch, recent_frames, *latent_shape), jnp.float32)
    return RolloutState(laid_out(policy.init(shape, video_frames, dtype), shape), none, none, recent)


def laid_out(memory: Any, shape: MemoryShape) -> Any:
    """Lay out a policy's state on devices that divide a video: its keys and values as attention reads them.

    What has no axis of all heads' channels is left to the compiler. A layout changes no result.
    """
    channels = shape.heads * shape.head_dim

    def lay(leaf):
        return remembered(leaf, shape.heads) if leaf.ndim == 5 and leaf.shape[-1] == channels else leaf

    return jax.tree.map(lay, memory)


def state_axes(mesh: Mesh | None, config: ModelConfig, frame_size: tuple[int, int], policy: MemoryPolicy) -> Axes:
    """Return `state_sample_axes` for `rfjax.parallel.samples.divided`; without a mesh nobody asks, and it is None."""
    return None if mesh is None else state_sample_axes(config, frame_size, policy)


def state_sample_axes(config: ModelConfig, frame_size: tuple[int, int], policy: MemoryPolicy) -> list[int | None]:
    """Return which axis of each of the state's arrays counts samples."""

    def make(samples: int) -> RolloutState:
        shape = memory_shape(config, samples, frame_size)
        return empty_state(policy, shape, _MANY_CHUNKS * config.chunk_frames, jnp.float32, (*frame_size, 1))

    return sample_axes(make)


def read_memory(policy: MemoryPolicy, state: RolloutState) -> View:
    """Gather what the next chunk attends to, at the positions where it attends to it."""
    view = policy.read(state.memory, state.start)
    trace = dataclasses.replace(view.trace, positions=view.trace.positions - state.gap[:, None, None, None])
    return dataclasses.replace(view, positions=view.positions - state.gap[None, :, None, None], trace=trace)


def attend(config: ModelConfig, frame_size: tuple[int, int], view: View) -> AttendedMemory:
    """Rotate a view to its time positions, once a chunk, for all passes."""
    rows, columns = token_grid(config, frame_size)
    keys = rotate_memory(view.keys, view.positions, view.places, rows, columns, config.transformer)
    keys, values = (remembered(x, config.transformer.num_heads) for x in (keys, view.values))
    return AttendedMemory(keys, values, view.length)


def memory_shape(config: ModelConfig, batch: int, frame_size: tuple[int, int]) -> MemoryShape:
    """Sizes of the memory of a batch of videos of that latent height and width."""
    rows, columns = token_grid(config, frame_size)
    return MemoryShape(
        layers=config.transformer.num_layers,
        batch=batch,
        heads=config.transformer.num_heads,
        head_dim=config.transformer.head_dim,
        rows=rows,
        columns=columns,
        chunk_frames=config.chunk_frames,
    )


def token_grid(config: ModelConfig, frame_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens in a frame of that latent height and width."""
    _, rows, columns = config.transformer.patch_size
    return frame_size[0] // rows, frame_size[1] // columns
