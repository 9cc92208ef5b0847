"""Videos that show how training goes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rfjax.memory import create
from rfjax.models.model import Model
from rfjax.sampling.bidirectional import sample_bidirectional
from rfjax.sampling.codec import decode, encode, encode_tokens, to_bytes, to_unit
from rfjax.sampling.rollout import rollout
from rfjax.training.config import SampleConfig, TrainConfig
from rfjax.training.metrics import Metrics
from rfjax.training.setup import Setup

FPS = 16
SOLVER_STEPS = 32
"""Of the teacher's videos."""


@dataclasses.dataclass(frozen=True)
class Preview:
    """What is shown of a run, and how it is made."""

    config: TrainConfig
    setup: Setup
    sample: SampleConfig

    def make(self, networks: Mapping[str, Any], frozen: Mapping[str, Any], metrics: Metrics, step: int) -> None:
        """Make the videos and hand them to the metrics."""
        trees = {name: frozen[name] for name in ("vae", "text_encoder") if name in frozen} | dict(networks)
        model = Model(
            self.setup.model,
            transformer=trees.get("transformer", {}),
            vae=trees.get("vae"),
            text_encoder=trees.get("text_encoder"),
            dtype=jnp.dtype(jnp.float32),
        )
        if self.config.stage == "vae":
            self._reconstruct(model, metrics, step)
            return
        for number, frames in enumerate(np.asarray(to_bytes(decode(model, self._latents(model, frozen))))):
            metrics.video(step, f"sample-{number}", frames, FPS)

    def _reconstruct(self, model: Model, metrics: Metrics, step: int) -> None:
        """Originals above, reconstructions below."""
        source = self.setup.source
        clips = np.stack([np.asarray(source[i]["video"]) for i in range(min(2, len(source)))])
        clips = clips[:, : self.config.data.frames]
        shown = np.asarray(to_bytes(decode(model, encode(model, to_unit(clips)))))
        for number, frames in enumerate(np.concatenate([clips, shown], axis=2)):
            metrics.video(step, f"reconstruction-{number}", frames, FPS)

    def _latents(self, model: Model, frozen: Mapping[str, Any]) -> jax.Array:
        config, key = self.setup.model, jax.random.key(self.config.seed)
        embeds = _embeds(model, frozen, "sample")
        size = (config.latent_height, config.latent_width, config.transformer.in_dim)
        shape = (len(embeds), self.sample.latent_frames, *size)
        if self.config.stage == "teacher":
            negative = _embeds(model, frozen, "negative")
            guidance = self.config.options.guidance
            return sample_bidirectional(config, model.transformer, embeds, negative, shape, key, SOLVER_STEPS, guidance)
        policy = getattr(self.setup.stage, "policy", None) or create("self_forcing")
        return rollout(model, policy, embeds, shape, key=key).latents


def _embeds(model: Model, frozen: Mapping[str, Any], name: str) -> jax.Array:
    """Return the embeddings of a run's own prompts, made by the text encoder as it is now where it learns."""
    if f"{name}_embeds" in frozen:
        return frozen[f"{name}_embeds"]
    return encode_tokens(model, frozen[f"{name}_ids"], frozen[f"{name}_mask"])
