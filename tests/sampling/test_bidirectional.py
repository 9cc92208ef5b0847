import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax.data.trajectories import make_trajectories
from rfjax.errors import UserError
from rfjax.models.functional import bind, init_params
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.bidirectional import Weak, euler, noise_levels, sample_bidirectional
from rfjax.sampling.request import sample_keys
from rfjax.sampling.schedule import few_steps

MEAN, STD = 0.7, 0.3
FEW = (1.0, 0.9375, 0.8333333, 0.625)


def gaussian_flow(x, level):
    """The best flow, E[noise - x0 | x_t], of data that are normal with MEAN and STD."""
    scale = (1 - level) ** 2 * STD**2 + level**2
    return (level - (1 - level) * STD**2) / scale * (x - (1 - level) * MEAN) - MEAN


def gaussian_state(noise, level):
    """Where the flow takes noise: to the same quantile of x_t."""
    return (1 - level) * MEAN + np.sqrt((1 - level) ** 2 * STD**2 + level**2) * noise


def solver_errors(steps):
    noise = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 4)).astype(np.float32)
    states = np.asarray(euler(gaussian_flow, jnp.asarray(noise), noise_levels(FEW, 5.0, steps)))
    want = np.stack([gaussian_state(noise, level) for level in (*FEW, 0.0)])
    np.testing.assert_array_equal(states[0], noise)
    return np.abs(states - want).max(axis=(1, 2, 3, 4, 5))


def test_solver_converges_to_the_known_states():
    """Euler's error halves with twice the steps, at every kept timestep and at the clean end."""
    coarse, fine = solver_errors(48), solver_errors(96)
    np.testing.assert_allclose(coarse[1:] / fine[1:], 2.0, rtol=0.15)
    assert solver_errors(960).max() < 0.006


def test_levels_meet_the_knots_and_are_those_of_the_plain_schedule():
    rows = noise_levels(FEW, 5.0, 48)
    assert rows.shape == (4, 13)
    np.testing.assert_allclose(rows[:, 0], FEW, rtol=1e-6)
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
    plain = noise_levels((1.0,), 5.0, 48)
    np.testing.assert_allclose(np.append(rows[:, :-1], 0.0), plain[0], rtol=1e-6)
    assert plain[0, 0] == 1
    assert plain[0, -1] == 0


def test_steps_that_do_not_divide_are_named():
    with pytest.raises(UserError, match="the solver has 50 steps; a multiple of the 4 denoising steps"):
        noise_levels(FEW, 5.0, 50)


@pytest.fixture(scope="module")
def teacher(golden_config):
    network = golden_config.transformer
    keys = jax.random.split(jax.random.key(0), 4)
    embeds, negative = (
        jax.random.normal(key, (n, 5, network.text_dim)) for key, n in zip(keys[1:3], (2, 1), strict=True)
    )
    return golden_config, init_params(WanTransformer, network, keys[0]), embeds, negative, keys[3]


@pytest.mark.parametrize("layers", [1, 3])
def test_a_worse_network_is_led_away_from(teacher, layers):
    """In one step, from noise to noise minus the flow; it may have fewer layers."""
    config, params, embeds, negative, key = teacher
    assert config.transformer.num_layers == 3
    shallow = dataclasses.replace(config.transformer, num_layers=layers)
    worse = init_params(WanTransformer, shallow, jax.random.key(9))
    shape = (2, 1, 2, 4, config.transformer.in_dim)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(sample_keys(key, 2))

    def flow(config, params, text):
        network = bind(WanTransformer, config, params)
        return network(noise, jnp.full((2, 1), 1000.0), network.embed_text(text))[0]

    cond, weak = flow(config.transformer, params, embeds), flow(shallow, worse, embeds)
    uncond = flow(config.transformer, params, jnp.repeat(negative, 2, axis=0))
    made = sample_bidirectional(config, params, embeds, negative, shape, key, 1, 2.5, Weak(worse, 0.5))
    np.testing.assert_allclose(made, noise - (uncond + 2.5 * (cond - uncond) + 0.5 * (cond - weak)), atol=2e-5)


@pytest.mark.slow
def test_a_trajectory_follows_the_guided_flow_from_each_samples_noise(teacher):
    config, params, embeds, negative, key = teacher
    shape = (3, 2, 4, config.transformer.in_dim)
    make = make_trajectories(config, params, shape, steps=4, guidance=2.5)
    trajectory = make(embeds, negative, key)
    assert trajectory.shape == (2, 5, *shape)

    @jax.jit
    def flow(text, x, sigma):
        network = bind(WanTransformer, config.transformer, params)
        return network(x, jnp.full((2, 3), 1000 * sigma), network.embed_text(text))[0]

    sigmas = [*(few_steps(config) / 1000), 0.0]
    x = trajectory[:, 0]
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        cond, uncond = (flow(text, x, sigma) for text in (embeds, jnp.repeat(negative, 2, axis=0)))
        x = x + (following - sigma) * (uncond + 2.5 * (cond - uncond))
        np.testing.assert_allclose(trajectory[:, i + 1], x, atol=2e-5)
    np.testing.assert_array_equal(trajectory, make(embeds, negative, key))
    alone = make(embeds[1:], negative, jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray([1])))
    np.testing.assert_allclose(alone[0], trajectory[1], atol=1e-5)
    sample = sample_bidirectional(config, params, embeds, negative, (2, *shape), key, steps=4, guidance=2.5)
    np.testing.assert_allclose(sample, trajectory[:, -1], atol=1e-5)
