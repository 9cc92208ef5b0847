"""Checkpoints and videos of the smallest sizes, for the builders of datasets."""

from pathlib import Path

import jax
import numpy as np
import tokenizers

from rfjax.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from rfjax.io.checkpoints import parameter_trees, save
from rfjax.io.video import VideoWriter

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "star")
TINY = ModelConfig(
    transformer=TransformerConfig(
        dim=16, ffn_dim=32, freq_dim=8, text_dim=8, text_len=24, in_dim=4, out_dim=4, num_heads=2, num_layers=1
    ),
    vae=VAEConfig(dim=4, z_dim=4, num_res_blocks=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
    umt5=TextEncoderConfig(vocab=len(WORDS), dim=8, dim_attn=8, dim_ffn=16, num_heads=2, num_layers=1),
    latent_height=2,
    latent_width=4,
)


def make_tiny_checkpoint(folder: Path, config: ModelConfig = TINY, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return (0.2 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 1)).astype(np.float32)

    params = jax.tree.map(draw, parameter_trees(config))
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source = folder.with_name(f"{folder.name}-tokenizer")
    source.mkdir(exist_ok=True)
    tokenizer.save(str(source / "tokenizer.json"))
    save(folder, config, params, source)
    return folder


def write_video(path: Path, levels: list[int], height: int = 16, width: int = 24, fps: int = 16) -> Path:
    """Write a video of plain gray frames of these levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, height, width, fps) as writer:
        writer.write(np.stack([np.full((height, width, 3), level, np.uint8) for level in levels]))
    return path
