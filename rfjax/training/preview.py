"""Videos that show how training goes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rfjax.config import ModelConfig
from rfjax.memory import create
from rfjax.models.model import Model
from rfjax.sampling.bidirectional import sample_bidirectional
from rfjax.sampling.codec import decode, encode, encode_tokens
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
    model: ModelConfig
    tokenizer: Any
    source: Any
    sample: SampleConfig

    @classmethod
    def of(cls, config: TrainConfig, setup: Setup) -> "Preview | None":
        """Return the preview that a configuration asks for, or None."""
        return config.sample and cls(config, setup.model, setup.tokenizer, setup.source, config.sample)

    @property
    def every(self) -> int:
        """Steps between two times."""
        return self.sample.every

    def make(self, networks: Mapping[str, Any], frozen: Mapping[str, Any], metrics: Metrics, step: int) -> None:
        """Make the videos and hand them to the metrics."""
        trees = {name: frozen[name] for name in ("vae", "text_encoder") if name in frozen} | dict(networks)
        model = Model(
            self.model,
            transformer=trees.get("transformer", {}),
            vae=trees.get("vae"),
            text_encoder=trees.get("text_encoder"),
            tokenizer=self.tokenizer,
            dtype=jnp.dtype(jnp.float32),
        )
        if self.config.stage == "vae":
            self._reconstruct(model, metrics, step)
            return
        video = np.asarray(decode(model, self._latents(model, frozen)))
        for number, frames in enumerate(video):
            metrics.video(step, f"sample-{number}", to_bytes(frames), FPS)

    def _reconstruct(self, model: Model, metrics: Metrics, step: int) -> None:
        """Originals above, reconstructions below."""
        clips = np.stack([np.asarray(self.source[i]["video"]) for i in range(2)])
        clips = clips[:, : self.config.data.frames]
        shown = np.asarray(decode(model, encode(model, jnp.asarray(clips, jnp.float32) / 127.5 - 1)))
        for number, (clip, frames) in enumerate(zip(clips, shown, strict=True)):
            metrics.video(step, f"reconstruction-{number}", np.concatenate([clip, to_bytes(frames)], axis=1), FPS)

    def _latents(self, model: Model, frozen: Mapping[str, Any]) -> jax.Array:
        config, options, key = self.model, self.config.options, jax.random.key(self.config.seed)
        embeds = _embeds(model, frozen, "sample")
        size = (config.latent_height, config.latent_width, config.transformer.in_dim)
        shape = (len(embeds), self.sample.latent_frames, *size)
        if self.config.stage == "teacher":
            negative = _embeds(model, frozen, "negative")
            return sample_bidirectional(
                config, model.transformer, embeds, negative, shape, key, SOLVER_STEPS, options.guidance
            )
        policy = create(getattr(options, "policy", "self_forcing"), **getattr(options, "settings", {}))
        return rollout(model, policy, embeds, shape, key=key).latents


def _embeds(model: Model, frozen: Mapping[str, Any], name: str) -> jax.Array:
    """Return the embeddings of a run's own prompts, made by the text encoder as it is now where it learns."""
    if f"{name}_embeds" in frozen:
        return frozen[f"{name}_embeds"]
    return encode_tokens(model, frozen[f"{name}_ids"], frozen[f"{name}_mask"])


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Return frames in [-1, 1] as 8-bit."""
    return np.round((np.clip(frames, -1, 1) + 1) * 127.5).astype(np.uint8)
