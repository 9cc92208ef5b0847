"""Another prompt in the middle of a video.

From the chunk of the switch on, cross-attention sees the new prompt. What is remembered was made under the old one; a
recache renews its newest part: one clean pass over the last latents, in which every frame sees every other and what the
memory holds of the time before. A scene cut moves all that is remembered far away, for one chunk.

Source: LongLive `pipeline/interactive_causal_inference.py` (KV recache, with its sink kept: `global_sink`),
Infinity-RoPE `wan/modules/causal_model.py` (its KV flush is a plain switch with its own policy; RoPE cut).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rfjax.config import ModelConfig
from rfjax.memory import BLEND, CleanChunk, MemoryPolicy, View
from rfjax.models.functional import AnyArray, Params, bind
from rfjax.models.transformer import AttendedMemory, TextContext, WanTransformer
from rfjax.parallel.samples import divided
from rfjax.sampling.state import TEXT_AXIS, RolloutState, attend, laid_out, memory_shape, read_memory, state_axes

WINDOW_CHUNKS = 4
"""Chunks of LongLive's window, own chunk included: videos up to here are renewed whole, and one chunk less of longer
ones, in whose window the first chunk is the sink."""

CUT_FRAMES = 42
"""How much further from its memory Infinity-RoPE places a chunk after a scene cut: at 45 where 3 frames come before."""


@dataclasses.dataclass(frozen=True)
class Switch:
    """A change of prompt."""

    start: int
    """Latent frame that begins the first chunk under the new prompt."""
    prompt_embeds: Float[AnyArray, "B T D"]
    """The new prompt of each sample."""
    recache: bool = True
    """Whether the newest frames of the memory are made anew under the new prompt."""
    cut: bool = False
    """Whether the scene changes: the first chunk is placed far from all that is remembered."""


def recached_frames(start: int, chunk_frames: int) -> int:
    """How many of the newest frames a recache renews at that place of the video."""
    return start if start <= WINDOW_CHUNKS * chunk_frames else (WINDOW_CHUNKS - 1) * chunk_frames


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "frames", "cut", "mesh"), donate_argnames="state")
def switch_prompt(
    config: ModelConfig,
    frame_size: tuple[int, int],
    frames: int,
    cut: bool,
    policy: MemoryPolicy,
    params: Params,
    prompt_embeds: Float[Array, "B T D"],
    state: RolloutState,
    mesh: Mesh | None = None,
) -> tuple[TextContext, RolloutState]:
    """Return the new prompt's context and the state with its `frames` newest frames renewed; the old one is consumed.

    Args:
        config: sizes (static).
        frame_size: latent rows and columns (static).
        frames: to be renewed, from `recached_frames`; 0 for a plain switch (static).
        cut: whether the scene changes (static).
        policy: whose memory it is.
        params: of the transformer.
        prompt_embeds: the new prompts.
        state: before the first chunk under the new prompt, with at least so many recent latents.
        mesh: of a model from `rfjax.parallelize` (static).
    """

    def switch(policy, params, prompt_embeds, state):
        network = bind(WanTransformer, config.transformer, params)
        text = network.embed_text(prompt_embeds)
        if frames:
            shape = memory_shape(config, state.start.shape[0], frame_size)
            memory = laid_out(_recache(config, frame_size, frames, policy, network, text, state), shape)
            state = dataclasses.replace(state, memory=memory)
        if cut:
            state = dataclasses.replace(state, gap=state.gap + CUT_FRAMES)
        return text, state

    states = state_axes(mesh, config, frame_size, policy)
    run = divided(switch, mesh, (None, None, 0, states), (TEXT_AXIS, states))
    return run(policy, params, prompt_embeds, state)


def _recache(config, frame_size, frames, policy, network, text, state):
    first = state.start - frames
    latents = state.recent[:, -frames:]
    memory = older_memory(config, frame_size, read_memory(policy, state), first, frames)
    timestep = jnp.zeros(latents.shape[:2], jnp.float32)
    _, made = network(latents, timestep, text, memory, return_projections=True)
    indices = first[:, None] + jnp.arange(frames, dtype=jnp.int32)
    return policy.recache(state.memory, CleanChunk(indices, made.queries, made.keys, made.values))


def older_memory(
    config: ModelConfig, frame_size: tuple[int, int], view: View, first: Int[Array, "B"], frames: int
) -> AttendedMemory:
    """Rotate what a view holds of the time before frame `first`, `frames` frames before the view's own chunk.

    A slot is left out where all layers and tokens have later frames in it; blends, which a recache does not renew,
    stay. Positions are counted from `first`; what stands closer to the chunk than that is moved back, all together, to
    end directly before it.
    """
    renewed = (view.trace.frames >= first[:, None, None, None]) & (view.trace.roles != BLEND)
    later = renewed.all(axis=(1, 3))
    left_out = later | ~view.valid
    order = jnp.argsort(left_out, axis=1, stable=True)

    def gather(array):
        """Reorder the slots of an array [layers, B, S, ...]."""
        return jnp.take_along_axis(array, order.reshape(1, *order.shape, *[1] * (array.ndim - 3)), axis=2)

    length = jnp.sum(~left_out, axis=1, dtype=jnp.int32)
    positions = gather(view.positions) + frames
    # Of slots that hold both, by layer or token, what is renewed stands where it truly is.
    older = ~gather(jnp.moveaxis(renewed, 1, 0)) & (jnp.arange(order.shape[1]) < length[:, None])[None, :, :, None]
    newest = jnp.max(jnp.where(older, positions, -1), axis=(0, 2, 3), keepdims=True, initial=-1)
    moved = dataclasses.replace(
        view,
        keys=gather(view.keys),
        values=gather(view.values),
        positions=positions - (newest + 1),
        places=None if view.places is None else gather(view.places),
        length=length,
    )
    return attend(config, frame_size, moved)
