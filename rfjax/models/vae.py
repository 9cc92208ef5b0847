"""The causal video autoencoder of Wan2.1: 8x8 smaller in space, 4x in time, the first frame alone.

The networks see a video in order, the first frame and then groups of four, and remember of the past only what each
convolution over time still needs. That memory is an explicit pytree of fixed shapes that starts at zero, so that
encoding and decoding are scans with constant memory and decoding can stream.

Architecture: Wan-Video/Wan2.1, `wan/modules/vae.py` (Apache-2.0).
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from rfjax.config import VAEConfig
from rfjax.errors import UserError
from rfjax.models.convolution import KERNEL_TIMES, Cache, CausalConv, Pointwise, SpatialConv, TimeConv
from rfjax.models.functional import Params, abstract_params, bind
from rfjax.pytree import pytree


@pytree()
@dataclasses.dataclass(frozen=True)
class EncoderCache:
    """What the encoder remembers between groups of frames."""

    conv_in: Cache
    """Last two frames of the video."""
    down: Cache
    """One entry a layer of `Encoder.down`."""
    mid: Cache
    """Entries of the two residual blocks in the middle."""
    conv_out: Cache
    """Last two inputs of the output convolution."""


@pytree()
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What the decoder remembers between latent frames."""

    conv_in: Cache
    """Last two latent frames, denormalised."""
    mid: Cache
    """Entries of the two residual blocks in the middle."""
    up: Cache
    """One entry a layer of `Decoder.up`."""
    conv_out: Cache
    """Last two inputs of the output convolution."""


class RMSNorm(nnx.Module):
    """Scale every position to unit mean square over its channels, in float32."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """Return the normalised positions; one of all zeros stays zero."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        floor = 1e-24 / x.shape[-1]  # PyTorch's normalize() divides by a length of at least 1e-12
        normalised = wide * lax.rsqrt(jnp.maximum(mean_square, floor))
        return (normalised * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.norm1 = RMSNorm(inputs, rngs=rngs, param_dtype=param_dtype)
        self.conv1 = CausalConv(inputs, outputs, rngs=rngs, param_dtype=param_dtype)
        self.norm2 = RMSNorm(outputs, rngs=rngs, param_dtype=param_dtype)
        self.conv2 = CausalConv(outputs, outputs, rngs=rngs, param_dtype=param_dtype)
        if inputs != outputs:
            self.shortcut = Pointwise(inputs, outputs, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, height: int, width: int, dtype: Any) -> Cache:
        """Return the empty pasts of both convolutions."""
        return tuple(conv.init_cache(batch, height, width, dtype) for conv in (self.conv1, self.conv2))

    def __call__(self, x: Float[Array, "B T H W I"], cache: Cache) -> tuple[Float[Array, "B T H W O"], Cache]:
        """Return the block's output and the new pasts."""
        y, past1 = self.conv1(jax.nn.silu(self.norm1(x)), cache[0])
        y, past2 = self.conv2(jax.nn.silu(self.norm2(y)), cache[1])
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return shortcut + y, (past1, past2)


class SpatialAttention(nnx.Module):
    """Attention with one head among the positions of a frame."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.norm = RMSNorm(channels, rngs=rngs, param_dtype=param_dtype)
        self.qkv = Pointwise(channels, 3 * channels, rngs=rngs, param_dtype=param_dtype)
        self.proj = Pointwise(channels, channels, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        """Return x plus what its positions read from their own frame."""
        B, T, H, W, _ = x.shape
        tokens = rearrange(self.qkv(self.norm(x)), "B T H W (three C) -> three (B T) (H W) C", three=3)
        q, k, v = tokens
        scores = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * x.shape[-1] ** -0.5).astype(x.dtype)
        read = jnp.einsum("nqk,nkc->nqc", weights, v)
        return x + self.proj(rearrange(read, "(B T) (H W) C -> B T H W C", B=B, T=T, H=H, W=W))


class Middle(nnx.Module):
    """Residual block, spatial attention, residual block, at the latent's resolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.block1 = ResidualBlock(channels, channels, rngs=rngs, param_dtype=param_dtype)
        self.attention = SpatialAttention(channels, rngs=rngs, param_dtype=param_dtype)
        self.block2 = ResidualBlock(channels, channels, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, height: int, width: int, dtype: Any) -> Cache:
        """Return the empty pasts of both blocks."""
        return tuple(block.init_cache(batch, height, width, dtype) for block in (self.block1, self.block2))

    def __call__(self, x: Float[Array, "B T H W C"], cache: Cache) -> tuple[Float[Array, "B T H W C"], Cache]:
        """Return the output and the new pasts."""
        x, past1 = self.block1(x, cache[0])
        x, past2 = self.block2(self.attention(x), cache[1])
        return x, (past1, past2)


class Downsample(nnx.Module):
    """Halve rows and columns and, where `temporal`, the frame rate."""

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.channels = channels
        self.temporal = temporal
        self.conv = SpatialConv(channels, channels, rngs=rngs, param_dtype=param_dtype)
        if temporal:
            self.time_conv = TimeConv(channels, channels, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, height: int, width: int, dtype: Any) -> Cache:
        """Return the empty past: one frame after halving rows and columns."""
        return jnp.zeros((batch, 1, height // 2, width // 2, self.channels), dtype) if self.temporal else None

    def __call__(
        self, x: Float[Array, "B S H W C"], past: Cache, first: bool
    ) -> tuple[Float[Array, "B T h w C"], Cache]:
        """Return the smaller frames and the new past. The video's first frame alone keeps its time."""
        x = self.conv.halve(x)
        if not self.temporal:
            return x, None
        halved = self.time_conv(x if first else jnp.concatenate([past, x], axis=1), stride=2)
        return jnp.concatenate([x[:, :1], halved], axis=1) if first else halved, x[:, -1:]


class Upsample(nnx.Module):
    """Double rows and columns, halving the channels, and, where `temporal`, the frame rate before."""

    def __init__(self, channels: int, temporal: bool, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.channels = channels
        self.temporal = temporal
        self.conv = SpatialConv(channels, channels // 2, rngs=rngs, param_dtype=param_dtype)
        if temporal:
            self.time_conv = TimeConv(channels, 2 * channels, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, height: int, width: int, dtype: Any) -> Cache:
        """Return the empty past of two frames."""
        return jnp.zeros((batch, KERNEL_TIMES - 1, height, width, self.channels), dtype) if self.temporal else None

    def __call__(
        self, x: Float[Array, "B S H W C"], past: Cache, first: bool
    ) -> tuple[Float[Array, "B T h w c"], Cache]:
        """Return the larger frames and the new past.

        The first latent frame stays one frame and leaves no past: the second sees zeros, as in training.
        """
        if self.temporal:
            alone, later = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            frames = jnp.concatenate([past, later], axis=1)
            past = frames[:, later.shape[1] :]
            doubled = rearrange(self.time_conv(frames), "B S H W (two C) -> B (S two) H W C", two=2)
            x = jnp.concatenate([alone, doubled], axis=1)
        return self.conv(x.repeat(2, axis=2).repeat(2, axis=3)), past


class Encoder(nnx.Module):
    """Video frames to latent frames: residual blocks and down-sampling, the middle, the output convolution."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv(3, widths[0], rngs=rngs, param_dtype=param_dtype)
        down = []
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            for block in range(config.num_res_blocks):
                down.append(ResidualBlock(outputs if block else inputs, outputs, rngs=rngs, param_dtype=param_dtype))
            if level < len(config.temporal_downsample):
                temporal = config.temporal_downsample[level]
                down.append(Downsample(outputs, temporal, rngs=rngs, param_dtype=param_dtype))
        self.down = nnx.List(down)
        self.mid = Middle(widths[-1], rngs=rngs, param_dtype=param_dtype)
        self.norm_out = RMSNorm(widths[-1], rngs=rngs, param_dtype=param_dtype)
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, height: int, width: int, dtype: Any) -> EncoderCache:
        """Return the empty memory for frames of height x width pixels."""
        conv_in = self.conv_in.init_cache(batch, height, width, dtype)
        down = []
        for layer in self.down:
            down.append(layer.init_cache(batch, height, width, dtype))
            if isinstance(layer, Downsample):
                height, width = height // 2, width // 2
        mid = self.mid.init_cache(batch, height, width, dtype)
        return EncoderCache(conv_in, tuple(down), mid, self.conv_out.init_cache(batch, height, width, dtype))

    def __call__(
        self, x: Float[Array, "B T H W 3"], cache: EncoderCache, first: bool
    ) -> tuple[Float[Array, "B F h w C2"], EncoderCache]:
        """Return mean and log variance of the latent frames, before the last linear map, and the new memory."""
        x, conv_in = self.conv_in(x, cache.conv_in)
        down = []
        for layer, past in zip(self.down, cache.down, strict=True):
            x, past = layer(x, past) if isinstance(layer, ResidualBlock) else layer(x, past, first)
            down.append(past)
        x, mid = self.mid(x, cache.mid)
        x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), cache.conv_out)
        return x, EncoderCache(conv_in, tuple(down), mid, conv_out)


class Decoder(nnx.Module):
    """Latent frames to video frames: the middle, residual blocks and up-sampling, the output convolution."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        multiples = config.dim_mult[::-1]
        widths = [config.dim * m for m in (multiples[0], *multiples)]
        self.conv_in = CausalConv(config.z_dim, widths[0], rngs=rngs, param_dtype=param_dtype)
        self.mid = Middle(widths[0], rngs=rngs, param_dtype=param_dtype)
        up = []
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            halved = inputs // 2 if level else inputs  # by the up-sampling of the level before
            for block in range(config.num_res_blocks + 1):
                up.append(ResidualBlock(outputs if block else halved, outputs, rngs=rngs, param_dtype=param_dtype))
            if level < len(config.temporal_downsample):
                temporal = config.temporal_downsample[::-1][level]
                up.append(Upsample(outputs, temporal, rngs=rngs, param_dtype=param_dtype))
        self.up = nnx.List(up)
        self.norm_out = RMSNorm(widths[-1], rngs=rngs, param_dtype=param_dtype)
        self.conv_out = CausalConv(widths[-1], 3, rngs=rngs, param_dtype=param_dtype)

    def init_cache(self, batch: int, height: int, width: int, dtype: Any) -> DecoderCache:
        """Return the empty memory for latent frames of height x width."""
        conv_in = self.conv_in.init_cache(batch, height, width, dtype)
        mid = self.mid.init_cache(batch, height, width, dtype)
        up = []
        for layer in self.up:
            up.append(layer.init_cache(batch, height, width, dtype))
            if isinstance(layer, Upsample):
                height, width = 2 * height, 2 * width
        return DecoderCache(conv_in, mid, tuple(up), self.conv_out.init_cache(batch, height, width, dtype))

    def __call__(
        self, z: Float[Array, "B F h w C"], cache: DecoderCache, first: bool
    ) -> tuple[Float[Array, "B T H W 3"], DecoderCache]:
        """Return the video frames, not yet clipped, and the new memory."""
        x, conv_in = self.conv_in(z, cache.conv_in)
        x, mid = self.mid(x, cache.mid)
        up = []
        for layer, past in zip(self.up, cache.up, strict=True):
            x, past = layer(x, past) if isinstance(layer, ResidualBlock) else layer(x, past, first)
            up.append(past)
        x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), cache.conv_out)
        return x, DecoderCache(conv_in, mid, tuple(up), conv_out)


class WanVAE(nnx.Module):
    """Encoder, decoder and the linear maps between them and the latents."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.encoder = Encoder(config, rngs=rngs, param_dtype=param_dtype)
        self.quant_conv = Pointwise(2 * config.z_dim, 2 * config.z_dim, rngs=rngs, param_dtype=param_dtype)
        self.post_quant_conv = Pointwise(config.z_dim, config.z_dim, rngs=rngs, param_dtype=param_dtype)
        self.decoder = Decoder(config, rngs=rngs, param_dtype=param_dtype)


def _statistics(config: VAEConfig) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    return jnp.asarray(config.latent_mean, jnp.float32), jnp.asarray(config.latent_std, jnp.float32)


def denormalise(config: VAEConfig, latents: Float[Array, "*frames C"]) -> Float[Array, "*frames C"]:
    """Undo the normalisation of latents, per channel; the result is float32, as `reconstruct` takes it."""
    mean, std = _statistics(config)
    return latents.astype(jnp.float32) * std + mean


def _param_dtype(params: Params) -> Any:
    return params["quant_conv"]["kernel"].dtype


def _check_video(config: VAEConfig, shape: tuple[int, ...]) -> None:
    _, T, H, W, _ = shape
    group, factor = config.temporal_factor, config.spatial_factor
    if T % group != 1 % group:
        raise UserError(f"the video has {T} frames; the autoencoder needs 1 plus a multiple of {group}")
    if H % factor or W % factor:
        raise UserError(f"the video is {H}x{W} pixels; the autoencoder needs multiples of {factor}")


def posterior(
    config: VAEConfig, params: Params, video: Float[Array, "B T H W 3"]
) -> tuple[Float[Array, "B F h w C"], Float[Array, "B F h w C"]]:
    """Return the distribution of a video's latents, not normalised, all frames at once: for training.

    Args:
        config: Sizes of the autoencoder.
        params: Parameters of `WanVAE`; their dtype is that of the computation and of the result.
        video: RGB in [-1, 1], T = 1 + 4k frames, H and W multiples of 8.

    Returns:
        Mean and log variance; F = 1 + k, h = H / 8, w = W / 8.

    Raises:
        UserError: T, H or W does not fit.
    """
    _check_video(config, video.shape)
    B, _, H, W, _ = video.shape
    network = bind(WanVAE, config, params)
    dtype = _param_dtype(params)
    moments, _ = network.encoder(video.astype(dtype), network.encoder.init_cache(B, H, W, dtype), first=True)
    mean, log_variance = jnp.split(network.quant_conv(moments), 2, axis=-1)
    return mean, log_variance


def reconstruct(config: VAEConfig, params: Params, z: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
    """Decode latents that are not normalised, all frames at once and without clipping: for training.

    Args:
        config: Sizes of the autoencoder.
        params: Parameters of `WanVAE`; their dtype is that of the computation and of the result.
        z: A sample of the `posterior`, or `denormalise`d latents.

    Returns:
        T = 1 + 4 (F - 1) frames, about [-1, 1].
    """
    B, _, h, w, _ = z.shape
    network = bind(WanVAE, config, params)
    dtype = _param_dtype(params)
    cache = network.decoder.init_cache(B, h, w, dtype)
    video, _ = network.decoder(network.post_quant_conv(z.astype(dtype)), cache, first=True)
    return video


def encode(config: VAEConfig, params: Params, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F h w C"]:
    """Encode a video to normalised latents.

    Args:
        config: Sizes of the autoencoder.
        params: Parameters of `WanVAE`; their dtype is that of the computation and of the result.
        video: RGB in [-1, 1], T = 1 + 4k frames, H and W multiples of 8.

    Returns:
        The posterior's mean, normalised per channel; F = 1 + k, h = H / 8, w = W / 8.

    Raises:
        UserError: T, H or W does not fit.
    """
    _check_video(config, video.shape)
    B, _, H, W, _ = video.shape
    network = bind(WanVAE, config, params)
    dtype = _param_dtype(params)
    mean, std = _statistics(config)

    def step(cache: EncoderCache, frames: Float[Array, "B t H W 3"], first: bool = False):
        moments, cache = network.encoder(frames.astype(dtype), cache, first)
        mu = network.quant_conv(moments)[..., : config.z_dim]
        return cache, ((mu.astype(jnp.float32) - mean) / std).astype(dtype)

    cache, first_latent = step(network.encoder.init_cache(B, H, W, dtype), video[:, :1], first=True)
    groups = rearrange(video[:, 1:], "B (k g) H W C -> k B g H W C", g=config.temporal_factor)
    _, latents = lax.scan(step, cache, groups)
    return jnp.concatenate([first_latent, rearrange(latents, "k B 1 h w C -> B k h w C")], axis=1)


def decode_init(config: VAEConfig, dtype: Any, batch: int, latent_height: int, latent_width: int) -> DecoderCache:
    """Return the decoder's empty memory.

    Args:
        config: Sizes of the autoencoder.
        dtype: Type of the parameters that will decode.
        batch: Number of videos.
        latent_height: Rows of a latent frame.
        latent_width: Columns of a latent frame.
    """
    network = bind(WanVAE, config, abstract_params(WanVAE, config, dtype))
    return network.decoder.init_cache(batch, latent_height, latent_width, dtype)


def _decode_frame(
    config: VAEConfig, params: Params, cache: DecoderCache, latent: Float[Array, "B 1 h w C"], first: bool
) -> tuple[DecoderCache, Float[Array, "B T H W 3"]]:
    """Decode one latent frame to one video frame (the first) or to `temporal_factor` (all later ones)."""
    network = bind(WanVAE, config, params)
    z = denormalise(config, latent).astype(_param_dtype(params))
    video, cache = network.decoder(network.post_quant_conv(z), cache, first)
    return cache, jnp.clip(video, -1, 1)


def decode_first(
    config: VAEConfig, params: Params, cache: DecoderCache, latent: Float[Array, "B 1 h w C"]
) -> tuple[DecoderCache, Float[Array, "B 1 H W 3"]]:
    """Decode a video's first latent frame, which holds a single video frame.

    Args:
        config: Sizes of the autoencoder.
        params: Parameters of `WanVAE`; their dtype is that of the computation and of the result.
        cache: From `decode_init`.
        latent: Normalised latents.

    Returns:
        The new memory and the frame in [-1, 1].
    """
    return _decode_frame(config, params, cache, latent, first=True)


def decode_next(
    config: VAEConfig, params: Params, cache: DecoderCache, latents: Float[Array, "B n h w C"]
) -> tuple[DecoderCache, Float[Array, "B T H W 3"]]:
    """Decode the n latent frames that follow, one after the other, with memory that does not grow with n.

    Args:
        config: Sizes of the autoencoder.
        params: Parameters of `WanVAE`; their dtype is that of the computation and of the result.
        cache: From `decode_first` or the last `decode_next`.
        latents: Normalised latents.

    Returns:
        The new memory and T = 4n frames in [-1, 1]. Any partition of a video gives the same frames.
    """

    def step(cache: DecoderCache, latent: Float[Array, "B h w C"]):
        return _decode_frame(config, params, cache, latent[:, None], first=False)

    cache, video = lax.scan(step, cache, rearrange(latents, "B n h w C -> n B h w C"))
    return cache, rearrange(video, "n B t H W C -> B (n t) H W C")


def decode(config: VAEConfig, params: Params, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
    """Decode a whole video.

    Args:
        config: Sizes of the autoencoder.
        params: Parameters of `WanVAE`; their dtype is that of the computation and of the result.
        latents: Normalised latents.

    Returns:
        T = 1 + 4 (F - 1) frames in [-1, 1].
    """
    B, _, h, w, _ = latents.shape
    cache, first = decode_first(config, params, decode_init(config, _param_dtype(params), B, h, w), latents[:, :1])
    _, rest = decode_next(config, params, cache, latents[:, 1:])
    return jnp.concatenate([first, rest], axis=1)
