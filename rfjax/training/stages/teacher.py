"""Stage `teacher`: flow matching of whole videos with attention in both directions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rfjax.config import ModelConfig
from rfjax.models.functional import bind
from rfjax.models.text_encoder import encode_tokens
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.schedule import STEPS, timesteps
from rfjax.training.config import TeacherOptions
from rfjax.training.losses import flow_matching_loss
from rfjax.training.stage import Batch, Metrics, Networks, OnePlayer


def draw_steps(key: Array, samples: int, logit_normal: tuple[float, ...] | None) -> Int[Array, " B"]:
    """Draw places on the grid of timesteps, which begins with pure noise.

    Args:
        key: of the draw.
        samples: B.
        logit_normal: mean and standard deviation of the logit of the place counted from the clean end, as a share of
            the grid (Stable Diffusion 3, arXiv 2403.03206, section 3.1); None draws all places alike.
    """
    if logit_normal is None:
        return jax.random.randint(key, (samples,), 0, STEPS)
    mean, deviation = logit_normal
    from_noise = jax.nn.sigmoid(-mean - deviation * jax.random.normal(key, (samples,)))
    return jnp.minimum((STEPS * from_noise).astype(jnp.int32), STEPS - 1)


@dataclasses.dataclass(frozen=True)
class TeacherStage(OnePlayer):
    """Trains `transformer`, and `text_encoder` where the options say so."""

    config: ModelConfig
    options: TeacherOptions
    remat: bool = False

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the mean squared error of the flow at one timestep a sample."""
        latents = batch["latents"].astype(jnp.float32)
        samples, frames = latents.shape[:2]
        drop, draw, noise_key = jax.random.split(key, 3)
        dropped = jax.random.bernoulli(drop, self.options.drop_prompt, (samples,))
        embeds = self._embeds(params[player], frozen, batch, dropped)
        chosen = draw_steps(draw, samples, self.options.logit_normal)
        timestep = jnp.asarray(timesteps(self.config.timestep_shift))[chosen]
        network = bind(WanTransformer, self.config.transformer, params[player]["transformer"])
        text = network.embed_text(embeds)

        def flow(noisy, timestep):
            return network(noisy, timestep, text, remat=self.remat)[0]

        noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
        every_frame = jnp.broadcast_to(timestep[:, None], (samples, frames))
        return flow_matching_loss(flow, latents, noise, every_frame, self.config.timestep_shift), {}

    def _embeds(self, networks: Networks, frozen, batch: Batch, dropped):
        """Prompt embeddings, those of the empty prompt where a prompt is dropped."""
        if not self.options.train_text_encoder:
            return jnp.where(dropped[:, None, None], frozen["negative_embeds"], batch["prompt_embeds"])
        ids = jnp.where(dropped[:, None], frozen["negative_ids"], batch["ids"])
        mask = jnp.where(dropped[:, None], frozen["negative_mask"], batch["mask"])
        assert self.config.umt5 is not None
        return encode_tokens(self.config.umt5, networks["text_encoder"], ids, mask)
