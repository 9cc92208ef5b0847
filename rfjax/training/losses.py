"""Losses of flow matching and of distribution matching, as pure functions with all noise given.

Noise levels are those of the schedule's grid (`rfjax.sampling.schedule`), as in inference. Everything is float32.

Source: Self-Forcing `model/dmd.py`, `utils/loss.py`; DMD (arXiv 2311.18828), equations 7 and 8.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rfjax.pytree import pytree
from rfjax.sampling.schedule import STEPS, add_noise, sigma_at

Flow = Callable[[Array, Array], Array]
"""A network under its prompt: noisy latents [B, F, H, W, C] and timesteps [B, F] to the flow `noise - x0`."""

LOWEST_TIMESTEP, HIGHEST_TIMESTEP = 20.0, 980.0
"""Scores are asked for within these; beyond them they say nothing or everything."""


@pytree()
@dataclasses.dataclass(frozen=True)
class Matching:
    """One comparison of two scores on noisy video, every number of it."""

    noisy: Float[Array, "B F H W C"]
    fake: Float[Array, "B F H W C"]
    """x0 as the fake score predicts it."""
    real_cond: Float[Array, "B F H W C"]
    """x0 as the real score predicts it under the prompt."""
    real_uncond: Float[Array, "B F H W C"]
    """x0 as the real score predicts it under the negative prompt."""
    gradient: Float[Array, "B F H W C"]
    """Direction that leads away from the real distribution, normalised in each sample."""


def training_timestep(raw: Float[Array, "*shape"], shift: float) -> Float[Array, "*shape"]:
    """Return the timesteps at which scores are compared and the critic learns.

    Args:
        raw: uniform whole numbers from 0 to 999.
        shift: k of `t = 1000 k r / (1 + (k - 1) r)` with r = raw / 1000; clipped to [20, 980].
    """
    part = raw / STEPS
    return jnp.clip(STEPS * shift * part / (1 + (shift - 1) * part), LOWEST_TIMESTEP, HIGHEST_TIMESTEP)


def draw_timestep(key: Array, batch: int, frames: int, shift: float) -> Float[Array, "B F"]:
    """Draw one training timestep a sample, the same for all its frames."""
    raw = jax.random.randint(key, (batch, 1), 0, STEPS).astype(jnp.float32)
    return jnp.broadcast_to(training_timestep(raw, shift), (batch, frames))


def flow_matching_loss(
    flow: Flow,
    x0: Float[Array, "B F H W C"],
    noise: Float[Array, "B F H W C"],
    timestep: Float[Array, "B F"],
    shift: float,
) -> Float[Array, ""]:
    """Return the mean squared error of the predicted flow at `x_t = (1 - sigma) x0 + sigma noise`.

    Args:
        flow: the network that learns.
        x0: clean latents.
        noise: standard normal.
        timestep: in [0, 1000], of each frame.
        shift: of the schedule.
    """
    noisy = add_noise(x0, noise, _sigma(timestep, shift))
    return jnp.mean(jnp.square(flow(noisy, timestep).astype(jnp.float32) - (noise - x0)))


def match_distributions(
    fake: Flow,
    real_cond: Flow,
    real_uncond: Flow,
    x: Float[Array, "B F H W C"],
    noise: Float[Array, "B F H W C"],
    timestep: Float[Array, "B F"],
    shift: float,
    guidance: float,
    weak_cond: Flow | None = None,
    weak_guidance: float = 0.0,
) -> Matching:
    """Compare the scores of generated and of real video on noised x; nothing in it is differentiated.

    Args:
        fake: score of generated video, under the prompt.
        real_cond: score of real video, under the prompt.
        real_uncond: the same under the negative prompt.
        x: generated latents.
        noise: standard normal.
        timestep: from `draw_timestep`.
        shift: of the schedule.
        guidance: coefficient of `cond - uncond`, added to `cond`.
        weak_cond: score of real video by a worse network, under the prompt (autoguidance, arXiv 2406.02507).
        weak_guidance: coefficient of `cond - weak`, added as well.
    """
    x = jax.lax.stop_gradient(x)
    sigma = _sigma(timestep, shift)
    noisy = add_noise(x, noise, sigma)

    def denoised(flow: Flow):
        return jax.lax.stop_gradient(noisy - sigma * flow(noisy, timestep))

    fake_x0, cond, uncond = denoised(fake), denoised(real_cond), denoised(real_uncond)
    real = cond + guidance * (cond - uncond)
    if weak_cond is not None:
        real += weak_guidance * (cond - denoised(weak_cond))
    gradient = (fake_x0 - real) / jnp.mean(jnp.abs(x - real), axis=(1, 2, 3, 4), keepdims=True)
    return Matching(noisy, fake_x0, cond, uncond, jnp.where(jnp.isnan(gradient), 0, gradient))


def distribution_matching_loss(x: Float[Array, "B F H W C"], gradient: Float[Array, "B F H W C"]) -> Float[Array, ""]:
    """Return `0.5 mean (x - stop(x - gradient))^2`; its derivative by x is the gradient over the number of elements."""
    # x - stop(x) is exactly 0, where x - gradient would round small gradients away.
    return 0.5 * jnp.mean(jnp.square(x - jax.lax.stop_gradient(x) + jax.lax.stop_gradient(gradient)))


def _sigma(timestep, shift):
    return sigma_at(timestep, shift)[:, :, None, None, None]
