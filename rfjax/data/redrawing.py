"""Clips as a student draws them, on which stage `vae` trains its decoder."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rfjax.memory import MemoryPolicy
from rfjax.models.model import Model
from rfjax.sampling.rollout import rollout
from rfjax.sampling.schedule import add_noise, few_steps, sigma_at


def redraw(
    model: Model,
    policy: MemoryPolicy,
    latents: Float[Array, "B F h w C"],
    prompt_embeds: Float[Array, "B T D"],
    step: int,
    keys: Key[Array, "B"],
) -> Float[Array, "B F h w C"]:
    """Hide latents under noise, and let the student denoise them again, chunk by chunk.

    Things stay about where they were, and look as the student makes them: the more of its steps, the more so.
    Source: SDEdit (arXiv 2108.01073), with a causal student in place of a diffusion model.

    Args:
        model: the student.
        policy: its memory.
        latents: of clips; F makes whole chunks.
        prompt_embeds: of their captions.
        step: index of the denoising step that comes first; 0 sees nothing but noise.
        keys: one a sample, all its randomness.

    Raises:
        UserError: see `rollout`.
    """
    config = model.config
    level = sigma_at(jnp.asarray(few_steps(config)[step]), config.timestep_shift)
    hiding, denoising = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], jnp.float32))(hiding)
    later = dataclasses.replace(config, denoising_steps=config.denoising_steps[step:])
    begun = add_noise(latents.astype(jnp.float32), noise, level)
    return rollout(dataclasses.replace(model, config=later), policy, prompt_embeds, begun, key=denoising).latents
