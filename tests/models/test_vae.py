import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_weights import GOLDEN, golden_config, golden_params

from rfjax.config import VAEConfig
from rfjax.errors import UserError
from rfjax.models import vae
from rfjax.models.functional import abstract_params

_vae_config = golden_config().vae
assert _vae_config is not None
CONFIG: VAEConfig = _vae_config

encode = jax.jit(vae.encode, static_argnums=0)
decode = jax.jit(vae.decode, static_argnums=0)
posterior = jax.jit(vae.posterior, static_argnums=0)
reconstruct = jax.jit(vae.reconstruct, static_argnums=0)
decode_first = jax.jit(vae.decode_first, static_argnums=0)
decode_next = jax.jit(vae.decode_next, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return golden_params("wan_vae_tiny.pth", "vae", abstract_params(vae.WanVAE, CONFIG))


@pytest.fixture(scope="module")
def golden():
    """Golden values, channels last; videos clipped as `decode` clips them."""
    with np.load(GOLDEN / "vae.npz") as file:
        values = {name: jnp.asarray(np.moveaxis(file[name], 1, -1)) for name in file if file[name].ndim == 5}
    return values | {name: jnp.clip(values[name], -1, 1) for name in ("reconstruction", "decoded")}


def close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    scale = float(jnp.ptp(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def test_parameters_are_those_of_upstream():
    upstream = json.loads((GOLDEN / "upstream_keys" / "wan2.1_vae.json").read_text())
    leaves = jax.tree.leaves(abstract_params(vae.WanVAE, VAEConfig()))
    assert len(leaves) == len(upstream) == 194
    assert sum(leaf.size for leaf in leaves) == sum(math.prod(shape) for shape in upstream.values())


def test_golden_encoding(params, golden):
    close(encode(CONFIG, params, golden["video"]), golden["latents"])


def test_golden_reconstruction(params, golden):
    close(decode(CONFIG, params, golden["latents"]), golden["reconstruction"])


def test_golden_decoding(params, golden):
    close(decode(CONFIG, params, golden["z"]), golden["decoded"])


@pytest.mark.parametrize("partition", [(1, 1, 1, 1), (1, 3), (3, 1), (2, 2)])
def test_streaming_equals_decoding_at_once(params, golden, partition):
    latents = golden["z"]
    B, _, h, w, _ = latents.shape
    cache = vae.decode_init(CONFIG, jnp.float32, B, h, w)
    cache, frames = decode_first(CONFIG, params, cache, latents[:, :1])
    video, start = [frames], 1
    for count in partition:
        cache, frames = decode_next(CONFIG, params, cache, latents[:, start : start + count])
        assert frames.shape[1] == 4 * count
        video.append(frames)
        start += count
    close(jnp.concatenate(video, axis=1), decode(CONFIG, params, latents), 1e-6)


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 13])
def test_training_sees_what_encoding_and_decoding_in_groups_see(params, golden, frames):
    video = golden["video"][:, :frames]
    mean, log_variance = posterior(CONFIG, params, video)
    latents = encode(CONFIG, params, video)
    close((mean - jnp.array(CONFIG.latent_mean)) / jnp.array(CONFIG.latent_std), latents, 1e-5)
    assert log_variance.shape == mean.shape
    close(jnp.clip(reconstruct(CONFIG, params, mean), -1, 1), decode(CONFIG, params, latents), 1e-5)


@pytest.mark.parametrize("frames", [1, 5])
def test_encoding_of_the_prefix_is_the_prefix_of_the_encoding(params, golden, frames):
    prefix = encode(CONFIG, params, golden["video"][:, :frames])
    close(prefix, golden["latents"][:, : 1 + frames // 4])


def test_later_frames_depend_on_earlier_ones(params, golden):
    changed = encode(CONFIG, params, golden["video"].at[:, 0].multiply(-1))
    assert jnp.all(jnp.max(jnp.abs(changed - golden["latents"]), axis=(0, 2, 3, 4))[:2] > 1e-2)


def test_samples_do_not_mix(params, golden):
    video = golden["video"][:, :5]
    order = jnp.array([1, 0])
    pair = jnp.concatenate([video, video[:, ::-1]])
    latents, swapped = encode(CONFIG, params, pair), encode(CONFIG, params, pair[order])
    close(latents[:1], golden["latents"][:, :2])
    close(swapped[order], latents)
    decoded = decode(CONFIG, params, latents)
    close(decoded[:1], golden["reconstruction"][:, :5])
    close(decode(CONFIG, params, swapped)[order], decoded)


@pytest.mark.slow
def test_bfloat16_parameters_compute_in_bfloat16(params, golden):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    latents = encode(CONFIG, narrow, golden["video"][:, :5])
    video = decode(CONFIG, narrow, golden["latents"][:, :2])
    assert latents.dtype == video.dtype == jnp.bfloat16
    # rounding the weights alone moves the latents by 0.8% and the video by 1.2%
    for actual, expected in ((latents, golden["latents"][:, :2]), (video, golden["reconstruction"][:, :5])):
        assert jnp.mean(jnp.abs(actual - expected)) < 0.04 * jnp.std(expected)


def test_cache_has_the_type_it_was_asked_for():
    cache = vae.decode_init(CONFIG, jnp.bfloat16, 2, 4, 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(cache))


def test_norm_of_a_zero_position_is_zero():
    norm = vae.RMSNorm(8, rngs=nnx.Rngs(0))
    assert jnp.all(norm(jnp.zeros((1, 1, 1, 1, 8))) == 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 12, 32, 48, 3), "the video has 12 frames; the autoencoder needs 1 plus a multiple of 4"),
        ((1, 0, 32, 48, 3), "the video has 0 frames; the autoencoder needs 1 plus a multiple of 4"),
        ((1, 5, 32, 44, 3), "the video is 32x44 pixels; the autoencoder needs multiples of 8"),
    ],
)
def test_videos_that_do_not_fit_are_refused(params, shape, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        vae.encode(CONFIG, params, jnp.zeros(shape))
