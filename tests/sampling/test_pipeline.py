"""Streaming from prompt embeddings to pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax.errors import UserError
from rfjax.memory import create
from rfjax.sampling import pipeline
from rfjax.sampling.codec import decode
from rfjax.sampling.pipeline import keys_from_seed, stream_video
from rfjax.sampling.rollout import rollout
from rfjax.sampling.switching import Switch

FRAMES, SIZE = 9, (6, 8)


@pytest.fixture(scope="module")
def embeds():
    return jax.random.normal(jax.random.key(1), (2, 12, 24))


def stream(model, embeds, samples, frames=FRAMES):
    return stream_video(model, create("relax_forcing"), embeds, frames, SIZE, keys_from_seed(5, samples))


@pytest.fixture(scope="module")
def streamed(tiny_model, embeds):
    return list(stream(tiny_model, embeds, [0, 1]))


@pytest.mark.slow
def test_streamed_pixels_are_those_of_rollout_and_decode(tiny_model, embeds, streamed):
    shape = (2, FRAMES, *SIZE, 4)
    whole = rollout(tiny_model, create("relax_forcing"), embeds, shape, key=keys_from_seed(5, [0, 1]))
    video = np.asarray(decode(tiny_model, whole.latents))
    frames = np.concatenate([chunk.frames for chunk in streamed], axis=1)
    assert [chunk.frames.shape[1] for chunk in streamed] == [9, 12, 12]
    assert frames.dtype == np.uint8
    assert frames.std() > 5
    np.testing.assert_allclose(frames, (video + 1) * 127.5, atol=0.51)


@pytest.mark.slow
def test_trace_comes_with_each_chunk_on_the_host(streamed):
    for index, chunk in enumerate(streamed):
        assert isinstance(chunk.trace.frames, np.ndarray)
        assert chunk.trace.frames.max() == 3 * index - 1
        assert chunk.seconds > 0


@pytest.mark.slow
def test_a_sample_is_the_same_in_any_batch(tiny_model, embeds, streamed):
    alone = list(stream(tiny_model, embeds[1:], [1]))
    for chunk, of_batch in zip(alone, streamed, strict=True):
        difference = np.abs(chunk.frames[0].astype(int) - of_batch.frames[1])
        assert difference.max() <= 1
    assert np.abs(streamed[0].frames[0].astype(int) - streamed[0].frames[1]).max() > 20


def test_keys_depend_on_seed_and_sample_alone():
    def data(seed, samples):
        return np.asarray(jax.random.key_data(keys_from_seed(seed, samples)))

    np.testing.assert_array_equal(data(3, [4, 9])[1], data(3, [9])[0])
    np.testing.assert_array_equal(data(3, [9])[0], jax.random.key_data(jax.random.fold_in(jax.random.key(3), 9)))
    assert (data(3, [4]) != data(3, [9])).any()
    assert (data(2**32 - 1, [4]) != data(3, [4])).any()


@pytest.mark.slow
def test_next_chunk_is_dispatched_before_the_last_is_fetched(tiny_model, embeds, monkeypatch):
    events, original, fetch = [], pipeline.stream, pipeline._fetch

    def recording_stream(*arguments, **keywords):
        for index, chunk in enumerate(original(*arguments, **keywords)):
            events.append(f"dispatch {index}")
            yield chunk

    def recording_fetch(index, *arguments):
        events.append(f"fetch {index}")
        return fetch(index, *arguments)

    monkeypatch.setattr(pipeline, "stream", recording_stream)
    monkeypatch.setattr(pipeline, "_fetch", recording_fetch)
    list(stream(tiny_model, embeds, [0, 1]))
    assert events == ["dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "fetch 2"]


@pytest.mark.slow
def test_nan_is_said_with_its_chunk(tiny_model, embeds):
    bad = embeds.at[1].set(jnp.nan)
    with pytest.raises(UserError, match=r"chunk 1 of 3 \(latent frames 0 to 2\) hold NaN or infinity in 1 of 2 videos"):
        next(stream(tiny_model, bad, [0, 1]))


def test_checkpoint_without_autoencoder_is_a_user_error(tiny_model, embeds):
    with pytest.raises(UserError, match="no autoencoder"):
        next(stream(dataclasses.replace(tiny_model, vae=None), embeds, [0, 1]))


def test_the_rolling_sampler_refuses_to_change_prompts(tiny_model):
    embeds = jnp.zeros((1, 12, 24))
    switches = [Switch(3, embeds)]
    with pytest.raises(UserError, match="the rolling sampler cannot change prompts"):
        stream_video(
            tiny_model, create("relax_forcing"), embeds, 6, (6, 8), keys_from_seed(0, [0]), switches, sampler="rolling"
        )
