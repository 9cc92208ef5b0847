import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations, golden, golden_json

import rfjax
from rfjax import memory
from rfjax.errors import UserError
from rfjax.sampling import rollout as module

CASES = {
    "rollout_dense": ("self_forcing", {}),
    "rollout_window": ("self_forcing", {"window_frames": 6}),
    "rollout_sink_window": ("self_forcing", {"window_frames": 9, "sink_frames": 3}),
    "rollout_extend": ("self_forcing", {}),
    "rollout_attention_sink": ("attention_sink", {"sink_frames": 2, "tail_frames": 4}),
    "rollout_relax": ("relax_forcing", {}),
    "rollout_relax_evicting": ("relax_forcing", {"reservoir_frames": 18}),
    "rollout_relax_true_positions": ("relax_forcing", {"positions": "true"}),
}


def arguments(name) -> tuple[tuple, dict[str, Any]]:
    policy, settings = CASES[name]
    data = golden(name)
    given = {"initial_latents": data["initial_latents"]} if "initial_latents" in data else {}
    return (memory.create(policy, **settings), data["context"], data["noise"]), {"renoise": data["renoise"], **given}


@pytest.mark.parametrize("name", CASES)
def test_matches_pytorch(tiny_model, name):
    positional, named = arguments(name)
    result = rfjax.rollout(tiny_model, *positional, **named)
    want = golden(name)["latents"]
    assert np.abs(result.latents - want).max() < 1e-5 * np.ptp(want)
    assert result.finite.all()


@pytest.mark.parametrize("name", ["rollout_relax", "rollout_relax_evicting", "rollout_relax_true_positions"])
def test_selects_what_pytorch_selects(tiny_model, name):
    positional, named = arguments(name)
    trace = rfjax.rollout(tiny_model, *positional, **named).trace
    want = golden_json(name)
    selected = dict(want["chunk_start_to_selected"])
    for chunk, frames in enumerate(np.asarray(trace.selected_frames)[:, 0, 0]):
        assert [f for f in frames if f >= 0] == selected.get(3 * chunk, [])
    scored = [chunk for chunk in range(trace.scores.shape[0]) if 3 * chunk in selected]
    for chunk, expected in zip(scored, want["candidates_and_scores"], strict=True):
        scores = np.asarray(trace.scores)[chunk, 0, 0]
        np.testing.assert_allclose(scores[~np.isnan(scores)], expected["scores"][0], atol=1e-4)


@pytest.mark.parametrize("name", ["rollout_relax_evicting", "rollout_extend"])
def test_streaming_gives_the_same_numbers(tiny_model, name):
    positional, named = arguments(name)
    whole = rfjax.rollout(tiny_model, *positional, **named)
    chunks = list(rfjax.stream(tiny_model, *positional, **named))
    latents = np.concatenate([chunk.latents for chunk in chunks], axis=1)
    np.testing.assert_array_equal(latents, whole.latents[:, -latents.shape[1] :])
    for index, chunk in enumerate(chunks):
        same = jax.tree.map(
            lambda one, all_, i=index: np.array_equal(one, all_[i], equal_nan=True), chunk.trace, whole.trace
        )
        assert all(jax.tree.leaves(same))


def context(batch=1):
    data = golden("rollout_dense")["context"]
    return np.concatenate([data] * batch)[:batch]


def test_one_compilation_serves_videos_of_any_length(tiny_model):
    policy = memory.create("relax_forcing")
    jax.clear_caches()
    for frames in (3, 12, 30):
        for _ in rfjax.stream(tiny_model, policy, context(), (1, frames, 6, 8, 4), key=jax.random.key(0)):
            pass
    for weight in (0.5, 1.0):  # numbers are traced too
        policy = memory.create("relax_forcing", redundancy_weight=weight)
        list(rfjax.stream(tiny_model, policy, context(), (1, 6, 6, 8, 4), key=jax.random.key(1)))
    assert compilations(module.step) == 1


def test_a_whole_rollout_is_one_program_with_one_chunk_step(tiny_model, monkeypatch):
    traced = []
    original = module.chunk_step

    def counted(*args):
        traced.append(1)
        return original(*args)

    monkeypatch.setattr(module, "chunk_step", counted)
    jax.clear_caches()
    for seed in range(2):
        rfjax.rollout(tiny_model, memory.create("relax_forcing"), context(), (1, 27, 6, 8, 4), key=jax.random.key(seed))
    assert len(traced) == 1
    assert compilations(module._whole) == 1


def test_a_sample_does_not_depend_on_its_batch(tiny_model):
    policy = memory.create("relax_forcing")
    both = golden("rollout_dense")["context"]
    keys = jax.random.split(jax.random.key(3), 2)
    together = rfjax.rollout(tiny_model, policy, both, (2, 18, 6, 8, 4), key=keys)
    for i in range(2):
        alone = rfjax.rollout(tiny_model, policy, both[i : i + 1], (1, 18, 6, 8, 4), key=keys[i : i + 1])
        np.testing.assert_allclose(alone.latents[0], together.latents[i], atol=1e-5)
    first = rfjax.rollout(tiny_model, policy, both[:1], (1, 18, 6, 8, 4), key=jax.random.key(3))
    pair = rfjax.rollout(tiny_model, policy, both, (2, 18, 6, 8, 4), key=jax.random.key(3))
    np.testing.assert_allclose(first.latents[0], pair.latents[0], atol=1e-5)
    assert np.abs(pair.latents[0] - pair.latents[1]).max() > 0.1


@pytest.mark.slow
def test_a_longer_video_begins_with_the_shorter(tiny_model):
    policy = memory.create("relax_forcing")
    key = jax.random.key(5)
    short, long = (rfjax.rollout(tiny_model, policy, context(), (1, f, 6, 8, 4), key=key) for f in (12, 21))
    np.testing.assert_allclose(short.latents, long.latents[:, :12], atol=1e-5)


def test_continuing_a_video_gives_the_video(tiny_model):
    """Given frames enter the memory as if they had been generated, and noise follows the place in the video."""
    policy = memory.create("relax_forcing")
    key = jax.random.key(7)
    whole = rfjax.rollout(tiny_model, policy, context(), (1, 18, 6, 8, 4), key=key).latents
    rest = rfjax.rollout(tiny_model, policy, context(), (1, 6, 6, 8, 4), key=key, initial_latents=whole[:, :12])
    np.testing.assert_allclose(rest.latents, whole, atol=1e-5)


def test_attention_far_beyond_1024_frames_is_that_of_the_beginning(tiny_model):
    """The same memory with all indices moved gives the same chunk: there is no last frame."""
    policy = memory.create("self_forcing", window_frames=9)
    text, state = module.begin(tiny_model, policy, context(), module.Sizes((1, 30, 6, 8, 4), 0, 3, 0))
    step = jax.jit(module.chunk_step, static_argnums=(0, 1))
    noise = np.asarray(golden("rollout_dense")["noise"][:1, :3])
    given = module.ChunkNoise(None, jnp.asarray(noise), jnp.asarray(golden("rollout_dense")["renoise"][0, :, :1]))
    shared = (tiny_model.config, (6, 8), policy, tiny_model.transformer, text)
    for _ in range(3):
        state, _ = step(*shared, state, given)
    moved = dataclasses.replace(
        state,
        start=state.start + 30_000,
        memory=dataclasses.replace(state.memory, frames=state.memory.frames + 30_000),
    )
    np.testing.assert_allclose(
        step(*shared, state, given)[1].latents, step(*shared, moved, given)[1].latents, atol=1e-5
    )


def test_the_step_updates_its_memory_in_place(tiny_model):
    policy = memory.create("relax_forcing")
    text, state = module.begin(tiny_model, policy, context(), module.Sizes((1, 30, 6, 8, 4), 0, 3, 0))
    keys = module.ChunkNoise(jax.random.split(jax.random.key(0), 1), None, None)
    compiled = module.step.lower(tiny_model.config, (6, 8), policy, tiny_model.transformer, text, state, keys).compile()
    store = state.memory.keys.nbytes + state.memory.values.nbytes
    memory_use = compiled.memory_analysis()
    assert memory_use is not None
    assert memory_use.alias_size_in_bytes >= store


@pytest.mark.slow
def test_bfloat16_rollout_follows_float32(tiny_checkpoint, tiny_model):
    """Measured: 0.33% of the range at worst, 0.06% on average, and no more after 10 chunks than after one."""
    half = rfjax.load(tiny_checkpoint, "bfloat16")
    positional, named = arguments("rollout_relax")
    exact, rounded = (rfjax.rollout(m, *positional, **named).latents for m in (tiny_model, half))
    error = np.abs(exact - rounded) / np.ptp(exact)
    assert 1e-4 < error.max() < 0.01
    assert error[:, -3:].mean() < 2 * error[:, :3].mean()


def test_not_a_number_is_reported(tiny_model):
    noise = golden("rollout_dense")["noise"].copy()
    noise[1, 4, 0, 0, 0] = np.nan
    data = golden("rollout_dense")
    result = rfjax.rollout(tiny_model, memory.create("self_forcing"), data["context"], noise, renoise=data["renoise"])
    np.testing.assert_array_equal(result.finite[:, 0], True)
    np.testing.assert_array_equal(result.finite[:, 1], [True, False, False, False])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": (1, 4, 6, 8, 4)}, "noise has 4 latent frames; a multiple of the chunk's 3"),
        ({"noise": (1, 0, 6, 8, 4)}, "noise has 0 latent frames"),
        ({"noise": (1, 3, 6, 8, 16)}, r"\[B, F, H, W, 4\] is needed"),
        ({"noise": (1, 3, 7, 8, 4)}, "latent height is 7; a multiple of the patch's 2"),
        ({"noise": (2, 3, 6, 8, 4)}, "prompt_embeds has 1 samples and noise 2"),
        (
            {"prompt_embeds": np.zeros((1, 12, 32), np.float32)},
            "12 tokens of width 32; the transformer takes at most 12",
        ),
        ({"prompt_embeds": np.zeros((1, 13, 24), np.float32)}, "13 tokens of width 24"),
        ({"key": None}, "noise is to be drawn, but no key was given"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"key has shape \(3,\); one key, or one for each of the 1"),
        ({"renoise": np.zeros((1, 2, 1, 3, 6, 8, 4), np.float32)}, "renoise has shape"),
        ({"initial_latents": np.zeros((1, 4, 6, 8, 4), np.float32)}, "initial_latents has 4 latent frames"),
        ({"initial_latents": np.zeros((1, 3, 6, 6, 4), np.float32)}, "initial_latents have shape"),
    ],
)
def test_says_what_does_not_fit(tiny_model, changes, message):
    request = {"prompt_embeds": context(), "noise": (1, 3, 6, 8, 4), "key": jax.random.key(0), **changes}
    positional = (request.pop("prompt_embeds"), request.pop("noise"))
    for function in (rfjax.rollout, rfjax.stream):
        with pytest.raises(UserError, match=message):
            function(tiny_model, memory.create("relax_forcing"), *positional, **request)


def test_noise_of_another_type_is_taken(tiny_model):
    (policy, embeds, noise), named = arguments("rollout_relax")
    half = np.asarray(noise, jnp.bfloat16)
    result = rfjax.rollout(tiny_model, policy, embeds, half, **named)
    assert result.latents.dtype == jnp.float32
    assert np.abs(result.latents - golden("rollout_relax")["latents"]).max() > 0


@pytest.mark.slow
def test_legacy_keys_are_taken(tiny_model):
    old, new = jax.random.PRNGKey(4), jax.random.key(4)
    policy = memory.create("relax_forcing")
    a, b = (rfjax.rollout(tiny_model, policy, context(), (1, 3, 6, 8, 4), key=key).latents for key in (old, new))
    np.testing.assert_array_equal(a, b)
