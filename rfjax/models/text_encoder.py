"""The UMT5 text encoder: T5 with its own table of relative positions in every layer.

Architecture: Wan-Video/Wan2.1, `wan/modules/t5.py` (Apache-2.0).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rfjax.config import TextEncoderConfig
from rfjax.models.functional import BLOCKS, Params, bind, gathered
from rfjax.models.layers import RMSNorm

MAX_DISTANCE = 128
"""Tokens from which on all distances share the last bucket."""
EPS = 1e-6


def relative_buckets(length: int, num_buckets: int) -> Int[np.ndarray, "L L"]:
    """Return the bucket of every pair (query, key) among `length` tokens.

    Half of the buckets are for keys behind the query, half for keys ahead. In each half, the near distances have a
    bucket each, the far ones share buckets that widen logarithmically up to `MAX_DISTANCE`. The logarithm is taken in
    float32 as PyTorch takes it, for distance 64 falls exactly on a boundary.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.arange(length)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(np.log(MAX_DISTANCE / exact)) * np.float32(half - exact)
    bucket = np.where(distance < exact, distance, np.minimum(exact + steps.astype(np.int32), half - 1))
    offset = distance[None, :] - distance[:, None]
    return bucket[np.abs(offset)] + half * (offset > 0)


class Linear(nnx.Module):
    """A linear map without bias."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), param_dtype))

    def __call__(self, x: Float[Array, "B L I"]) -> Float[Array, "B L O"]:
        """Map the last axis."""
        return x @ self.kernel[...]


class Embedding(nnx.Module):
    """A table of vectors."""

    def __init__(self, rows: int, dim: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (rows, dim), param_dtype))

    def __call__(self, rows: Int[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape D"]:
        """Look rows up."""
        return self.embedding[...][rows]


class SelfAttention(nnx.Module):
    """Attention whose logits are not scaled, plus a bias for relative positions."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.heads = config.num_heads
        self.q = Linear(config.dim, config.dim_attn, rngs=rngs, param_dtype=param_dtype)
        self.k = Linear(config.dim, config.dim_attn, rngs=rngs, param_dtype=param_dtype)
        self.v = Linear(config.dim, config.dim_attn, rngs=rngs, param_dtype=param_dtype)
        self.o = Linear(config.dim_attn, config.dim, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], bias: Float[Array, "L L heads"]
    ) -> Float[Array, "B L D"]:
        """Return what each token reads from the tokens that the mask admits; softmax in float32."""
        q, k, v = (rearrange(m(x), "B L (N C) -> B L N C", N=self.heads) for m in (self.q, self.k, self.v))
        logits = jnp.einsum("bqnc,bknc->bnqk", q, k, preferred_element_type=jnp.float32)
        logits += rearrange(bias, "q k n -> n q k").astype(jnp.float32)
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits).astype(x.dtype)
        return self.o(rearrange(jnp.einsum("bnqk,bknc->bqnc", weights, v), "B L N C -> B L (N C)"))


class GatedFeedForward(nnx.Module):
    """Feed-forward layer gated by a GELU."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.gate = Linear(config.dim, config.dim_ffn, rngs=rngs, param_dtype=param_dtype)
        self.fc1 = Linear(config.dim, config.dim_ffn, rngs=rngs, param_dtype=param_dtype)
        self.fc2 = Linear(config.dim_ffn, config.dim, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Map each token."""
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class EncoderBlock(nnx.Module):
    """Self-attention and feed-forward, each on normalised input and added to the residual."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.norm1 = RMSNorm(config.dim, EPS, param_dtype=param_dtype)
        self.attn = SelfAttention(config, rngs=rngs, param_dtype=param_dtype)
        self.norm2 = RMSNorm(config.dim, EPS, param_dtype=param_dtype)
        self.ffn = GatedFeedForward(config, rngs=rngs, param_dtype=param_dtype)
        self.position_bias = Embedding(config.num_buckets, config.num_heads, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[np.ndarray, "L L"]
    ) -> Float[Array, "B L D"]:
        """Return the block's output."""
        x = x + self.attn(self.norm1(x), mask, self.position_bias(buckets))
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """The encoder; its layers are stacked on the first axis of everything under `blocks`."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> EncoderBlock:
            return EncoderBlock(config, rngs=rngs, param_dtype=param_dtype)

        self.num_buckets = config.num_buckets
        self.token_embedding = Embedding(config.vocab, config.dim, rngs=rngs, param_dtype=param_dtype)
        self.blocks = stack(rngs)
        self.norm = RMSNorm(config.dim, EPS, param_dtype=param_dtype)

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Return the hidden states of all tokens; those of padding mean nothing."""
        buckets = relative_buckets(ids.shape[1], self.num_buckets)
        graphdef, layers = nnx.split(self.blocks)

        def step(x: Float[Array, "B L D"], layer: Any) -> tuple[Float[Array, "B L D"], None]:
            return nnx.merge(graphdef, gathered(layer, BLOCKS))(x, mask, buckets), None

        x, _ = lax.scan(step, self.token_embedding(ids), layers)
        return self.norm(x)


def encode_tokens(
    config: TextEncoderConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"] | Bool[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Encode tokenised prompts.

    Args:
        config: Sizes of the encoder.
        params: Parameters of `UMT5Encoder`; their dtype is that of the computation and of the result.
        ids: Token numbers, end of sequence included, then padding.
        mask: 1 on the prompt and its end of sequence, 0 on padding.

    Returns:
        Prompt embeddings, zero on padding.
    """
    valid = mask.astype(bool)
    hidden = bind(UMT5Encoder, config, params)(ids, valid)
    return jnp.where(valid[..., None], hidden, 0)
