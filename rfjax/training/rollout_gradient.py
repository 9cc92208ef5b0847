"""The rollout that a generator learns from: its gradient flows through one pass a chunk, with memory held constant.

One exit step is drawn for the whole rollout; what the network predicts there is the chunk's output, and the clean pass
over it becomes memory. Only the exit passes are differentiated. The backward pass builds the memory anew from the
outputs, chunk by chunk, and adds up each chunk's gradient as it goes, so that it needs the memory of one chunk whatever
the rollout's length; of every chunk no more than its latents is kept.

Source: Self-Forcing `pipeline/self_forcing_training.py`, section 3.3 of arXiv 2506.08009.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from rfjax.config import ModelConfig
from rfjax.memory import MemoryPolicy
from rfjax.models.functional import Params, bind
from rfjax.models.transformer import TextContext, WanTransformer
from rfjax.sampling.passes import passes_over
from rfjax.sampling.request import ChunkNoise, draw_noise
from rfjax.sampling.rollout import commit, remember
from rfjax.sampling.state import RolloutState, empty_state, memory_shape, read_memory


@dataclasses.dataclass(frozen=True)
class RolloutPlan:
    """What is static of a rollout for training."""

    config: ModelConfig
    """Of the generator."""
    frame_size: tuple[int, int]
    """Latent rows and columns."""
    chunks: int
    """Generated one after the other."""
    gradient_chunks: int
    """How many of the last chunks are differentiated."""
    remat: bool = False
    """Whether the backward pass computes the activations of a layer again instead of keeping them."""

    @property
    def constant_chunks(self) -> int:
        """How many of the first chunks are not differentiated."""
        return self.chunks - self.gradient_chunks


def rollout_for_training(
    plan: RolloutPlan,
    policy: MemoryPolicy,
    params: Params,
    text: TextContext,
    noise: ChunkNoise,
    exit_step: int | Int[Array, ""],
) -> Float[Array, "B F H W C"]:
    """Return the latents of a rollout, to be differentiated with respect to `params` and `text`.

    The derivative is that of the exit passes of the last `gradient_chunks`, each with its noisy input and its memory
    held constant. It is added up in float32.

    Args:
        plan: what is static.
        policy: decides what is attended and kept.
        params: of the transformer, which computes in their type.
        text: `WanTransformer.embed_text` of the prompts.
        noise: keys, or what is given of each chunk on a first axis.
        exit_step: index of the denoising step whose x0 is the output, for all chunks.
    """
    chunks = jnp.asarray(_rollout(plan, policy, params, text, noise, exit_step))
    _, batch, _, *frame = chunks.shape
    return jnp.moveaxis(chunks, 0, 1).reshape(batch, -1, *frame)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rollout(plan, policy, params, text, noise, exit_step):
    return _forward(plan, policy, params, text, noise, exit_step)[0]


def _forward(plan, policy, params, text, noise, exit_step):
    def generate(state: RolloutState, given):
        own = dataclasses.replace(noise, initial=given[0], renoise=given[1])
        passes = passes_over(plan.config, plan.frame_size, params, text, read_memory(policy, state))
        initial, renoise = draw_noise(plan.config, plan.frame_size, state.start, own)
        latents, noisy = passes.denoise(initial, renoise, exit_step)
        return commit(policy, passes, state, latents), (latents, noisy)

    state = _empty(plan, policy, params, text)
    _, (latents, noisy) = jax.lax.scan(generate, state, (noise.initial, noise.renoise), length=plan.chunks)
    return latents, (policy, params, text, exit_step, latents, noisy[plan.constant_chunks :])


def _backward(plan, kept, cotangents):
    policy, params, text, exit_step, latents, noisy = kept
    first = plan.constant_chunks

    def replay(state: RolloutState, latents):
        return remember(plan.config, plan.frame_size, policy, params, text, state, latents), None

    def differentiate(carry, chunk):
        state, gradient = carry
        latents, noisy, cotangent = chunk
        passes = passes_over(plan.config, plan.frame_size, params, text, read_memory(policy, state))

        def exit_pass(params, text):
            network = bind(WanTransformer, plan.config.transformer, params)
            return dataclasses.replace(passes, network=network, text=text).predict(noisy, exit_step, plan.remat)

        _, pull = jax.vjp(exit_pass, params, text)
        gradient = jax.tree.map(lambda total, own: total + own.astype(jnp.float32), gradient, pull(cotangent))
        return (commit(policy, passes, state, latents), gradient), None

    state = _empty(plan, policy, params, text)
    if first:
        state, _ = jax.lax.scan(replay, state, latents[:first])
    gradient = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (params, text))
    chunks = (latents[first:], noisy, cotangents[first:])
    (_, gradient), _ = jax.lax.scan(differentiate, (state, gradient), chunks)
    by_params, by_text = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, (params, text))
    return None, by_params, by_text, None, None


_rollout.defvjp(_forward, _backward)


def _empty(plan: RolloutPlan, policy: MemoryPolicy, params: Params, text: TextContext) -> RolloutState:
    """Return the state before the first chunk."""
    config, frame_size = plan.config, plan.frame_size
    shape = memory_shape(config, text.keys.shape[1], frame_size)
    dtype: DTypeLike = params["patch_embedding"]["kernel"].dtype
    frames = plan.chunks * config.chunk_frames
    return empty_state(policy, shape, frames, dtype, (*frame_size, config.transformer.in_dim))
