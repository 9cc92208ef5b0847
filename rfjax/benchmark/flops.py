"""Floating-point operations of each part of a rollout, from sizes alone.

A multiply-add counts as two. Matrix products and convolutions are counted; norms, softmax and activations are not: they
are a few percent of XLA's own count at most, with which the tests compare.
"""

import dataclasses
import itertools

from rfjax.config import TextEncoderConfig, TransformerConfig, VAEConfig


@dataclasses.dataclass(frozen=True)
class PassFlops:
    """One network pass over a chunk of a batch."""

    self_attention: int
    """Scores and weighted sums, without the projections."""
    cross_attention: int
    """The same, towards the prompt."""
    projections: int
    """Queries, keys, values and outputs of both attentions; the prompt's keys and values are not among them."""
    feed_forward: int
    embeddings: int
    """Patches, timesteps and the head."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def transformer_pass(
    config: TransformerConfig, batch: int, chunk_frames: int, attended_frames: int, frame_tokens: int
) -> PassFlops:
    """Count one pass over `chunk_frames` frames that attend to `attended_frames`, their own included."""
    dim, layers = config.dim, config.num_layers
    frames = batch * chunk_frames
    tokens = frames * frame_tokens
    patch = 2 * tokens * config.patch_volume * dim * (config.in_dim + config.out_dim)
    time = 2 * frames * dim * (config.freq_dim + dim + 6 * dim)
    return PassFlops(
        self_attention=layers * 4 * tokens * attended_frames * frame_tokens * dim,
        cross_attention=layers * 4 * tokens * config.text_len * dim,
        projections=layers * 2 * tokens * 6 * dim**2,
        feed_forward=layers * 2 * tokens * 2 * dim * config.ffn_dim,
        embeddings=patch + time,
    )


def text_context(config: TransformerConfig, batch: int) -> int:
    """Count the projection of prompt embeddings to the keys and values of every cross-attention."""
    embedding = config.text_dim * config.dim + config.dim**2
    return 2 * batch * config.text_len * (embedding + config.num_layers * 2 * config.dim**2)


def text_encoder(config: TextEncoderConfig, batch: int, tokens: int) -> int:
    """Count the UMT5 encoder on prompts padded to `tokens`."""
    projections = 2 * tokens * 4 * config.dim * config.dim_attn
    attention = 4 * tokens**2 * config.dim_attn
    feed_forward = 2 * tokens * 3 * config.dim * config.dim_ffn
    return batch * config.num_layers * (projections + attention + feed_forward)


def vae_decode(config: VAEConfig, batch: int, latent_frames: int, height: int, width: int) -> int:
    """Count the decoding of latent frames of height x width, none of them a video's first."""
    multiples = config.dim_mult[::-1]
    widths = [config.dim * multiple for multiple in (multiples[0], *multiples)]
    temporal = config.temporal_downsample[::-1]
    positions = height * width
    total = positions * (2 * config.z_dim**2 + _causal(config.z_dim, widths[0]))
    total += positions * 2 * _residual(widths[0], widths[0]) + _spatial_attention(widths[0], positions)
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        halved = inputs // 2 if level else inputs
        total += positions * (_residual(halved, outputs) + config.num_res_blocks * _residual(outputs, outputs))
        if level < len(temporal):
            if temporal[level]:
                total += positions * 2 * 3 * outputs * 2 * outputs
                positions *= 2
            positions *= 4
            total += positions * 2 * 9 * outputs * (outputs // 2)
    total += positions * _causal(widths[-1], 3)
    return batch * latent_frames * total


def _causal(inputs: int, outputs: int) -> int:
    return 2 * 27 * inputs * outputs


def _residual(inputs: int, outputs: int) -> int:
    shortcut = 2 * inputs * outputs if inputs != outputs else 0
    return _causal(inputs, outputs) + _causal(outputs, outputs) + shortcut


def _spatial_attention(channels: int, positions: int) -> int:
    return positions * 2 * 4 * channels**2 + 4 * positions**2 * channels
