"""The network's passes over one chunk: those that denoise it, and the clean one that its memory is made of."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rfjax.config import ModelConfig
from rfjax.memory import View
from rfjax.models.functional import Params, bind
from rfjax.models.transformer import AttendedMemory, Projections, TextContext, WanTransformer
from rfjax.sampling.schedule import add_noise, few_steps, sigma_at
from rfjax.sampling.state import attend


@dataclasses.dataclass(frozen=True)
class ChunkPasses:
    """A network with all that its passes over one chunk share."""

    config: ModelConfig
    """Sizes and denoising steps."""
    network: WanTransformer
    """Computes in the type of its parameters."""
    text: TextContext
    """Of the chunk's prompt."""
    memory: AttendedMemory
    """What the chunk attends to beside itself."""

    def predict(
        self, noisy: Float[Array, "B n H W C"], step: int | Int[Array, ""], remat: bool = False
    ) -> Float[Array, "B n H W C"]:
        """Return x0 as the pass of that denoising step predicts it; `remat` as in `WanTransformer`."""
        timestep = jnp.full(noisy.shape[:2], jnp.asarray(few_steps(self.config))[step])
        flow, _ = self.network(noisy, timestep, self.text, self.memory, remat=remat)
        return noisy - self._sigmas()[step] * flow

    def denoise(
        self,
        initial: Float[Array, "B n H W C"],
        renoise: Float[Array, "steps B n H W C"],
        exit_step: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B n H W C"], Float[Array, "B n H W C"]]:
        """Return x0 as a denoising step predicts it after all before it, and the noisy latents which that step saw.

        Args:
            initial: noise that the chunk starts from.
            renoise: noise added before each step but the first.
            exit_step: index of that step; later ones are not computed.
        """
        # The first step sees nothing but noise, whatever its timestep.
        noises, levels = jnp.concatenate([initial[None], renoise]), self._sigmas().at[0].set(1)

        def one(step, carry):
            noisy = add_noise(carry[0], noises[step], levels[step])
            return self.predict(noisy, step), noisy

        nothing = jnp.zeros_like(initial)
        return jax.lax.fori_loop(0, exit_step + 1, one, (nothing, nothing))

    def project(self, latents: Float[Array, "B n H W C"]) -> Projections:
        """Return what the clean pass, at timestep 0, makes of finished latents."""
        timestep = jnp.zeros(latents.shape[:2], jnp.float32)
        _, made = self.network(latents, timestep, self.text, self.memory, return_projections=True)
        assert made is not None
        return made

    def _sigmas(self):
        return sigma_at(jnp.asarray(few_steps(self.config)), self.config.timestep_shift)


def passes_over(
    config: ModelConfig, frame_size: tuple[int, int], params: Params, text: TextContext, view: View
) -> ChunkPasses:
    """Return the passes of the network with these parameters over the chunk that attends to `view`."""
    network = bind(WanTransformer, config.transformer, params)
    return ChunkPasses(config, network, text, attend(config, frame_size, view))
