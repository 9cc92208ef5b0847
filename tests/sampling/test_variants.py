"""Variants made at once are the variants made one by one."""

import jax
import numpy as np
import pytest
from conftest import compilations, golden

import rfjax
from rfjax.errors import UserError
from rfjax.memory import create
from rfjax.sampling import rollout, variants
from rfjax.sampling.variants import side_by_side, stream_variants

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
            same(jax.tree.map(lambda array, n=number: array[n], made), expected)
    assert np.abs(together[-1].latents[0] - together[-1].latents[-1]).max() > 1e-3

    flat = side_by_side(together[-1])
    assert flat.trace.frames.shape[0] == 6
    np.testing.assert_array_equal(flat.latents[5], together[-1].latents[2, 1])

    next(stream_variants(tiny_model, policies[::-1], embeds(), SHAPE, key))
    assert compilations(variants.step_variants) == compilations(rollout.step) == 1


@pytest.mark.slow
def test_a_bfloat16_memory_stays_one(tiny_checkpoint):
    model = rfjax.load(tiny_checkpoint, "bfloat16")
    policies, key = policies_of("memrope"), jax.random.key(1)
    *_, last = stream_variants(model, policies, embeds(), SHAPE, key)
    *_, alone = rfjax.stream(model, policies[1], embeds(), SHAPE, key=key)
    assert np.abs(last.latents[1] - alone.latents).max() < 0.02 * np.ptp(alone.latents)


@pytest.mark.slow
def test_policies_without_numbers_and_single_ones_are_taken(tiny_model):
    policy = create("attention_sink", sink_frames=1, tail_frames=2)
    *_, both = stream_variants(tiny_model, [policy, policy], embeds(), SHAPE, jax.random.key(0))
    *_, one = stream_variants(tiny_model, [policy], embeds(), SHAPE, jax.random.key(0))
    assert one.latents.shape == (1, 2, 3, 4, 6, 4)
    np.testing.assert_allclose(both.latents[1], one.latents[0], atol=2e-5)


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
