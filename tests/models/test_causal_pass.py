"""The pass over a whole video that trains the causal network, against generation chunk by chunk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax.config import ModelConfig
from rfjax.memory import create
from rfjax.models.functional import bind, init_params
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.rollout import remember
from rfjax.sampling.state import attend, empty_state, memory_shape, read_memory

CHUNK, CHUNKS, SIZE = 3, 3, (4, 6)


@pytest.fixture(scope="module")
def setting(golden_config):
    config: ModelConfig = golden_config
    keys = jax.random.split(jax.random.key(3), 4)
    shape = (2, CHUNK * CHUNKS, *SIZE, config.transformer.in_dim)
    noisy, clean = (jax.random.normal(key, shape) for key in keys[:2])
    embeds = jax.random.normal(keys[2], (2, 5, config.transformer.text_dim))
    timestep = jnp.repeat(jnp.asarray([[1000.0, 833.0, 250.0], [12.0, 625.0, 999.0]]), CHUNK, axis=1)
    return config, init_params(WanTransformer, config.transformer, keys[3]), embeds, noisy, clean, timestep


@functools.partial(jax.jit, static_argnums=0)
def flow(config, params, embeds, noisy, clean, timestep):
    network = bind(WanTransformer, config.transformer, params)
    return network(noisy, timestep, network.embed_text(embeds), chunk_frames=CHUNK, clean=clean)[0]


def one_pass(setting, noisy, clean, timestep):
    config, params, embeds = setting[:3]
    return np.asarray(flow(config, params, embeds, noisy, clean, timestep))


@functools.partial(jax.jit, static_argnums=0)
def generation_step(config, policy, params, embeds, state, noisy, clean, timestep):
    network = bind(WanTransformer, config.transformer, params)
    text = network.embed_text(embeds)
    memory = attend(config, SIZE, read_memory(policy, state))
    return network(noisy, timestep, text, memory)[0], remember(config, SIZE, policy, params, text, state, clean)


def chunk_by_chunk(setting, noisy, clean, timestep):
    """Flows as generation computes them, each chunk beside the memory of the clean ones before it."""
    config, params, embeds = setting[:3]
    policy, shape = create("self_forcing"), memory_shape(config, 2, SIZE)
    state = empty_state(policy, shape, CHUNK * CHUNKS, jnp.float32, (*SIZE, config.transformer.in_dim))
    flows = []
    for begin in range(0, CHUNK * CHUNKS, CHUNK):
        chunk = [x[:, begin : begin + CHUNK] for x in (noisy, clean, timestep)]
        made, state = generation_step(config, policy, params, embeds, state, *chunk)
        flows.append(made)
    return np.concatenate(flows, axis=1)


def test_teacher_forcing_is_generation_from_the_clean_past(setting):
    noisy, clean, timestep = setting[3:]
    want = chunk_by_chunk(setting, noisy, clean, timestep)
    got = one_pass(setting, noisy, clean, timestep)
    assert np.abs(got - want).max() < 2e-6 * np.ptp(want)


def test_diffusion_forcing_of_a_clean_video_is_its_clean_pass(setting):
    clean, timestep = setting[4], jnp.zeros_like(setting[5])
    want = chunk_by_chunk(setting, clean, clean, timestep)
    got = one_pass(setting, clean, None, timestep)
    assert np.abs(got - want).max() < 2e-6 * np.ptp(want)


def changed_chunks(setting, changed: str, chunk: int, forcing: str) -> list[int]:
    """Chunks whose flow differs at all when one chunk of the noisy or the clean latents is another."""
    noisy, clean, timestep = setting[3:]
    arguments = {"noisy": noisy, "clean": clean if forcing == "teacher" else None}
    before = one_pass(setting, **arguments, timestep=timestep)
    arguments[changed] = arguments[changed].at[:, chunk * CHUNK : (chunk + 1) * CHUNK].multiply(0.5)
    after = one_pass(setting, **arguments, timestep=timestep)
    return [i for i in range(CHUNKS) if (before != after)[:, i * CHUNK : (i + 1) * CHUNK].any()]


def test_no_chunk_sees_a_later_one(setting):
    assert changed_chunks(setting, "noisy", 1, "diffusion") == [1, 2]
    assert changed_chunks(setting, "noisy", 1, "teacher") == [1]
    assert changed_chunks(setting, "clean", 1, "teacher") == [2]
    assert changed_chunks(setting, "clean", 2, "teacher") == []


@pytest.mark.slow
def test_rematerialised_layers_have_the_same_gradient_in_less_memory(setting):
    config, _, embeds, *data, timestep = setting
    deep = dataclasses.replace(config.transformer, num_layers=12)
    params = init_params(WanTransformer, deep, jax.random.key(0))

    def compiled(remat):
        def loss(params):
            network = bind(WanTransformer, deep, params)
            flow, _ = network(data[0], timestep, network.embed_text(embeds), remat=remat)
            return jnp.square(flow).mean()

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    kept, again = compiled(False), compiled(True)
    less, more = again.memory_analysis(), kept.memory_analysis()
    assert less is not None
    assert more is not None
    assert less.temp_size_in_bytes < 0.35 * more.temp_size_in_bytes
    (loss, gradient), (other, same) = kept(params), again(params)
    assert loss == pytest.approx(float(other), rel=1e-6)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), gradient, same)
