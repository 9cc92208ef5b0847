"""The rollout's gradient against a transcription of the rule with `jax.grad`, and against finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations

from rfjax import memory
from rfjax.config import ModelConfig, TransformerConfig
from rfjax.memory import CleanChunk
from rfjax.models.functional import bind, init_params
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.passes import ChunkPasses
from rfjax.sampling.request import ChunkNoise
from rfjax.sampling.schedule import add_noise, few_steps, sigma_at
from rfjax.sampling.state import attend, memory_shape
from rfjax.training.rollout_gradient import RolloutPlan, rollout_for_training

NETWORK = TransformerConfig(
    text_len=4, in_dim=2, dim=16, ffn_dim=24, freq_dim=8, text_dim=6, out_dim=2, num_heads=2, num_layers=2
)
CONFIG = ModelConfig(transformer=NETWORK, chunk_frames=2, denoising_steps=(1000, 600, 300))
SIZE, BATCH = (4, 4), 2
PLAN = RolloutPlan(CONFIG, SIZE, chunks=6, gradient_chunks=6)

CASES = {
    "dense": ("self_forcing", {}, 6, 2),
    "window": ("self_forcing", {"window_frames": 4}, 2, 1),
    "relax": ("relax_forcing", {"history_candidates": 2, "reservoir_frames": 8}, 4, 0),
    "sink": ("attention_sink", {"sink_frames": 1, "tail_frames": 3}, 6, 1),
    "slow_fast": ("context_forcing", {"sink_frames": 1, "slow_frames": 2, "fast_frames": 3, "threshold": 0.999}, 4, 2),
}
"""Policy, settings, chunks that are differentiated, exit step."""


@pytest.fixture(scope="module")
def params():
    """Weights whose flow depends on memory, text and time; drawn alone, they leave the biases zero."""
    drawn = init_params(WanTransformer, NETWORK, jax.random.key(0))
    leaves, tree = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def draws(chunks=6):
    shape = (BATCH, 2, *SIZE, 2)
    keys = jax.random.split(jax.random.key(2), 3)
    noise = ChunkNoise(
        None, jax.random.normal(keys[0], (chunks, *shape)), jax.random.normal(keys[1], (chunks, 2, *shape))
    )
    return noise, jax.random.normal(keys[2], (BATCH, 4, 6))


def ours(plan, policy, params, embeds, noise, exit_step):
    text = bind(WanTransformer, NETWORK, params).embed_text(embeds)
    return rollout_for_training(plan, policy, params, text, noise, exit_step)


@jax.jit
def one_pass(params, embeds, x, timestep, memory):
    network = bind(WanTransformer, NETWORK, params)
    timestep = jnp.full(x.shape[:2], timestep)
    return network(x, timestep, network.embed_text(embeds), memory, return_projections=True)


@jax.jit
def attended(policy, state, start):
    return attend(CONFIG, SIZE, policy.read(state, start))


@jax.jit
def committed(policy, state, start, made):
    frames = start[:, None] + jnp.arange(2)
    return policy.commit(state, CleanChunk(frames, made.queries, made.keys, made.values))


def transcribed(plan, policy, params, embeds, noise, exit_step, kept=None):
    """A Python loop over chunks and steps; `kept` collects the noisy input and the memory of each exit pass."""
    stop = jax.lax.stop_gradient
    steps = jnp.asarray(few_steps(CONFIG))
    sigmas = sigma_at(steps, CONFIG.timestep_shift)
    state = policy.init(memory_shape(CONFIG, BATCH, SIZE), 2 * plan.chunks, jnp.float32)
    outputs = []
    for chunk in range(plan.chunks):
        start = jnp.full(BATCH, 2 * chunk, jnp.int32)
        memory = stop(attended(policy, state, start))
        x = noise.initial[chunk]
        for step in range(exit_step):
            x0 = x - sigmas[step] * one_pass(stop(params), embeds, x, steps[step], memory)[0]
            x = stop(add_noise(x0, noise.renoise[chunk, step], sigmas[step + 1]))
        if kept is not None:
            kept.append((x, memory))
        x0 = x - sigmas[exit_step] * one_pass(params, embeds, x, steps[exit_step], memory)[0]
        outputs.append(x0 if chunk >= plan.constant_chunks else stop(x0))
        _, made = one_pass(stop(params), embeds, stop(x0), 0.0, memory)
        state = committed(policy, state, start, stop(made))
    return jnp.concatenate(outputs, axis=1)


def case(name):
    policy, settings, gradient_chunks, exit_step = CASES[name]
    return memory.create(policy, **settings), dataclasses.replace(PLAN, gradient_chunks=gradient_chunks), exit_step


def weighed(weights):
    return lambda latents: jnp.sum(jnp.sin(latents) * weights)


WEIGHTS = jax.random.normal(jax.random.key(9), (BATCH, 12, *SIZE, 2))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(plan, policy, params, embeds, noise, exit_step):
    def loss(params, embeds):
        return weighed(WEIGHTS)(ours(plan, policy, params, embeds, noise, exit_step))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, embeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_is_the_transcription(params, name):
    policy, plan, exit_step = case(name)
    noise, embeds = draws()

    def slow(params, embeds):
        return weighed(WEIGHTS)(transcribed(plan, policy, params, embeds, noise, exit_step))

    value, gradients = loss_and_gradient(plan, policy, params, embeds, noise, jnp.asarray(exit_step))
    slow_value, slow_gradients = jax.value_and_grad(slow, argnums=(0, 1))(params, embeds)
    assert float(value) == pytest.approx(float(slow_value), rel=1e-4)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(slow_gradients), strict=True
    ):
        scale = float(jnp.abs(other).max())
        assert scale > 0, path
        np.testing.assert_allclose(one, other, atol=1e-4 * scale, err_msg=str(path))


@pytest.mark.slow
def test_finite_differences(params):
    """Along the gradient of each parameter alone, noisy inputs and memory held constant; and not so if they follow."""
    policy, plan, exit_step = case("window")
    noise, embeds = draws()
    kept = []
    transcribed(plan, policy, params, embeds, noise, exit_step, kept)
    timestep = jnp.asarray(few_steps(CONFIG))[exit_step]
    sigma = sigma_at(timestep, CONFIG.timestep_shift)
    weights = jnp.split(WEIGHTS, 6, axis=1)

    @jax.jit
    def held(params):
        learned = list(zip(kept, weights, strict=True))[plan.constant_chunks :]
        return sum(weighed(w)(x - sigma * one_pass(params, embeds, x, timestep, m)[0]) for (x, m), w in learned)

    @jax.jit
    def free(params):
        latents = ours(plan, policy, params, embeds, noise, exit_step)
        return weighed(WEIGHTS[:, 2 * plan.constant_chunks :])(latents[:, 2 * plan.constant_chunks :])

    _, (gradient, _) = loss_and_gradient(plan, policy, params, embeds, noise, jnp.asarray(exit_step))
    leaves, tree = jax.tree.flatten(gradient)

    def slope(function, direction, width):
        def at(side):
            return float(function(jax.tree.map(lambda p, d: p + side * width * d, params, direction)))

        return (at(1) - at(-1)) / (2 * width)

    def extrapolated(function, direction):
        """The error of second order in the width removed, which leaves room for a width far above rounding."""
        return (4 * slope(function, direction, 0.01) - slope(function, direction, 0.02)) / 3

    size = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in leaves))
    for i, leaf in enumerate(leaves):
        norm = float(jnp.linalg.norm(leaf))
        alone = [jnp.zeros_like(other) for other in leaves]
        alone[i] = leaf / norm
        assert extrapolated(held, jax.tree.unflatten(tree, alone)) == pytest.approx(norm, rel=5e-3, abs=2e-4 * size)
    together = jax.tree.unflatten(tree, [leaf / size for leaf in leaves])
    assert extrapolated(held, together) == pytest.approx(size, rel=1e-3)
    assert abs(extrapolated(free, together) - size) > 0.02 * size


@pytest.mark.slow
@pytest.mark.parametrize("gradient_chunks", [1, 3])
def test_memory_does_not_grow_with_the_chunks(params, gradient_chunks):
    """Eight more chunks keep their latents (outputs, noisy inputs, cotangents and what copies them), nothing else."""
    policy = memory.create("self_forcing", window_frames=4)
    embeds = draws()[1]
    noise = ChunkNoise(jax.random.split(jax.random.key(0), BATCH), None, None)

    def temporaries(chunks):
        plan = RolloutPlan(CONFIG, SIZE, chunks, chunks if gradient_chunks == 3 else 1)

        def loss(params, embeds):
            return jnp.sum(ours(plan, policy, params, embeds, noise, jnp.asarray(1)) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, embeds).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = temporaries(4), temporaries(12)
    chunk = 4 * BATCH * 2 * SIZE[0] * SIZE[1] * 2
    assert many - few <= 8 * chunk * 6
    assert many < 1.1 * few


def test_later_steps_are_not_computed_and_one_program_serves_all_exits(params, monkeypatch):
    policy, plan = memory.create("self_forcing"), dataclasses.replace(PLAN, chunks=2, gradient_chunks=1)
    noise, embeds = draws(2)
    calls = []
    original = ChunkPasses.predict

    def counted(self, noisy, step, remat=False):
        jax.debug.callback(lambda step: calls.append(int(step)), step)
        return original(self, noisy, step, remat)

    monkeypatch.setattr(ChunkPasses, "predict", counted)
    program = jax.jit(lambda exit_step: ours(plan, policy, params, embeds, noise, exit_step))
    results = []
    for exit_step in range(3):
        calls.clear()
        results.append(program(jnp.asarray(exit_step)))
        jax.effects_barrier()
        assert sorted(calls) == sorted(2 * list(range(exit_step + 1)))
    assert compilations(program) == 1
    assert np.abs(results[0] - results[1]).max() > 1e-2
    assert np.abs(results[1] - results[2]).max() > 1e-2


@pytest.mark.slow
def test_remat_gives_the_same(params):
    policy, plan = memory.create("self_forcing", window_frames=4), dataclasses.replace(PLAN, gradient_chunks=2)
    noise, embeds = draws()
    kept, again = (
        loss_and_gradient(dataclasses.replace(plan, remat=remat), policy, params, embeds, noise, jnp.asarray(1))
        for remat in (False, True)
    )
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_gradients_have_the_type_of_their_parameters(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    noise, embeds = draws()
    policy = memory.create("relax_forcing")
    gradients = jax.eval_shape(lambda p: loss_and_gradient(PLAN, policy, p, embeds, noise, jnp.asarray(1))[1][0], half)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
