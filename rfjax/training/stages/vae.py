"""Stage `vae`: reconstruction and the divergence of the posterior from a standard normal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rfjax.config import VAEConfig
from rfjax.errors import UserError
from rfjax.models.functional import Params
from rfjax.models.vae import denormalise, posterior, reconstruct
from rfjax.sampling.codec import to_unit
from rfjax.training.config import VAEOptions
from rfjax.training.stage import Batch, Metrics, Networks, OnePlayer

MAX_LOG_VARIANCE = 20.0
"""Beyond this (either sign) the posterior's log variance is cut off, as is usual."""

ENCODER = ("encoder", "quant_conv")
"""The parts of the autoencoder that make latents."""


@dataclasses.dataclass(frozen=True)
class VAEStage(OnePlayer):
    """Trains `vae`."""

    config: VAEConfig
    options: VAEOptions

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the errors of the pixels, absolute and squared, plus the weighted divergence; see `Stage.loss`.

        A batch with `latents`, normalised, is decoded from these; nothing is encoded, and there is no divergence.
        """
        vae, video = params[player]["vae"], to_unit(batch["video"])
        if self.options.decoder_only:
            vae = {**vae, **{name: jax.lax.stop_gradient(vae[name]) for name in ENCODER}}
        if "latents" in batch:
            z, encoding = denormalise(self.config, batch["latents"]), {}
        else:
            z, divergence = self._encoded(vae, video, key)
            encoding = {"divergence": divergence}
        shown = reconstruct(self.config, vae, z.astype(vae["quant_conv"]["kernel"].dtype)).astype(jnp.float32)
        if shown.shape != video.shape:
            raise UserError(
                f"latents of shape {z.shape[1:]} make videos of shape {shown.shape[1:]}, but those beside them have "
                f"shape {video.shape[1:]}; data.frames has to be 1 plus a multiple of {self.config.temporal_factor}"
            )
        error, squared = jnp.abs(shown - video).mean(), jnp.square(shown - video).mean()
        psnr = 10 * jnp.log10(4 / jnp.maximum(jnp.square(jnp.clip(shown, -1, 1) - video).mean(), 1e-10))
        loss = error + self.options.squared_weight * squared
        loss += self.options.kl_weight * encoding.get("divergence", 0.0)
        return loss, {"error": error, **encoding, "psnr": psnr}

    def _encoded(
        self, vae: Params, video: Float[Array, "B T H W 3"], key: Array
    ) -> tuple[Float[Array, "B F h w C"], Float[Array, ""]]:
        """Return a sample of the posterior, and its divergence."""
        mean, log_variance = (moment.astype(jnp.float32) for moment in posterior(self.config, vae, video))
        log_variance = jnp.clip(log_variance, -MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
        noise = jax.random.normal(key, mean.shape, jnp.float32)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        return mean + jnp.exp(0.5 * log_variance) * noise, divergence
