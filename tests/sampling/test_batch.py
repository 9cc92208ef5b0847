"""Videos that share a batch and stand at different chunks, against each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations

from rfjax import memory
from rfjax.sampling.batch import Batch, Occupant
from rfjax.sampling.pipeline import keys_from_seed, stream_video
from rfjax.sampling.switching import Switch

SIZE = (6, 8)
LENGTHS = {0: 2, 1: 4, 2: 3, 3: 1}
"""Chunks of each video, by the number of its sample."""


def embeds_of(model, number):
    network = model.config.transformer
    rng = np.random.default_rng(number)
    return rng.normal(size=(1, network.text_len - number, network.text_dim)).astype(np.float32)


def occupant(model, number):
    return Occupant(embeds_of(model, number), keys_from_seed(3, [number])[0])


def alone(model, policy, number, chunks, switches=()):
    """The video by itself: its frames, and what each chunk attended."""
    frames = chunks * model.config.chunk_frames
    embeds, keys = jnp.asarray(embeds_of(model, number)), keys_from_seed(3, [number])
    made = list(stream_video(model, policy, embeds, frames, SIZE, keys, switches))
    return np.concatenate([c.frames[0] for c in made]), np.stack([c.trace.frames for c in made])


def refilled(model, policy, places, order, lengths):
    """Make the videos of `order` in so many places; return each one's pieces."""
    longest = max(lengths.values()) * model.config.chunk_frames
    batch = Batch(model, policy, (places, longest, *SIZE, model.config.transformer.in_dim))
    queue, seated, pieces = list(order), {}, {number: [] for number in order}
    while queue or seated:
        free = [place for place in range(places) if place not in seated]
        admitted = {place: queue.pop(0) for place in free if queue}
        seated |= admitted
        batch.admit({place: occupant(model, number) for place, number in admitted.items()})
        for place, piece in enumerate(batch.step().fetch()):
            if place in seated:
                pieces[seated[place]].append(piece)
                if len(pieces[seated[place]]) == lengths[seated[place]]:
                    del seated[place]
    return pieces


@pytest.mark.parametrize("name", ["relax_forcing", pytest.param("context_forcing", marks=pytest.mark.slow)])
def test_a_video_in_any_place_is_the_video_alone(tiny_model, name):
    policy = memory.create(name)
    pieces = refilled(tiny_model, policy, 2, LENGTHS, LENGTHS)
    for number, chunks in LENGTHS.items():
        frames, attended = alone(tiny_model, policy, number, chunks)
        made = np.concatenate([piece.frames for piece in pieces[number]])
        assert made.shape == frames.shape
        assert np.abs(made.astype(int) - frames).max() <= 1
        np.testing.assert_array_equal(np.stack([piece.trace.frames for piece in pieces[number]]), attended)
        assert all(piece.finite for piece in pieces[number])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(memory.POLICIES))
def test_every_policy_forgets_the_video_before(tiny_model, name):
    policy = memory.create(name)
    pieces = refilled(tiny_model, policy, 1, [1, 2], LENGTHS)
    frames, _ = alone(tiny_model, policy, 2, LENGTHS[2])
    made = np.concatenate([piece.frames for piece in pieces[2]])
    assert np.abs(made.astype(int) - frames).max() <= 1


def test_refilling_compiles_nothing_more(tiny_model):
    from rfjax.sampling import batch, rollout

    policy = memory.create("relax_forcing")
    refilled(tiny_model, policy, 2, LENGTHS, LENGTHS)
    programs = rollout.step, batch._emptied, batch._text
    before = [compilations(program) for program in programs]
    refilled(tiny_model, policy, 2, list(reversed(LENGTHS)), LENGTHS)
    assert [compilations(program) for program in programs] == before


def test_a_kept_state_goes_on_to_the_same_bits(tiny_model):
    policy = memory.create("relax_forcing")
    shape = (2, 12, *SIZE, tiny_model.config.transformer.in_dim)

    def start():
        batch = Batch(tiny_model, policy, shape)
        batch.admit({place: occupant(tiny_model, place) for place in (0, 1)})
        return batch

    first = start()
    first.step()
    kept = jax.tree.map(lambda a: jnp.array(a), first.state)
    expected = first.step().fetch()
    second = Batch(tiny_model, policy, shape)
    like = second.state_like()
    assert jax.tree.structure(like) == jax.tree.structure(kept)
    second.restore({place: occupant(tiny_model, place) for place in (0, 1)}, [1, 1], kept)
    for piece, other in zip(second.step().fetch(), expected, strict=True):
        np.testing.assert_array_equal(piece.frames, other.frames)


@pytest.mark.slow
def test_prompts_change_in_all_places(tiny_model):
    policy, number = memory.create("relax_forcing"), 0
    new = embeds_of(tiny_model, 5)
    switch = Switch(3, jnp.asarray(new))
    shape = (1, 9, *SIZE, tiny_model.config.transformer.in_dim)
    batch = Batch(tiny_model, policy, shape, [switch])
    batch.admit({0: occupant(tiny_model, number)})
    made = np.concatenate([batch.step().fetch()[0].frames for _ in range(3)])
    expected, _ = alone(tiny_model, policy, number, 3, [switch])
    assert np.abs(made.astype(int) - expected).max() <= 1
