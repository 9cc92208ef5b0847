"""Runs of toy size, made without files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rfjax.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from rfjax.memory import create
from rfjax.models.functional import init_params
from rfjax.models.transformer import WanTransformer
from rfjax.training.config import DataConfig, OptimizerConfig, TeacherOptions, TrainConfig
from rfjax.training.setup import Setup
from rfjax.training.stages.self_forcing import SelfForcingStage
from rfjax.training.stages.teacher import TeacherStage

MODEL = ModelConfig(
    transformer=TransformerConfig(
        dim=16, ffn_dim=32, freq_dim=8, text_dim=8, text_len=4, in_dim=4, out_dim=4, num_heads=2, num_layers=2
    ),
    vae=VAEConfig(dim=4, z_dim=4, num_res_blocks=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
    umt5=TextEncoderConfig(vocab=300, dim=8, dim_attn=8, dim_ffn=16, num_heads=2, num_layers=1),
    latent_height=4,
    latent_width=4,
)
EXAMPLES = 7


def run_config(stage: str, **changes) -> TrainConfig:
    settings = {"steps": 6, "batch_size": 4, "log_every": 2, "optimizer": OptimizerConfig(learning_rate=1e-2)}
    return TrainConfig(**({"stage": stage, "init": "none", "data": DataConfig(path="none")} | settings | changes))


@dataclasses.dataclass(frozen=True)
class LineStage:
    """Fits `slope` to points on a line: it compiles in no time and has no noise."""

    players = ("model",)

    def turn(self, step: int) -> tuple[str, ...]:
        return self.players

    def loss(self, player, params, frozen, batch, key):
        error = params[player]["line"]["slope"] * batch["x"] - batch["y"]
        return jnp.square(error).mean(), {"error": jnp.abs(error).mean()}


def line_setup() -> Setup:
    source = [{"x": np.float32(i), "y": np.float32(2 * i)} for i in range(EXAMPLES)]
    return Setup(LineStage(), MODEL, {"model": {"line": {"slope": jnp.zeros(())}}}, {}, source, (), None)


def teacher_setup() -> Setup:
    rng = np.random.default_rng(0)
    source = [
        {
            "latents": rng.normal(size=(3, 4, 4, 4)).astype(np.float32),
            "prompt_embeds": rng.normal(size=(4, 8)).astype(np.float32),
        }
        for _ in range(EXAMPLES)
    ]
    stage = TeacherStage(MODEL, TeacherOptions())
    params = {"model": {"transformer": _transformer(0)}}
    return Setup(stage, MODEL, params, {"negative_embeds": np.zeros((1, 4, 8), np.float32)}, source, (), None)


def self_forcing_setup() -> Setup:
    rng = np.random.default_rng(0)
    source = [{"prompt_embeds": rng.normal(size=(4, 8)).astype(np.float32)} for _ in range(EXAMPLES)]
    stage = SelfForcingStage(
        config=MODEL,
        policy=create("relax_forcing"),
        latent_frames=6,
        latent_size=(4, 4),
        window_frames=6,
        guidance=3.0,
        generator_every=2,
        remat=False,
    )
    params = {"generator": {"transformer": _transformer(0)}, "critic": {"transformer": _transformer(1)}}
    frozen = {"negative_embeds": np.zeros((1, 4, 8), np.float32), "teacher": _transformer(1)}
    return Setup(stage, MODEL, params, frozen, source, (), None)


def _transformer(seed: int):
    return init_params(WanTransformer, MODEL.transformer, jax.random.key(seed))
