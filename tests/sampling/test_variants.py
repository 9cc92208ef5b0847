"""Variants made at once are the variants made one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations, golden

import rfjax
from rfjax.errors import UserError
from rfjax.memory import MemoryShape, create, footprint
from rfjax.sampling import rollout
from rfjax.sampling.variants import stack_policies, stream_variants

SHAPE = (2, 15, 4, 6, 4)
GRIDS = {
    "relax_forcing": ("redundancy_weight", [-9.0, 0.0, 9.0], {"reservoir_frames": 12}),
    "memrope": ("short_rate", [0.0, 0.1, 1.0], {"sink_frames": 1, "tail_frames": 3}),
    "context_forcing": ("threshold", [-1.0, 0.95, 1.0], {"sink_frames": 1, "slow_frames": 4, "fast_frames": 4}),
}


def policies_of(name: str) -> list:
    setting, values, fixed = GRIDS[name]
    return [create(name, **fixed, **{setting: value}) for value in values]


def embeds() -> np.ndarray:
    return golden("rollout_dense")["context"]


def half_bytes(memory) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(memory) if leaf.dtype == jnp.bfloat16)


def same(one, other) -> None:
    np.testing.assert_allclose(one.latents, other.latents, atol=2e-5)
    for name in ("frames", "positions", "roles", "selected_frames", "candidates"):
        np.testing.assert_array_equal(getattr(one.trace, name), getattr(other.trace, name))
    np.testing.assert_allclose(one.trace.scores, other.trace.scores, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["relax_forcing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("memrope", "context_forcing"))]
)
def test_each_variant_is_what_it_is_alone_and_all_share_a_program(tiny_model, name):
    jax.clear_caches()
    policies, key = policies_of(name), jax.random.key(3)
    together = list(stream_variants(tiny_model, policies, embeds(), SHAPE, key))
    alone = [list(rfjax.stream(tiny_model, policy, embeds(), SHAPE, key=key)) for policy in policies]
    assert len(together) == 5
    for number, chunks in enumerate(alone):
        for made, expected in zip(together, chunks, strict=True):
            same(jax.tree.map(lambda array, n=number: array[2 * n : 2 * n + 2], made), expected)
    assert np.abs(together[-1].latents[0] - together[-1].latents[-2]).max() > 1e-3

    next(stream_variants(tiny_model, policies[::-1], embeds(), SHAPE, key))
    assert compilations(rollout.step) == 2  # one for all together, one for all that are alone


def test_fifty_weights_share_a_compilation(tiny_model):
    weights, key = np.linspace(0, 4, 50), jax.random.key(0)
    first, *others = [create("relax_forcing", redundancy_weight=float(weight)) for weight in weights]
    next(rfjax.stream(tiny_model, first, embeds(), SHAPE, key=key))
    before = compilations(rollout.step)
    for policy in others:
        next(rfjax.stream(tiny_model, policy, embeds(), SHAPE, key=key))
    assert compilations(rollout.step) == before


@pytest.mark.slow
def test_a_bfloat16_memory_stays_one_and_is_updated_in_place(tiny_checkpoint):
    model = rfjax.load(tiny_checkpoint, "bfloat16")
    policies, key = policies_of("memrope"), jax.random.key(1)
    *_, last = stream_variants(model, policies, embeds(), SHAPE, key)
    *_, alone = rfjax.stream(model, policies[1], embeds(), SHAPE, key=key)
    assert np.abs(last.latents[2:4] - alone.latents).max() < 0.02 * np.ptp(alone.latents)

    six = np.concatenate([embeds()] * 3)
    sizes, alone_sizes = (rollout.Sizes((batch, *SHAPE[1:]), 0, 3, 0) for batch in (6, 2))
    text, state = rollout.begin(model, stack_policies(policies), six, sizes)
    noise = rollout.ChunkNoise(jax.random.split(key, 6), None, None)
    arguments = (model.config, (4, 6), stack_policies(policies), model.transformer, text, state, noise)
    used = rollout.step.lower(*arguments).compile().memory_analysis()
    store, own = (
        half_bytes(state.memory),
        half_bytes(rollout.begin(model, policies[0], embeds(), alone_sizes)[1].memory),
    )
    assert store == 3 * own
    assert used is not None
    assert used.alias_size_in_bytes >= store


@pytest.mark.slow
def test_a_prompt_may_change_for_all(tiny_model):
    policies, key = policies_of("relax_forcing"), jax.random.split(jax.random.key(4), 2)
    one, two = embeds()[:1], embeds()[1:]
    stacked = stack_policies(policies[:2])
    switch = rfjax.Switch(9, np.concatenate([two] * 2))
    both = rfjax.rollout(tiny_model, stacked, np.concatenate([one] * 2), SHAPE, key=key, switches=[switch])
    for number in range(2):
        request = {"key": key[number : number + 1], "switches": [rfjax.Switch(9, two)]}
        alone = rfjax.rollout(tiny_model, policies[number], one, (1, *SHAPE[1:]), **request)
        np.testing.assert_allclose(both.latents[number], alone.latents[0], atol=2e-5)


def test_the_stack_follows_the_contract_of_policies():
    shape = MemoryShape(layers=2, batch=6, heads=2, head_dim=4, rows=1, columns=2, chunk_frames=3)
    for name in (*GRIDS, "deep_forcing"):
        policies = policies_of(name) if name in GRIDS else [create(name)] * 3
        one, all_ = (footprint(p, shape, 30, jnp.bfloat16) for p in (policies[0], stack_policies(policies)))
        assert all_.attended_frames == one.attended_frames
        assert all_.state_bytes == one.state_bytes
        assert all_.view_bytes == one.view_bytes
    (alone,) = policies_of("memrope")[:1]
    assert stack_policies([alone]) is alone


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([], "policies is empty"),
        (
            [create("relax_forcing"), create("relax_forcing", history_frames=2)],
            "may differ in settings that are floats",
        ),
        ([create("relax_forcing"), create("attention_sink")], "may differ in settings that are floats"),
    ],
)
def test_says_what_does_not_fit(tiny_model, policies, message):
    with pytest.raises(UserError, match=message):
        stream_variants(tiny_model, policies, embeds(), SHAPE, jax.random.key(0))
