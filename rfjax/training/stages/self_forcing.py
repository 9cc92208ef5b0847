"""Stage `self_forcing`: a generator learns from its own rollouts, by the scores of real and of generated video.

Source: Self-Forcing `model/dmd.py`, `model/base.py`, `trainer/distillation.py`; arXiv 2506.08009.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rfjax.config import ModelConfig, TransformerConfig, VAEConfig
from rfjax.errors import UserError
from rfjax.memory import MemoryPolicy
from rfjax.memory.check import check_policy
from rfjax.models import vae
from rfjax.models.functional import Params, bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.request import ChunkNoise, sample_keys
from rfjax.sampling.rollout import encode_text
from rfjax.sampling.state import memory_shape
from rfjax.training.losses import (
    Flow,
    distribution_matching_loss,
    draw_timestep,
    flow_matching_loss,
    match_distributions,
)
from rfjax.training.rollout_gradient import RolloutPlan, rollout_for_training
from rfjax.training.stage import Batch, Metrics, Networks


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfForcingStage:
    """Players `generator` and `critic`, each with a `transformer`; the critic is the score of generated video.

    Frozen are `teacher`, the score of real video, `negative_embeds` [1, L, D], for `weak_guidance` the worse score
    `weak_teacher`, and for rollouts longer than the window `vae`. The loss of such a rollout sees its last
    `window_frames` alone, of which the first is made anew from the image that it shows, so that the window begins as a
    video does. That frame's chunk teaches the generator nothing.

    Raises:
        UserError: sizes that do not fit each other, or a policy that does not fit them.
    """

    config: ModelConfig
    """Of generator and critic alike."""
    policy: MemoryPolicy
    """Memory of the rollout."""
    latent_frames: int
    """Length of the rollout."""
    latent_size: tuple[int, int]
    """Latent rows and columns."""
    window_frames: int = 21
    """What the scores see of it."""
    guidance: float = 3.0
    """Coefficient of `cond - uncond` of the real score, added to cond."""
    weak_guidance: float = 0.0
    """Coefficient of `cond - weak`, added as well; weak is the score of `weak_teacher`."""
    teacher: TransformerConfig | None = None
    """Sizes of the teacher; None are those of `config`."""
    weak_teacher: TransformerConfig | None = None
    """The same of the worse one."""
    generator_every: int = 5
    """The critic learns at every step, the generator before it at every so many."""
    remat: bool = False
    """Whether the backward passes compute the activations of a layer again instead of keeping them."""

    players = ("generator", "critic")

    def __post_init__(self):
        chunk = self.config.chunk_frames
        for name in ("latent_frames", "window_frames") if self._is_longer else ("latent_frames",):
            if getattr(self, name) % chunk:
                raise UserError(f"{name} is {getattr(self, name)}; a multiple of the chunk's {chunk} is needed")
        for size, patch in zip(self.latent_size, self.config.transformer.patch_size[1:], strict=True):
            if size % patch:
                raise UserError(f"latent_size is {list(self.latent_size)}; multiples of the patch's {patch} are needed")
        if self._is_longer and self.window_frames == chunk:
            raise UserError(f"window_frames is {chunk}; a longer rollout needs more than one chunk in it")
        if self._is_longer and self.config.vae is None:
            raise UserError(
                f"latent_frames is {self.latent_frames}, above window_frames {self.window_frames}; this needs an "
                "autoencoder, which the model does not have"
            )
        check_policy(self.policy, memory_shape(self.config, 1, self.latent_size), self.latent_frames, jnp.float32)

    def turn(self, step: int) -> tuple[str, ...]:
        """Return who learns at this step, in order."""
        return self.players if step % self.generator_every == 0 else ("critic",)

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the player's loss on a fresh rollout of the batch's prompts."""
        embeds = batch["prompt_embeds"]
        exit_key, rollout_key, timestep_key, noise_key = jax.random.split(key, 4)
        exit_step = jax.random.randint(exit_key, (), 0, len(self.config.denoising_steps))
        noise = ChunkNoise(sample_keys(rollout_key, embeds.shape[0]), None, None)
        x = self.window(self.generate(params["generator"]["transformer"], embeds, noise, exit_step), frozen.get("vae"))
        timestep = draw_timestep(timestep_key, x.shape[0], x.shape[1], self.config.timestep_shift)
        score_noise = jax.random.normal(noise_key, x.shape, jnp.float32)
        critic = params["critic"]["transformer"]
        if player == "critic":
            return self.critic_loss(critic, x, embeds, score_noise, timestep), {}
        return self.generator_loss(critic, frozen, x, embeds, score_noise, timestep)

    def generate(
        self, params: Params, prompt_embeds: Float[Array, "B L D"], noise: ChunkNoise, exit_step: Array
    ) -> Float[Array, "B F H W C"]:
        """Return a whole rollout of the generator; what the loss sees of it is differentiable."""
        chunk = self.config.chunk_frames
        learned = self.window_frames - chunk if self._is_longer else self.latent_frames
        plan = RolloutPlan(self.config, self.latent_size, self.latent_frames // chunk, learned // chunk, self.remat)
        text = encode_text(self.config, params, prompt_embeds)
        return rollout_for_training(plan, self.policy, params, text, noise, exit_step)

    def window(self, latents: Float[Array, "B F H W C"], vae_params: Params | None) -> Float[Array, "B window H W C"]:
        """Return what the scores see: of a longer rollout the last frames, the first of them made anew as an image."""
        if not self._is_longer:
            return latents
        assert self.config.vae is not None
        if vae_params is None:
            raise UserError("a rollout longer than its window needs the frozen network 'vae'")
        before, rest = jnp.split(latents, [self.latent_frames - self.window_frames + 1], axis=1)
        image = last_image(self.config.vae, vae_params, jax.lax.stop_gradient(before))
        first = vae.encode(self.config.vae, vae_params, image).astype(jnp.float32)
        return jnp.concatenate([first, rest], axis=1)

    def generator_loss(
        self,
        critic: Params,
        frozen: Mapping[str, Any],
        x: Float[Array, "B F H W C"],
        prompt_embeds: Float[Array, "B L D"],
        noise: Float[Array, "B F H W C"],
        timestep: Float[Array, "B F"],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the distribution-matching loss of generated latents, with all noise given."""
        negative = jnp.broadcast_to(frozen["negative_embeds"], (len(x), *frozen["negative_embeds"].shape[1:]))
        weak = self._score(frozen["weak_teacher"], prompt_embeds, self.weak_teacher) if self.weak_guidance else None
        matching = match_distributions(
            self._score(critic, prompt_embeds),
            self._score(frozen["teacher"], prompt_embeds, self.teacher),
            self._score(frozen["teacher"], negative, self.teacher),
            x,
            noise,
            timestep,
            self.config.timestep_shift,
            self.guidance,
            weak,
            self.weak_guidance,
        )
        skipped = self.config.chunk_frames if self._is_longer else 0
        loss = distribution_matching_loss(x[:, skipped:], matching.gradient[:, skipped:])
        return loss, {"score_gradient": jnp.mean(jnp.abs(matching.gradient))}

    def critic_loss(
        self,
        critic: Params,
        x: Float[Array, "B F H W C"],
        prompt_embeds: Float[Array, "B L D"],
        noise: Float[Array, "B F H W C"],
        timestep: Float[Array, "B F"],
    ) -> Float[Array, ""]:
        """Return the flow-matching loss of the critic on generated latents, with all noise given."""
        score = self._score(critic, prompt_embeds)
        return flow_matching_loss(score, jax.lax.stop_gradient(x), noise, timestep, self.config.timestep_shift)

    def _score(
        self, params: Params, prompt_embeds: Float[Array, "B L D"], sizes: TransformerConfig | None = None
    ) -> Flow:
        """Return a network that sees whole videos, under its prompt; it has the generator's sizes, or others."""
        network = bind(WanTransformer, sizes or self.config.transformer, params)
        text = network.embed_text(prompt_embeds)
        return lambda noisy, timestep: network(noisy, timestep, text, remat=self.remat)[0]

    @property
    def _is_longer(self) -> bool:
        return self.latent_frames > self.window_frames


def last_image(config: VAEConfig, params: Params, latents: Float[Array, "B F h w C"]) -> Float[Array, "B 1 H W 3"]:
    """Return the last video frame of latents, decoded with memory that does not grow with their length."""
    batch, _, height, width, _ = latents.shape
    dtype = params["quant_conv"]["kernel"].dtype
    start = vae.decode_init(config, dtype, batch, height, width)

    def step(carry, latent):
        cache, video = vae.decode_next(config, params, carry[0], latent[:, None])
        return (cache, video[:, -1:]), None

    first = vae.decode_first(config, params, start, latents[:, :1])
    (_, image), _ = jax.lax.scan(step, first, jnp.moveaxis(latents[:, 1:], 1, 0))
    return image
