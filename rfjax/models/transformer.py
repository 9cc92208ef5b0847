"""The Wan diffusion transformer, bidirectional and causal in one module.

Without memory, attention sees all frames given: the bidirectional teacher and score networks. With memory, the frames
given are one chunk and attention sees the chunk and the remembered frames: the causal student. Trained on whole videos,
the student sees all chunks in one pass and each attends to its past alone. Layers are one stacked parameter tree run by
`lax.scan`. Source: Wan2.1 `wan/modules/model.py`, Self-Forcing `wan/modules/causal_model.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from rfjax.config import TransformerConfig
from rfjax.models.attention import causal_attention
from rfjax.models.chunk_attention import chunk_attention, prompt_attention
from rfjax.models.functional import BLOCKS, gathered
from rfjax.models.layers import RMSNorm
from rfjax.models.layout import by_tokens, heads_to_tokens, tokens_to_heads, whole
from rfjax.pytree import pytree
from rfjax.rope import rotate, rotation


@pytree()
@dataclasses.dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of every layer: they depend on the prompt alone and are made once."""

    keys: Float[Array, "*L B T C"]
    """After the key norm, heads flattened."""
    values: Float[Array, "*L B T C"]


@pytree()
@dataclasses.dataclass(frozen=True)
class AttendedMemory:
    """Remembered frames as self-attention reads them: rotated, valid frames first."""

    keys: Float[Array, "*L B S T C"]
    """Of S frames of T tokens, after the key norm and the rotary embedding, heads flattened."""
    values: Float[Array, "*L B S T C"]
    length: Int[Array, "B"]
    """How many of the S frames are valid."""


@pytree()
@dataclasses.dataclass(frozen=True)
class Projections:
    """What self-attention made of the frames given, before the rotary embedding, heads flattened."""

    queries: Float[Array, "*L B F T C"]
    """After the query norm."""
    keys: Float[Array, "*L B F T C"]
    """After the key norm."""
    values: Float[Array, "*L B F T C"]


@dataclasses.dataclass(frozen=True)
class Causal:
    """How a whole video is seen in one pass: each chunk sees its past and itself."""

    chunk_frames: int
    clean_frames: int
    """How many of the first frames are the clean past of the others (teacher forcing), or 0."""


class AffineNorm(nnx.Module):
    """Layer norm with weight and bias, statistics in float32."""

    def __init__(self, dim: int, eps: float, *, param_dtype):
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))
        self.bias = nnx.Param(jnp.zeros(dim, param_dtype))
        self.eps = eps

    def __call__(self, x):
        """Norm the last axis of x."""
        normed = layer_norm(x, self.eps)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, din: int, hidden: int, dout: int, activation, *, rngs: nnx.Rngs, param_dtype, precision=None):
        self.fc1 = linear(din, hidden, rngs=rngs, param_dtype=param_dtype, precision=precision)
        self.fc2 = linear(hidden, dout, rngs=rngs, param_dtype=param_dtype, precision=precision)
        self.activation = activation

    def __call__(self, x):
        """Map the last axis of x."""
        return self.fc2(self.activation(self.fc1(x)))


class Attention(nnx.Module):
    """Projections and norms of one attention; the norms run over the whole model dimension, before the heads."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype):
        dim = config.dim
        self.q = linear(dim, dim, rngs=rngs, param_dtype=param_dtype)
        self.k = linear(dim, dim, rngs=rngs, param_dtype=param_dtype)
        self.v = linear(dim, dim, rngs=rngs, param_dtype=param_dtype)
        self.o = linear(dim, dim, rngs=rngs, param_dtype=param_dtype)
        self.norm_q = RMSNorm(dim, config.eps, param_dtype=param_dtype)
        self.norm_k = RMSNorm(dim, config.eps, param_dtype=param_dtype)


class Block(nnx.Module):
    """One layer: self-attention, cross-attention and feed-forward, modulated per frame by the timestep."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype):
        dim = config.dim
        self.config = config
        self.modulation = nnx.Param(modulation_init(rngs, 6, dim, param_dtype))
        self.self_attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.cross_attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.cross_norm = AffineNorm(dim, config.eps, param_dtype=param_dtype)
        self.ffn = MLP(dim, config.ffn_dim, dim, jax.nn.gelu, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x, modulation, rope, text: TextContext, memory: AttendedMemory | None, causal: Causal | None):
        """Run the layer on tokens x [B, F, T, C]; also return its `Projections`."""
        e = modulation + self.modulation[...].astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = (e[:, :, None, i] for i in range(6))

        h = (layer_norm(x, self.config.eps) * (1 + scale1) + shift1).astype(x.dtype)
        y, projections = self._self_attention(h, rope, memory, causal)
        x = x + (y * gate1).astype(x.dtype)

        x = x + self._cross_attention(self.cross_norm(x), text)

        h = (layer_norm(x, self.config.eps) * (1 + scale2) + shift2).astype(x.dtype)
        x = x + (self.ffn(h) * gate2).astype(x.dtype)
        return x, projections

    def _self_attention(self, h, rope, memory: AttendedMemory | None, causal: Causal | None):
        attn, heads = self.self_attn, self.config.num_heads
        projected = attn.norm_q(attn.q(h)), attn.norm_k(attn.k(h)), attn.v(h)
        queries, keys, values = (tokens_to_heads(t, heads) for t in projected)
        q, k = (rotate(self._heads(t), *rope) for t in (queries, keys))
        v, past = self._heads(values), None
        if memory is not None:
            past = self._heads(memory.keys), self._heads(memory.values), memory.length
        with jax.named_scope("self_attention"):
            out = chunk_attention(q, k, v, past) if causal is None else self._causal_attention(q, k, v, causal)
        out = heads_to_tokens(rearrange(out, "b f t h d -> b f t (h d)"), heads)
        return attn.o(out), Projections(queries, keys, values)

    def _causal_attention(self, q, k, v, causal: Causal):
        frames, tokens = q.shape[1:3]
        q, k, v = (rearrange(t, "b f t h d -> b (f t) h d") for t in (q, k, v))
        out = causal_attention(q, k, v, causal.chunk_frames * tokens, causal.clean_frames * tokens)
        return rearrange(out, "b (f t) h d -> b f t h d", f=frames)

    def _cross_attention(self, h, text: TextContext):
        attn = self.cross_attn
        q = self._heads(attn.norm_q(attn.q(h)))
        out = prompt_attention(q, self._heads(text.keys), self._heads(text.values))
        return attn.o(rearrange(out, "b f t h d -> b f t (h d)"))

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


class Head(nnx.Module):
    """Modulated norm and projection to the latent positions of each token."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype):
        self.config = config
        self.modulation = nnx.Param(modulation_init(rngs, 2, config.dim, param_dtype))
        self.linear = linear(config.dim, config.patch_volume * config.out_dim, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x, embedding):
        """Map tokens x [B, F, T, C], with the timestep's embedding [B, F, C], to [B, F, T, patch volume * channels]."""
        e = embedding[:, :, None] + self.modulation[...].astype(jnp.float32)
        shift, scale = e[:, :, None, 0], e[:, :, None, 1]
        return self.linear((layer_norm(x, self.config.eps) * (1 + scale) + shift).astype(x.dtype))


class WanTransformer(nnx.Module):
    """The network: latents and timesteps in, flow `noise - x0` out."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        self.config = config
        dim = config.dim
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.patch_embedding = linear(config.patch_volume * config.in_dim, dim, **kwargs)
        self.text_embedding = MLP(config.text_dim, dim, dim, jax.nn.gelu, **kwargs)
        # A few numbers a frame decide over all tokens: true float32 also where products are rounded by default.
        exact = {**kwargs, "precision": jax.lax.Precision.HIGHEST}
        self.time_embedding = MLP(config.freq_dim, dim, dim, jax.nn.silu, **exact)
        self.time_projection = linear(dim, 6 * dim, **exact)
        self.blocks = stacked(Block, config.num_layers, config, **kwargs)
        self.head = Head(config, **kwargs)

    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        timestep: Float[Array, "B F"],
        text: TextContext,
        memory: AttendedMemory | None = None,
        return_projections: bool = False,
        *,
        chunk_frames: int | None = None,
        clean: Float[Array, "B F H W C"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "B F H W C_out"], Projections | None]:
        """Predict the flow, in float32, of frames that stand at time positions 0 to F - 1.

        Args:
            latents: noisy latents; computed in the type of the parameters.
            timestep: in [0, 1000], one a frame.
            text: from `embed_text`.
            memory: remembered frames, rotated to their positions relative to the first frame given.
            return_projections: also return those of every layer, for a memory.
            chunk_frames: each chunk of so many frames sees itself and the chunks before it, not all frames; F is a
                multiple of it, and there is no memory.
            clean: with `chunk_frames`, the latents whose past, at timestep 0, is seen in place of that of the frames
                given (teacher forcing); None lets every chunk see the chunks given before it (diffusion forcing).
            remat: compute each layer's activations again in the backward pass instead of keeping them.
        """
        config = self.config
        batch, frames, height, width, _ = latents.shape
        past = 0 if clean is None else frames
        causal = None if chunk_frames is None else Causal(chunk_frames, past)
        if clean is not None:
            latents = jnp.concatenate([clean, latents], axis=1)
            timestep = jnp.concatenate([jnp.zeros_like(timestep), timestep], axis=1)
        rows, columns = height // config.patch_size[1], width // config.patch_size[2]
        dtype = self.patch_embedding.kernel[...].dtype
        x = by_tokens(self.patch_embedding(patchify(latents.astype(dtype), config.patch_size)))
        embedding, modulation = self._embed_time(timestep)
        times = jnp.arange(latents.shape[1], dtype=jnp.int32) % frames
        positions = jnp.broadcast_to(times[:, None], (batch, *times.shape, 1))
        rope = rotation(positions, rows, columns, config.head_dim)
        graphdef, layers = nnx.split(self.blocks)

        def layer(x, scanned):
            params, text, keys, values = scanned
            attended = None if memory is None else AttendedMemory(keys, values, memory.length)
            x, projections = nnx.merge(graphdef, gathered(params, BLOCKS))(x, modulation, rope, text, attended, causal)
            return by_tokens(x), projections if return_projections else None

        remembered = (None, None) if memory is None else (memory.keys, memory.values)
        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        x, projections = jax.lax.scan(layer, x, (layers, text, *remembered))
        out = self.head(x[:, past:], embedding[:, past:]).astype(jnp.float32)
        return unpatchify(whole(out), rows, columns, config.patch_size), projections

    def embed_text(self, prompt_embeds: Float[Array, "B T D"]) -> TextContext:
        """Zero-pad prompt embeddings to the text length and project them to every layer's keys and values."""
        dtype = self.text_embedding.fc1.kernel[...].dtype
        missing = self.config.text_len - prompt_embeds.shape[1]
        context = self.text_embedding(jnp.pad(prompt_embeds.astype(dtype), ((0, 0), (0, missing), (0, 0))))
        graphdef, layers = nnx.split(self.blocks)

        def project(params):
            attn = nnx.merge(graphdef, gathered(params, BLOCKS)).cross_attn
            return TextContext(attn.norm_k(attn.k(context)), attn.v(context))

        return jax.lax.map(project, layers)

    def _embed_time(self, timestep):
        """Return the timestep's embedding [B, F, D] and modulation [B, F, 6, D], computed in float32."""
        embedding = self.time_embedding(timestep_features(timestep, self.config.freq_dim))
        modulation = self.time_projection(jax.nn.silu(embedding))
        return embedding, rearrange(modulation, "b f (six d) -> b f six d", six=6)


def timestep_features(timestep: Float[Array, "B F"], dim: int) -> Float[Array, "B F D"]:
    """Cosines, then sines, of `t * 10000 ** (-i / (dim / 2))`, float32."""
    half = dim // 2
    frequencies = (10_000.0 ** (-np.arange(half, dtype=np.float64) / half)).astype(np.float32)
    angles = timestep[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate_memory(
    keys: Float[Array, "L B S T C"],
    positions: Int[Array, "Y B S P"],
    places: Int[Array, "Y B S T"] | None,
    rows: int,
    columns: int,
    config: TransformerConfig,
) -> Float[Array, "L B S T C"]:
    """Turn remembered keys to their positions; those of `rotation`, alike in all layers (Y = 1) or not (Y = L)."""
    heads = keys.reshape(*keys.shape[:-1], config.num_heads, config.head_dim)
    return rotate(heads, *rotation(positions, rows, columns, config.head_dim, places)).reshape(keys.shape)


def patchify(latents: Float[Array, "B F H W C"], patch: tuple[int, ...]) -> Float[Array, "B F tokens volume"]:
    """Cut each frame into tokens of 1 x rows x columns positions, features ordered (row, column, channel)."""
    return rearrange(latents, "b f (y p) (x q) c -> b f (y x) (p q c)", p=patch[1], q=patch[2])


def unpatchify(
    tokens: Float[Array, "B F tokens volume"], rows: int, columns: int, patch: tuple[int, ...]
) -> Float[Array, "B F H W C"]:
    """Undo `patchify`."""
    return rearrange(tokens, "b f (y x) (p q c) -> b f (y p) (x q) c", y=rows, x=columns, p=patch[1], q=patch[2])


def layer_norm(x: Float[Array, "*shape C"], eps: float) -> Float[Array, "*shape C"]:
    """Layer norm without weights, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)


def linear(din: int, dout: int, *, rngs: nnx.Rngs, param_dtype, precision=None) -> nnx.Linear:
    """A dense layer with bias that computes in the wider type of its input and its parameters."""
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(din, dout, rngs=rngs, param_dtype=param_dtype, kernel_init=init, precision=precision)


def modulation_init(rngs: nnx.Rngs, rows: int, dim: int, dtype) -> jax.Array:
    """Normal with standard deviation dim ** -0.5, as upstream."""
    return jax.random.normal(rngs.params(), (rows, dim), dtype) * jnp.asarray(dim**-0.5, dtype)


def stacked(block, layers: int, config, *, rngs: nnx.Rngs, param_dtype):
    """Make `layers` copies of a block with their parameters stacked on a new first axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return block(config, rngs=rngs, param_dtype=param_dtype)

    return make(rngs)
