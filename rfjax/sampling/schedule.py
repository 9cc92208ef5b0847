"""The shifted flow-matching schedule of Wan and Self-Forcing.

With s_i = 1 - i/1000 and shift k: sigma_i = k s_i / (1 + (k - 1) s_i), timestep_i = 1000 sigma_i, i = 0..999.
Source: Self-Forcing `utils/scheduler.py` (FlowMatchScheduler with `extra_one_step=True`).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rfjax.config import ModelConfig

STEPS = 1000


@functools.cache
def timesteps(shift: float) -> np.ndarray:
    """The 1000 grid timesteps, falling from 1000, float32."""
    s = 1.0 - np.arange(STEPS, dtype=np.float64) / STEPS
    return (STEPS * shift * s / (1.0 + (shift - 1.0) * s)).astype(np.float32)


def warp(steps: tuple[int, ...], shift: float) -> np.ndarray:
    """Timesteps of a few-step list such as (1000, 750, 500, 250): grid entry `1000 - step` of each, float32."""
    return timesteps(shift)[STEPS - np.asarray(steps)]


def few_steps(config: ModelConfig) -> np.ndarray:
    """Timesteps at which a model denoises, float32: its few-step list, warped unless it is given as timesteps."""
    steps = config.denoising_steps
    return warp(steps, config.timestep_shift) if config.warp_denoising_steps else np.asarray(steps, np.float32)


def sigma_at(timestep: Float[Array, "*shape"], shift: float) -> Float[Array, "*shape"]:
    """Noise level at the grid timestep nearest to each given one."""
    grid = timesteps(shift)
    nearest = jnp.argmin(jnp.abs(grid - timestep[..., None]), axis=-1)
    return jnp.asarray(grid / STEPS)[nearest]


def add_noise(
    x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], sigma: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """The forward process `x_t = (1 - sigma) x0 + sigma noise`."""
    return (1 - sigma) * x0 + sigma * noise
