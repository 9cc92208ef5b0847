"""Trajectories of the bidirectional teacher, on which stage `ode` trains.

Source: Self-Forcing `scripts/generate_ode_pairs.py`, which keeps 4 of 48 states and the clean end.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rfjax.config import ModelConfig
from rfjax.models.functional import Params
from rfjax.sampling.bidirectional import noise_levels, solve
from rfjax.sampling.schedule import few_steps, sigma_at


def make_trajectories(
    config: ModelConfig, params: Params, shape: tuple[int, ...], steps: int = 48, guidance: float = 3.0
) -> Callable[[Array, Array, Array], Array]:
    """Return the function `(prompt_embeds [B, T, D], negative_embeds [1, N, D], key) -> trajectory`.

    The trajectory is [B, S + 1, F, H, W, C], float32: the teacher's states at the S timesteps at which the model
    denoises, from noise on, and the clean end. It is computed by one program for all calls of a batch size.

    Args:
        config: sizes, denoising steps and schedule.
        params: of the bidirectional transformer.
        shape: of one video's latents, [F, H, W, C].
        steps: of the solver, equally many between neighbouring denoising timesteps.
        guidance: 1 is none.

    The function's `key` is one key, from which each sample's follows, or an array of B keys.

    Raises:
        UserError: the solver's steps are no multiple of the model's denoising steps.
    """
    knots = np.asarray(sigma_at(jnp.asarray(few_steps(config)), config.timestep_shift))
    levels = noise_levels(knots.tolist(), config.timestep_shift, steps)
    follow = functools.partial(solve, config, shape, levels, params, guidance=guidance)
    return lambda prompt_embeds, negative_embeds, key: jnp.moveaxis(follow(prompt_embeds, negative_embeds, key), 0, 1)
