"""Stage `ode`: the causal student learns where the teacher's trajectories end, from the states at its few timesteps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rfjax.config import ModelConfig
from rfjax.errors import UserError
from rfjax.models.functional import bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.schedule import few_steps, sigma_at
from rfjax.training.stage import Batch, Metrics, Networks, OnePlayer
from rfjax.training.stages.causal import draw_per_chunk


@dataclasses.dataclass(frozen=True)
class ODEStage(OnePlayer):
    """Trains `transformer` in the way of diffusion forcing: each chunk is at a denoising step of its own.

    Source: CausVid (arXiv 2412.07772, section 4.3), Self-Forcing `model/ode_regression.py`.
    """

    config: ModelConfig
    remat: bool = False

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the mean squared error of the predicted clean latents; none are at timestep 0.

        Raises:
            UserError: the trajectories have other denoising steps than the model, or do not divide into chunks.
        """
        config, trajectory = self.config, batch["trajectory"].astype(jnp.float32)
        samples, states, frames = trajectory.shape[:3]
        steps = jnp.asarray(few_steps(config))
        if states != len(steps) + 1:
            raise UserError(
                f"a trajectory has {states} states; the model's {len(steps)} denoising steps need {len(steps) + 1}"
            )
        chosen = draw_per_chunk(key, samples, frames, config.chunk_frames, len(steps))
        noisy = jnp.take_along_axis(trajectory, chosen[:, None, :, None, None, None], axis=1)[:, 0]
        timestep = steps[chosen]
        network = bind(WanTransformer, config.transformer, params[player]["transformer"])
        text = network.embed_text(batch["prompt_embeds"])
        flow, _ = network(noisy, timestep, text, chunk_frames=config.chunk_frames, remat=self.remat)
        sigma = sigma_at(timestep, config.timestep_shift)[..., None, None, None]
        return jnp.square(noisy - sigma * flow - trajectory[:, -1]).mean(), {}
