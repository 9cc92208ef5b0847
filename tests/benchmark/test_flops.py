import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax.benchmark import flops
from rfjax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from rfjax.models import text_encoder, vae
from rfjax.models.functional import abstract_params, bind
from rfjax.models.transformer import AttendedMemory, TextContext, WanTransformer

# One layer: XLA counts the body of a scan once.
TRANSFORMER = TransformerConfig(
    text_len=40, in_dim=8, out_dim=8, dim=256, ffn_dim=768, freq_dim=64, text_dim=320, num_heads=4, num_layers=1
)
BATCH, FRAMES, ATTENDED, LATENT = 2, 3, 7, (8, 12)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def xla_flops(function, *arguments):
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]


def params_of(network, config):
    return abstract_params(network, config)


def test_a_pass_costs_what_xla_counts():
    tokens = TRANSFORMER.frame_tokens(*LATENT)
    dim = TRANSFORMER.dim

    def network_pass(params, x, t, text, memory):
        return bind(WanTransformer, TRANSFORMER, params)(x, t, text, memory)[0]

    def remembered(frames):
        kv = jnp.zeros((1, BATCH, frames, tokens, dim))
        return jax.eval_shape(lambda: AttendedMemory(kv, kv, jnp.zeros(BATCH, jnp.int32)))

    text = jax.eval_shape(lambda: TextContext(jnp.zeros((1, BATCH, 40, dim)), jnp.zeros((1, BATCH, 40, dim))))
    arguments = (params_of(WanTransformer, TRANSFORMER), shape(BATCH, FRAMES, *LATENT, 8), shape(BATCH, FRAMES), text)
    counted = xla_flops(network_pass, *arguments, remembered(ATTENDED - FRAMES))
    ours = flops.transformer_pass(TRANSFORMER, BATCH, FRAMES, ATTENDED, tokens)
    np.testing.assert_allclose(ours.total, counted, rtol=0.04)

    # What 14 more frames add is self-attention alone.
    more = xla_flops(network_pass, *arguments, remembered(ATTENDED - FRAMES + 14)) - counted
    many = flops.transformer_pass(TRANSFORMER, BATCH, FRAMES, ATTENDED + 14, tokens)
    np.testing.assert_allclose(many.self_attention - ours.self_attention, more, rtol=0.04)
    assert many.total - ours.total == many.self_attention - ours.self_attention


def test_text_context_costs_what_xla_counts():
    def context(params, embeds):
        return bind(WanTransformer, TRANSFORMER, params).embed_text(embeds)

    counted = xla_flops(context, params_of(WanTransformer, TRANSFORMER), shape(BATCH, 40, 320))
    np.testing.assert_allclose(flops.text_context(TRANSFORMER, BATCH), counted, rtol=0.04)


def test_text_encoder_costs_what_xla_counts():
    config = TextEncoderConfig(vocab=64, dim=256, dim_attn=320, dim_ffn=512, num_heads=5, num_layers=1)
    tokens = shape(BATCH, 48, dtype=jnp.int32)
    encode = functools.partial(text_encoder.encode_tokens, config)
    counted = xla_flops(encode, params_of(text_encoder.UMT5Encoder, config), tokens, tokens)
    np.testing.assert_allclose(flops.text_encoder(config, BATCH, 48), counted, rtol=0.04)


@pytest.mark.parametrize("temporal", [(False, True, True), (True, False, True)])
def test_decoding_costs_what_xla_counts(temporal):
    config = VAEConfig(
        dim=48,
        z_dim=8,
        num_res_blocks=1,
        temporal_downsample=temporal,
        latent_mean=(0.0,) * 8,
        latent_std=(1.0,) * 8,
    )
    cache = jax.eval_shape(lambda: vae.decode_init(config, jnp.float32, BATCH, 16, 24))
    decode = functools.partial(vae.decode_next, config)
    counted = xla_flops(decode, params_of(vae.WanVAE, config), cache, shape(BATCH, 1, 16, 24, 8))
    np.testing.assert_allclose(flops.vae_decode(config, BATCH, 1, 16, 24), counted, rtol=0.06)


def test_published_sizes():
    """By hand, for 480x832: a layer is 12 n D^2 + 4 n D F + 4 n D (K + text)."""
    full = TransformerConfig()
    n, dim = 3 * 1560, 1536
    ours = flops.transformer_pass(full, 1, 3, 7, 1560)
    layers = 30 * n * (12 * dim**2 + 4 * dim * 8960 + 4 * dim * (7 * 1560 + 512))
    assert ours.total - ours.embeddings == layers
    assert flops.transformer_pass(full, 4, 3, 7, 1560).total == 4 * ours.total
    assert flops.vae_decode(VAEConfig(), 1, 3, 60, 104) == 3 * flops.vae_decode(VAEConfig(), 1, 1, 60, 104)
