"""The rolling rollout against the public pipeline's numbers, and against the slow transcription of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcribed_rolling as slow
from conftest import compilations, golden

import rfjax
from rfjax import memory
from rfjax.config import preset_path, read_mapping
from rfjax.errors import UserError
from rfjax.models.functional import bind
from rfjax.models.transformer import AttendedMemory, WanTransformer, rotate_memory
from rfjax.sampling import rolling

SLOTS = 24  # remembered frames of the slow rollout's passes, padding included


def with_steps(model, *steps):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, denoising_steps=steps))


@pytest.fixture(scope="module")
def model(tiny_model):
    return with_steps(tiny_model, *slow.STEPS)


@pytest.fixture(scope="module")
def network(tiny_model):
    """(latents, timesteps, memory, embeds) -> flow, keys and values of each frame: the tiny transformer."""
    config = tiny_model.config.transformer

    @jax.jit
    def run(params, latents, timesteps, embeds, keys, values, positions, length):
        bound = bind(WanTransformer, config, params)
        keys = rotate_memory(jnp.moveaxis(keys, 0, 1)[:, None], positions[None, None, :, None], None, 3, 4, config)
        attended = AttendedMemory(keys, jnp.moveaxis(values, 0, 1)[:, None], length[None])
        text = bound.embed_text(embeds)
        flow, made = bound(latents[None], timesteps[None], text, attended, return_projections=True)
        assert made is not None
        return flow[0], jnp.moveaxis(made.keys[:, 0], 1, 0), jnp.moveaxis(made.values[:, 0], 1, 0)

    def call(latents, timesteps, remembered, embeds):
        keys, values = np.zeros((2, SLOTS, config.num_layers, 12, config.dim), np.float32)
        positions = np.zeros(SLOTS, np.int32)
        for slot, frame in enumerate(remembered):
            keys[slot], values[slot] = frame.entry
            positions[slot] = frame.position
        length = np.asarray(len(remembered), np.int32)
        latents = latents.astype(np.float32)
        out = run(tiny_model.transformer, latents, timesteps, embeds, keys, values, positions, length)
        return [np.asarray(part) for part in out]

    return call


def drawn(chunks, steps=5, seed=0):
    """Context, noise and noise of the later steps, of one sample."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(1, 3 * chunks, 6, 8, 4)).astype(np.float32)
    renoise = rng.normal(size=(chunks, steps - 1, 1, 3, 6, 8, 4)).astype(np.float32)
    return context(), noise, renoise


def context(batch=1):
    return golden("rollout_dense")["context"][:batch]


def rolling_forcing(**settings):
    return memory.create("rolling_forcing", **settings)


def slow_rollout(network, embeds, noise, renoise, **settings):
    """`transcribed_rolling.rolling_rollout` of one sample: noise [1, F, ...], renoise [chunks, steps, 1, n, ...]."""

    def denoise(latents, timesteps, remembered):
        return network(latents, timesteps, remembered, embeds)[0]

    def clean(latents, timesteps, remembered):
        return list(zip(*network(latents, timesteps, remembered, embeds)[1:], strict=True))

    return slow.rolling_rollout(denoise, clean, noise[0], renoise[:, :, 0], **settings)[0]


def streamed(*args, **kwargs):
    chunks = list(rolling.stream(*args, **kwargs))
    return np.concatenate([chunk.latents for chunk in chunks], axis=1), chunks


def assert_close(latents, want):
    assert np.abs(latents - want).max() < 1e-5 * np.ptp(want)


def test_matches_the_public_pipeline(model):
    data = golden("rollout_rolling_forcing")
    arguments = (model, rolling_forcing(), data["context"], data["noise"])
    result = rolling.rollout(*arguments, renoise=data["renoise"])
    assert_close(result.latents, data["latents"])
    assert result.finite.all()
    latents, _ = streamed(*arguments, renoise=data["renoise"])
    assert_close(latents, data["latents"])


@pytest.mark.parametrize("chunks", [1, 2, 5, 6, 40])
def test_videos_of_any_length_match_the_transcription(model, network, chunks):
    embeds, noise, renoise = drawn(chunks, seed=chunks)
    latents, made = streamed(model, rolling_forcing(), embeds, noise, renoise=renoise)
    assert_close(latents, slow_rollout(network, embeds, noise, renoise)[None])
    assert len(made) == chunks
    for chunk, finished in enumerate(made):
        trace = jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0], finished.trace)
        valid = trace.frames[:, 0] >= 0
        pairs = zip(trace.frames[valid, 0].tolist(), trace.positions[valid, 0].tolist(), strict=True)
        assert list(pairs) == slow.attended(chunk + 4, chunks)
        assert trace.frames.shape == (18, 1)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_other_settings_and_as_many_chunks_as_steps(tiny_model, network, chunks):
    steps = tiny_model.config.denoising_steps
    assert len(steps) == 4
    embeds, noise, renoise = drawn(chunks, steps=4)
    policy = rolling_forcing(anchor_frames=2, window_frames=16)
    result = rolling.rollout(tiny_model, policy, embeds, noise, renoise=renoise)
    want = slow_rollout(network, embeds, noise, renoise, steps=steps, attention=16, anchor=2)
    assert_close(result.latents, want[None])


@pytest.mark.slow
def test_any_policy_serves_window_and_clean_pass(model, network):
    """Room for every frame makes the anchor and the recent frames the whole past, at true positions."""
    embeds, noise, renoise = drawn(8)
    latents, chunks = streamed(model, memory.create("self_forcing"), embeds, noise, renoise=renoise)
    assert_close(latents, slow_rollout(network, embeds, noise, renoise, attention=1000)[None])
    assert (np.asarray(chunks[5].trace.frames) >= 0).sum() == 15


def test_one_step_leaves_the_chunk_rollout(tiny_model):
    """A joint window of one chunk is the chunk rollout."""
    embeds, noise, renoise = drawn(5, steps=1)
    arguments = (with_steps(tiny_model, 1000), memory.create("self_forcing", window_frames=9), embeds, noise)
    joint, chunked = (module.rollout(*arguments, renoise=renoise) for module in (rolling, rfjax))
    np.testing.assert_allclose(joint.latents, chunked.latents, atol=1e-5)
    for one, other in zip(jax.tree.leaves(joint.trace), jax.tree.leaves(chunked.trace), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def two_steps(tiny_model):
    return with_steps(tiny_model, 1000, 500)


@pytest.mark.slow
def test_noise_is_drawn_as_by_the_chunk_rollout(two_steps):
    key = jax.random.key(11)

    def draw(chunk, use, *shape):
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 0), chunk), use)
        return jax.random.normal(own, (*shape, 3, 6, 8, 4))

    noise = jnp.concatenate([draw(chunk, 0)[None] for chunk in range(4)], axis=1)
    renoise = jnp.stack([draw(chunk, 1, 1)[:, None] for chunk in range(4)])
    given, _ = streamed(two_steps, rolling_forcing(), context(), noise, renoise=renoise)
    latents, _ = streamed(two_steps, rolling_forcing(), context(), noise.shape, key=key)
    np.testing.assert_allclose(given, latents, atol=1e-6)


@pytest.mark.slow
def test_streams_of_single_samples_give_the_rollout_of_the_batch(two_steps):
    policy, keys = rolling_forcing(), jax.random.split(jax.random.key(3), 2)
    together = rolling.rollout(two_steps, policy, context(2), (2, 18, 6, 8, 4), key=keys)
    assert together.latents.shape == (2, 18, 6, 8, 4)
    for i in range(2):
        latents, chunks = streamed(two_steps, policy, context(2)[i : i + 1], (1, 18, 6, 8, 4), key=keys[i : i + 1])
        np.testing.assert_allclose(latents[0], together.latents[i], atol=1e-5)
        assert together.trace.frames.shape == (6, 2, 1, 18, 1)
        for index, chunk in enumerate(chunks):
            for one, stacked in zip(jax.tree.leaves(chunk.trace), jax.tree.leaves(together.trace), strict=True):
                np.testing.assert_array_equal(one[0], stacked[index, i])
    assert np.abs(together.latents[0] - together.latents[1]).max() > 0.1


@pytest.mark.slow
def test_a_longer_video_begins_with_the_shorter_but_for_its_last_chunks(two_steps):
    short, long = (
        streamed(two_steps, rolling_forcing(), context(), (1, frames, 6, 8, 4), key=jax.random.key(5))[0]
        for frames in (12, 21)
    )
    np.testing.assert_allclose(short[:, :9], long[:, :9], atol=1e-5)
    assert np.abs(short[:, 9:] - long[:, 9:12]).max() > 1e-3


@pytest.mark.slow
def test_one_compilation_a_window_size_serves_videos_of_any_length(tiny_model):
    own = with_steps(tiny_model, 1000, 300)
    programs = (rolling._enter, rolling._advance, rolling._finish)
    before = [compilations(program) for program in programs]
    for chunks in (6, 1, 2, 3, 10):
        embeds, noise, renoise = drawn(chunks, steps=2)
        streamed(own, rolling_forcing(), embeds, noise, renoise=renoise)
    made = [compilations(program) - count for program, count in zip(programs, before, strict=True)]
    assert made == [1, 2, 1]


def test_a_full_windows_steps_are_one_program_of_one_step(two_steps):
    """As large for 30 chunks as for 3: the loop is not unrolled."""

    def size(chunks):
        sizes, noise = rolling._request_of(two_steps, *drawn(chunks, steps=2), None, None)
        shared, state, window = rolling._begin(two_steps, rolling_forcing(), context(), sizes)
        return rolling._roll.lower(*shared, state, window, noise, chunks).as_text().count("dot_general")

    assert size(3) == size(30)


def test_memory_and_window_are_updated_in_place(two_steps):
    sizes, noise = rolling._request_of(two_steps, *drawn(6, steps=2), None, None)
    shared, state, window = rolling._begin(two_steps, rolling_forcing(), context(), sizes)
    memory_use = rolling._roll.lower(*shared, state, window, noise, 6).compile().memory_analysis()
    assert memory_use is not None
    kept = (state.memory.keys, state.memory.values, window.latents, window.renoise)
    assert memory_use.alias_size_in_bytes >= sum(array.nbytes for array in kept)


def test_not_a_number_is_reported_and_spreads_to_the_chunk_beside_it(two_steps):
    embeds, noise, renoise = drawn(5, steps=2)
    noise[0, 10, 0, 0, 0] = np.nan
    _, chunks = streamed(two_steps, rolling_forcing(), embeds, noise, renoise=renoise)
    assert [bool(chunk.finite[0]) for chunk in chunks] == [True, True, False, False, False]


@pytest.mark.slow
def test_bfloat16_follows_float32(tiny_checkpoint, model):
    half = with_steps(rfjax.load(tiny_checkpoint, "bfloat16"), *slow.STEPS)
    data = golden("rollout_rolling_forcing")
    latents, _ = streamed(half, rolling_forcing(), data["context"], data["noise"], renoise=data["renoise"])
    error = np.abs(latents - data["latents"]) / np.ptp(data["latents"])
    assert 1e-4 < error.max() < 0.01
    assert error[:, -3:].mean() < 2 * error[:, :3].mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"initial_latents": np.zeros((1, 6, 6, 8, 4), np.float32)},
            "initial_latents has 6 frames, but the rolling sampler has no published rule for continuing a video",
        ),
        ({"noise": (1, 4, 6, 8, 4)}, "noise has 4 latent frames; a multiple of the chunk's 3"),
        ({"key": None}, "noise is to be drawn, but no key was given"),
        ({"renoise": np.zeros((1, 3, 1, 3, 6, 8, 4), np.float32)}, r"needs \(1, 4, 1, 3, 6, 8, 4\)"),
        ({"policy": rolling_forcing(window_frames=5)}, "rolling_forcing: window_frames is 5; anchor_frames 3 and the"),
    ],
)
def test_says_what_does_not_fit(model, changes, message):
    request = {"policy": rolling_forcing(), "noise": (1, 3, 6, 8, 4), "key": jax.random.key(0), **changes}
    positional = (request.pop("policy"), context(), request.pop("noise"))
    with pytest.raises(UserError, match=message):
        rolling.rollout(model, *positional, **request)
    with pytest.raises(UserError, match=message):
        list(rolling.stream(model, *positional, **request))


def test_the_preset_is_the_published_memory():
    preset = read_mapping(preset_path("policies", "rolling_forcing"))
    assert sorted(preset["settings"]) == ["anchor_frames", "window_frames"]
    assert memory.create(preset["policy"], **preset["settings"]) == rolling_forcing()


@pytest.mark.parametrize(("name", "attended"), [("rolling_forcing", 21), ("relax_forcing", 19), ("infinity_rope", 18)])
def test_what_a_full_window_attends_to(model, name, attended):
    """Five chunks of their own, and what the policy has room for beside them."""
    assert rolling.attended_frames(model.config, memory.create(name), (6, 8), 60) == attended
