"""Stage `vae`: reconstruction and the divergence of the posterior from a standard normal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from rfjax.config import VAEConfig
from rfjax.models.vae import posterior, reconstruct
from rfjax.training.config import VAEOptions
from rfjax.training.stage import Batch, Metrics, Networks

MAX_LOG_VARIANCE = 20.0
"""Beyond this (either sign) the posterior's log variance is cut off, as is usual."""


@dataclasses.dataclass(frozen=True)
class VAEStage:
    """Trains `vae`."""

    config: VAEConfig
    options: VAEOptions

    players = ("model",)

    def turn(self, step: int) -> tuple[str, ...]:
        """Return the one player."""
        return self.players

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the errors of the pixels, absolute and squared, plus the weighted divergence; see `Stage.loss`."""
        vae = params[player]["vae"]
        video = to_unit(batch["video"])
        mean, log_variance = (moment.astype(jnp.float32) for moment in posterior(self.config, vae, video))
        log_variance = jnp.clip(log_variance, -MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
        noise = jax.random.normal(key, mean.shape, jnp.float32)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        shown = reconstruct(self.config, vae, z.astype(vae["quant_conv"]["kernel"].dtype)).astype(jnp.float32)
        error, squared = jnp.abs(shown - video).mean(), jnp.square(shown - video).mean()
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        psnr = 10 * jnp.log10(4 / jnp.maximum(jnp.square(jnp.clip(shown, -1, 1) - video).mean(), 1e-10))
        loss = error + self.options.squared_weight * squared + self.options.kl_weight * divergence
        return loss, {"error": error, "divergence": divergence, "psnr": psnr}


def to_unit(video: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
    """Return 8-bit pixels as float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1
