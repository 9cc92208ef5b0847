"""Several policies at once: variants that differ in numbers alone, on one more axis of the same program."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rfjax.errors import UserError
from rfjax.memory import MemoryPolicy
from rfjax.models.functional import AnyArray
from rfjax.models.model import Model
from rfjax.sampling.request import Sizes, request_of
from rfjax.sampling.rollout import Chunk, chunk_step, encode_text
from rfjax.sampling.state import empty_state, memory_shape


def stream_variants(
    model: Model,
    policies: Sequence[MemoryPolicy],
    prompt_embeds: Float[AnyArray, "B T D"],
    noise: tuple[int, ...],
    key: Array,
) -> Iterator[Chunk]:
    """Generate the same videos under each of V policies, chunk by chunk.

    All arrays of a chunk have the V policies on their first axis. Each is, to rounding, what `rfjax.stream` gives for
    that policy with the same prompts, noise and key; parameters, text and noise are there once for all.

    Args:
        model: from `rfjax.load`.
        policies: of one class and with the same settings, those that are floats aside.
        prompt_embeds: one prompt a sample, as for `rfjax.stream`.
        noise: the shape [B, F, H, W, C] of the latents of one policy.
        key: one key, or an array of B keys, one a sample.

    Raises:
        UserError: policies that differ in more than numbers, or shapes that do not fit the model or each other.
    """
    if not policies:
        raise UserError("policies is empty; at least one is needed")
    structures = [jax.tree.structure(policy) for policy in policies]
    for policy, structure in zip(policies, structures, strict=True):
        if structure != structures[0]:
            raise UserError(
                f"policies has {policies[0]} and {policy}; they may differ in settings that are floats only"
            )
    sizes, drawn = request_of(model.config, prompt_embeds, noise, None, key, None)
    # Stacked Python numbers stay weakly typed, so that a bfloat16 memory stays one.
    stacked = jax.tree.map(lambda *numbers: jnp.stack([jnp.asarray(number) for number in numbers]), *policies)
    return _stream(model, stacked, len(policies), jnp.asarray(prompt_embeds), sizes, drawn)


def _stream(model, policies, count, prompt_embeds, sizes, noise):
    params, dtype = model.transformer, jnp.dtype(model.dtype)
    text, states = _begin(model.config, sizes, dtype, count, policies, params, prompt_embeds)
    for index in range(sizes.chunks):
        states, chunk = step_variants(model.config, sizes.frame_size, policies, params, text, states, noise.at(index))
        yield chunk


@functools.partial(jax.jit, static_argnames=("config", "sizes", "dtype", "count"))
def _begin(config, sizes: Sizes, dtype, count, policies, params, prompt_embeds):
    """Return the text, once, and the empty states of `count` policies."""
    text = encode_text(config, params, prompt_embeds)
    shape = memory_shape(config, prompt_embeds.shape[0], sizes.frame_size)

    def empty(policy):
        return empty_state(policy, shape, sizes.video_frames, dtype, sizes.generated[2:])

    return text, jax.vmap(empty, axis_size=count)(policies)


@functools.partial(jax.jit, static_argnames=("config", "frame_size"), donate_argnames="states")
def step_variants(config, frame_size, policies, params, text, states, noise):
    """`chunk_step` for policies and states with a leading axis; the states given are consumed."""

    def one(policy, state):
        return chunk_step(config, frame_size, policy, params, text, state, noise)

    return jax.vmap(one)(policies, states)


def side_by_side(chunk: Chunk) -> Chunk:
    """Return a chunk of V policies with B samples each as one of V * B samples, policy by policy."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), chunk)
