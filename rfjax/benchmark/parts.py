"""The parts of a rollout as compiled functions of their own, and a memory filled without generating.

Each part does what `rfjax.sampling.rollout.chunk_step` does at that place, through the same public functions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rfjax.config import ModelConfig
from rfjax.memory import CleanChunk, MemoryPolicy
from rfjax.models.attention import attention
from rfjax.models.functional import Params, abstract_params, bind
from rfjax.models.transformer import AttendedMemory, TextContext, WanTransformer
from rfjax.models.vae import DecoderCache, decode_next
from rfjax.sampling.state import RolloutState, attend, empty_state, memory_shape, read_memory


def random_weights(network: Callable[..., nnx.Module], config: Any, dtype: Any) -> Params:
    """Return weights of `network(config)` that repeat a million small random numbers: quick to make, and no slower.

    `init_params` compiles a program for the initial distributions, which takes longer than the measurement.
    """
    numbers = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(dtype)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.resize(numbers, leaf.shape)), abstract_params(network, config, dtype)
    )


@functools.partial(jax.jit, static_argnames="config")
def text_context(config: ModelConfig, params: Params, prompt_embeds: Float[Array, "B T D"]) -> TextContext:
    """Project prompt embeddings to the keys and values of every cross-attention."""
    return bind(WanTransformer, config.transformer, params).embed_text(prompt_embeds)


@functools.partial(jax.jit, static_argnames=("config", "frame_size"))
def gather(
    config: ModelConfig, frame_size: tuple[int, int], policy: MemoryPolicy, state: RolloutState
) -> AttendedMemory:
    """Choose, gather and rotate what the next chunk attends to."""
    return attend(config, frame_size, read_memory(policy, state))


@functools.partial(jax.jit, static_argnames="config")
def denoising_pass(
    config: ModelConfig,
    params: Params,
    text: TextContext,
    memory: AttendedMemory,
    latents: Float[Array, "B n H W C"],
    timestep: Float[Array, "B n"],
) -> Float[Array, "B n H W C"]:
    """Predict a chunk's flow."""
    return bind(WanTransformer, config.transformer, params)(latents, timestep, text, memory)[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def clean_pass(
    config: ModelConfig,
    policy: MemoryPolicy,
    params: Params,
    text: TextContext,
    memory: AttendedMemory,
    state: RolloutState,
    latents: Float[Array, "B n H W C"],
) -> RolloutState:
    """Make a chunk's clean keys and values and commit them; the state given is consumed."""
    batch, frames = latents.shape[:2]
    network = bind(WanTransformer, config.transformer, params)
    _, made = network(latents, jnp.zeros((batch, frames)), text, memory, return_projections=True)
    assert made is not None
    indices = state.start[:, None] + jnp.arange(frames)
    chunk = CleanChunk(indices, made.queries, made.keys, made.values)
    return dataclasses.replace(state, memory=policy.commit(state.memory, chunk), start=state.start + frames)


@jax.jit
def self_attention(
    q: Float[Array, "B Q H D"], k: Float[Array, "B K H D"], v: Float[Array, "B K H D"], length: Int[Array, "B"]
) -> Float[Array, "B Q H D"]:
    """One layer's attention of a chunk to itself and its memory."""
    return attention(q, k, v, length)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_frame(
    config: ModelConfig, params: Params, cache: DecoderCache, latent: Float[Array, "B 1 H W C"]
) -> tuple[DecoderCache, Float[Array, "B T height width 3"]]:
    """Decode one latent frame, as `rfjax.sampling.pipeline` does, to several video frames."""
    assert config.vae is not None
    return decode_next(config.vae, params, cache, latent)


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "batch", "video_frames", "dtype"))
def state_at(
    config: ModelConfig,
    frame_size: tuple[int, int],
    batch: int,
    video_frames: int,
    dtype: Any,
    policy: MemoryPolicy,
    chunk: Int[Array, ""],
) -> RolloutState:
    """Return the state before the given chunk, as if the chunks before had been generated.

    Every chunk is committed in its turn, so that any policy's memory is in a state which it can reach; its keys and
    values are random numbers instead of the network's, on which speed does not depend.
    """
    shape = memory_shape(config, batch, frame_size)
    sizes = (shape.layers, batch, shape.chunk_frames, shape.frame_tokens, shape.heads * shape.head_dim)
    numbers = jax.random.normal(jax.random.key(0), sizes, dtype)

    def add(index, memory):
        kv = jnp.roll(numbers, index, axis=-1)  # other numbers for each chunk, at the price of a copy
        frames = jnp.full((batch, 1), index * shape.chunk_frames) + jnp.arange(shape.chunk_frames)
        return policy.commit(memory, CleanChunk(frames, kv, kv, kv))

    latent_shape = (*frame_size, config.transformer.in_dim)
    state = empty_state(policy, shape, video_frames, dtype, latent_shape)
    memory = jax.lax.fori_loop(0, chunk, add, state.memory)
    return dataclasses.replace(state, memory=memory, start=jnp.full(batch, chunk * shape.chunk_frames))
