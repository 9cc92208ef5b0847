"""Between what people see and what the transformer works on: pixels and latents, prompts and embeddings."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from rfjax.config import TextEncoderConfig, VAEConfig
from rfjax.errors import UserError
from rfjax.models import text_encoder, vae
from rfjax.models.functional import AnyArray, Params
from rfjax.models.model import Model
from rfjax.models.tokenizer import Tokenizer

_decode = functools.partial(jax.jit, static_argnums=0)(vae.decode)
_encode = functools.partial(jax.jit, static_argnums=0)(vae.encode)
_encode_tokens = functools.partial(jax.jit, static_argnums=0)(text_encoder.encode_tokens)


def decode(model: Model, latents: Float[AnyArray, "B F h w C"]) -> Float[Array, "B T H W 3"]:
    """Decode normalised latents to video in [-1, 1], T = 1 + 4 (F - 1) frames at 8 times the size for Wan's sizes.

    Raises:
        UserError: the checkpoint has no autoencoder, or the latents have another number of channels.
    """
    config, params = vae_of(model)
    if latents.shape[-1] != config.z_dim:
        raise UserError(f"latents have {latents.shape[-1]} channels; the autoencoder takes {config.z_dim}")
    return _decode(config, params, latents)


def encode(model: Model, video: Float[AnyArray, "B T H W 3"]) -> Float[Array, "B F h w C"]:
    """Encode video in [-1, 1] to normalised latents, F = 1 + (T - 1) / 4 for Wan's sizes.

    Raises:
        UserError: the checkpoint has no autoencoder, or a size that does not divide.
    """
    return _encode(*vae_of(model), video)


def to_unit(video: UInt8[AnyArray, "*frames H W 3"]) -> Float[Array, "*frames H W 3"]:
    """Return 8-bit pixels as float32 in [-1, 1], as the autoencoder takes them."""
    return jnp.asarray(video).astype(jnp.float32) / 127.5 - 1


def to_bytes(video: Float[AnyArray, "*frames H W 3"]) -> UInt8[Array, "*frames H W 3"]:
    """Return pixels in [-1, 1], as the autoencoder gives them, in 8 bits."""
    return jnp.round((jnp.asarray(video).astype(jnp.float32) + 1) * 127.5).astype(jnp.uint8)


def encode_tokens(
    model: Model, ids: Int[AnyArray, "B L"], mask: Int[AnyArray, "B L"] | Bool[AnyArray, "B L"]
) -> Float[Array, "B L D"]:
    """Encode token ids; hidden states where `mask` is 0 or False are zero.

    Raises:
        UserError: the checkpoint has no text encoder.
    """
    config, params = _text_encoder_of(model)
    return _encode_tokens(config, params, jnp.asarray(ids), jnp.asarray(mask))


def encode_prompt(model: Model, prompts: Sequence[str]) -> Float[Array, "B L D"]:
    """Clean, tokenise and encode prompts, padded with zeros to the transformer's text length.

    Raises:
        UserError: the checkpoint has no text encoder or tokenizer, its embeddings do not fit its transformer, a prompt
            is empty, or `prompts` is a single string.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts is {prompts!r}; pass a list of prompts, such as [{prompts!r}]")
    config, _ = _text_encoder_of(model)
    if config.dim != model.config.transformer.text_dim:
        raise UserError(
            f"the checkpoint's text encoder gives width {config.dim}, but its transformer takes "
            f"{model.config.transformer.text_dim}: they do not belong together"
        )
    return encode_tokens(model, *tokenizer_of(model)(list(prompts)))


def tokenizer_of(model: Model) -> Tokenizer:
    """Return the checkpoint's tokenizer or raise `UserError`."""
    if model.tokenizer is None:
        raise UserError("the checkpoint has no tokenizer; convert it with --tokenizer, or pass prompt embeddings")
    return model.tokenizer


def vae_of(model: Model) -> tuple[VAEConfig, Params]:
    """Return the checkpoint's autoencoder or raise `UserError`."""
    if model.config.vae is None or model.vae is None:
        raise UserError("the checkpoint has no autoencoder; convert it with --vae")
    return model.config.vae, model.vae


def _text_encoder_of(model: Model) -> tuple[TextEncoderConfig, Params]:
    if model.config.umt5 is None or model.text_encoder is None:
        raise UserError("the checkpoint has no text encoder; convert it with --text-encoder, or pass prompt embeddings")
    return model.config.umt5, model.text_encoder
