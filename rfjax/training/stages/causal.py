"""Stage `causal`: flow matching of whole videos in which each chunk sees its past alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rfjax.config import ModelConfig
from rfjax.errors import UserError
from rfjax.models.functional import bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.schedule import STEPS, timesteps
from rfjax.training.config import CausalOptions
from rfjax.training.losses import flow_matching_loss
from rfjax.training.stage import Batch, Metrics, Networks, OnePlayer


@dataclasses.dataclass(frozen=True)
class CausalStage(OnePlayer):
    """Trains `transformer`: every chunk has a noise level of its own and one pass predicts the flow of all chunks.

    Under teacher forcing a chunk sees the clean past, as in generation; under diffusion forcing the noisy one.
    Source: Self-Forcing `model/diffusion.py` and `wan/modules/causal_model.py`, without weights of timesteps.
    """

    config: ModelConfig
    options: CausalOptions
    remat: bool = False

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the mean squared error of the flow at one timestep a chunk, even on the shifted grid.

        Raises:
            UserError: the latents do not divide into chunks.
        """
        latents = batch["latents"].astype(jnp.float32)
        samples, frames = latents.shape[:2]
        drop, draw, noise_key = jax.random.split(key, 3)
        dropped = jax.random.bernoulli(drop, self.options.drop_prompt, (samples, 1, 1))
        embeds = jnp.where(dropped, frozen["negative_embeds"], batch["prompt_embeds"])
        chosen = draw_per_chunk(draw, samples, frames, self.config.chunk_frames, STEPS)
        timestep = jnp.asarray(timesteps(self.config.timestep_shift))[chosen]
        network = bind(WanTransformer, self.config.transformer, params[player]["transformer"])
        text, clean = network.embed_text(embeds), latents if self.options.forcing == "teacher" else None

        def flow(noisy, timestep):
            chunk = self.config.chunk_frames
            return network(noisy, timestep, text, chunk_frames=chunk, clean=clean, remat=self.remat)[0]

        noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
        return flow_matching_loss(flow, latents, noise, timestep, self.config.timestep_shift), {}


def draw_per_chunk(key: Array, samples: int, frames: int, chunk_frames: int, choices: int) -> Int[Array, "B F"]:
    """Draw one of `choices` numbers from 0 on for each chunk, and give it to all of the chunk's frames.

    Raises:
        UserError: the frames do not divide into chunks.
    """
    if frames % chunk_frames:
        raise UserError(f"a clip has {frames} latent frames; a multiple of the chunk's {chunk_frames} is needed")
    drawn = jax.random.randint(key, (samples, frames // chunk_frames), 0, choices)
    return jnp.repeat(drawn, chunk_frames, axis=1)
