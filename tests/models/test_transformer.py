import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from golden_weights import golden_params

from rfjax.models.functional import abstract_params, bind, init_params
from rfjax.models.transformer import WanTransformer, patchify, rotate_memory, timestep_features, unpatchify


@pytest.fixture(scope="module")
def bidirectional(golden_config):
    config = golden_config.transformer
    expected = abstract_params(WanTransformer, config)
    return config, golden_params("wan_bidirectional_tiny.pth", "transformer", expected)


def flow(config, params, data):
    @jax.jit
    def run(params, x, timestep, context):
        network = bind(WanTransformer, config, params)
        return network(x, timestep, network.embed_text(context))[0]

    timestep = np.broadcast_to(data["timestep"][:, None], data["x"].shape[:2])
    return np.asarray(run(params, data["x"], timestep, data["context"]))


def test_bidirectional_matches_pytorch(bidirectional):
    data = golden("bidirectional")
    config, params = bidirectional
    error = np.abs(flow(config, params, data) - data["flow"]).max()
    assert error < 1e-5 * np.ptp(data["flow"])


def test_bfloat16_differs_by_what_bfloat16_explains(bidirectional):
    """Measured: 0.41% of the range at worst, 0.08% on average; rounding the weights alone explains 0.24% and 0.04%."""
    config, params = bidirectional
    data = golden("bidirectional")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    error = np.abs(flow(config, half, data) - data["flow"]) / np.ptp(data["flow"])
    assert 1e-4 < error.max() < 0.01
    assert error.mean() < 0.002


def test_prompts_shorter_than_the_text_length_are_padded(bidirectional):
    config, params = bidirectional
    data = golden("bidirectional")
    short = {**data, "context": data["context"][:, :5]}
    padded = {**data, "context": data["context"] * (np.arange(12) < 5)[:, None]}
    np.testing.assert_allclose(flow(config, params, short), flow(config, params, padded), atol=1e-6)


def test_layers_are_one_loop(bidirectional):
    """Compiled size must not grow with depth: the lowered program of 3 layers is that of 30."""
    config, _ = bidirectional

    def size(layers):
        deep = dataclasses.replace(config, num_layers=layers)
        params = abstract_params(WanTransformer, deep)
        x, t = jax.ShapeDtypeStruct((1, 3, 6, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.float32)
        context = jax.ShapeDtypeStruct((1, 12, 24), jnp.float32)

        def run(params, x, t, context):
            network = bind(WanTransformer, deep, params)
            return network(x, t, network.embed_text(context))[0]

        return jax.jit(run).lower(params, x, t, context).as_text().count("dot_general")

    assert size(3) == size(30)


def test_patchify_round_trip_keeps_upstream_order():
    x = np.arange(2 * 3 * 4 * 6 * 5, dtype=np.float32).reshape(2, 3, 4, 6, 5)
    tokens = np.asarray(patchify(jnp.asarray(x), (1, 2, 2)))
    np.testing.assert_array_equal(tokens[1, 2, 4], x[1, 2, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(jnp.asarray(tokens), 2, 3, (1, 2, 2)), x)


def test_timestep_features_against_float64():
    t = np.asarray([[0.0, 625.0, 833.3333, 1000.0]], np.float32)
    angles = t.astype(np.float64)[..., None] * 10_000.0 ** (-np.arange(128) / 128)
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(timestep_features(jnp.asarray(t), 256), want, atol=1e-4)


def test_rotated_memory_depends_on_differences_of_positions_alone(golden_config):
    config = golden_config.transformer
    keys = jax.random.normal(jax.random.key(0), (1, 1, 2, 12, 64))
    near, far = (
        rotate_memory(keys, jnp.asarray([a, a + 3])[None, None, :, None], None, 3, 4, config) for a in (-4, 10**7)
    )
    products = [
        jnp.einsum("lbthd,lbshd->lbhts", *jnp.split(k.reshape(1, 1, 24, 2, 32), 2, axis=2)) for k in (near, far)
    ]
    np.testing.assert_allclose(products[0], products[1], atol=1e-4)


def test_initial_parameters_have_the_abstract_tree(golden_config):
    config = golden_config.transformer
    drawn, expected = init_params(WanTransformer, config, jax.random.key(0)), abstract_params(WanTransformer, config)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, expected)
    layers = drawn["blocks"]["self_attn"]["q"]["kernel"]
    assert not np.allclose(layers[0], layers[1]), "layers were initialised alike"
