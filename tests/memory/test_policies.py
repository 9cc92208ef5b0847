"""Every policy against the slow transcription of its rule, over long rollouts and random settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transcriptions import attention_sink, relax, window

from rfjax import memory
from rfjax.memory import HISTORY, SINK, TAIL, CleanChunk, MemoryShape
from rfjax.memory.relaxed import candidate_indices

SHAPE = MemoryShape(layers=2, batch=2, heads=2, head_dim=4, rows=1, columns=3, chunk_frames=3)


def follow(policy, chunks, shape=SHAPE, seed=0):
    """Yield (start, view, all keys so far [B, F, L, T, C]) of each chunk, committing random keys in between."""
    rng = np.random.default_rng(seed)
    channels = shape.heads * shape.head_dim
    read, commit = jax.jit(policy.read), jax.jit(policy.commit)
    state = policy.init(shape, chunks * shape.chunk_frames, jnp.float32)
    history = np.zeros((shape.batch, 0, shape.layers, shape.frame_tokens, channels), np.float32)
    for chunk in range(chunks):
        start = chunk * shape.chunk_frames
        starts = jnp.full(shape.batch, start, jnp.int32)
        yield start, read(state, starts), history
        new = rng.normal(size=(shape.layers, shape.batch, shape.chunk_frames, *history.shape[3:])).astype(np.float32)
        frames = starts[:, None] + jnp.arange(shape.chunk_frames)
        state = commit(state, CleanChunk(frames, jnp.asarray(2 * new), jnp.asarray(new), jnp.asarray(-new)))
        history = np.concatenate([history, new.transpose(1, 2, 0, 3, 4)], axis=1)


def attended(view, sample):
    """(frame, position) pairs of a sample in time order."""
    valid = np.asarray(view.valid[sample])
    frames, positions = np.asarray(view.trace.frames[sample, 0, :, 0]), np.asarray(view.positions[0, sample, :, 0])
    assert (frames[~valid] == -1).all()
    assert (frames[valid] >= 0).all()
    return sorted(zip(frames[valid].tolist(), positions[valid].tolist(), strict=True))


def holds_its_frames(view, history):
    """Each valid slot holds the keys and values of the frame that it names."""
    for sample in range(history.shape[0]):
        for slot, frame in enumerate(np.asarray(view.trace.frames[sample, 0, :, 0])):
            if frame >= 0:
                np.testing.assert_array_equal(view.keys[:, sample, slot], history[sample, frame])
                np.testing.assert_array_equal(view.values[:, sample, slot], -history[sample, frame])


@pytest.mark.parametrize(("frames", "sink"), [(None, 0), (6, 0), (9, 3), (21, 0), (21, 1), (7, 2), (3, 0)])
def test_window(frames, sink):
    policy = memory.create("self_forcing", window_frames=frames, sink_frames=sink)
    for start, view, history in follow(policy, 12):
        holds_its_frames(view, history)
        for sample in range(SHAPE.batch):
            assert attended(view, sample) == sorted(window(start, 3, frames, sink))


@pytest.mark.parametrize(("sink", "tail"), [(3, 15), (2, 4), (0, 6), (1, 0), (5, 1)])
def test_attention_sink(sink, tail):
    policy = memory.create("attention_sink", sink_frames=sink, tail_frames=tail)
    for start, view, history in follow(policy, 14):
        holds_its_frames(view, history)
        for sample in range(SHAPE.batch):
            assert attended(view, sample) == sorted(attention_sink(start, sink, tail))


def check_relax(policy_settings, chunks, seed=0, chunk_frames=3):
    policy = memory.create("relax_forcing", **policy_settings)
    shape = MemoryShape(2, 2, 2, 4, 1, 3, chunk_frames)
    full = {
        "reservoir_frames": 120,
        "sink_frames": 2,
        "history_frames": 1,
        "tail_frames": 1,
        "history_candidates": 4,
        "redundancy_weight": 2.0,
        "positions": "hybrid",
        **policy_settings,
    }
    choices = []
    for start, view, history in follow(policy, chunks, shape, seed):
        holds_its_frames(view, history)
        chosen = []
        for sample in range(shape.batch):
            heads = history[sample, :, 0].reshape(-1, shape.frame_tokens, shape.heads, shape.head_dim)
            want = relax(dict(enumerate(heads)), start, chunk_frames, full)
            trace = jax.tree.map(lambda leaf, sample=sample: np.asarray(leaf[sample, 0]), view.trace)
            got = [int(frame) for frame in trace.candidates if frame >= 0]
            assert got == want.candidates
            np.testing.assert_allclose(trace.scores[: len(got)], want.scores, atol=1e-5)
            assert np.isnan(trace.scores[len(got) :]).all()
            assert [int(frame) for frame in trace.selected_frames if frame >= 0] == want.selected
            assert attended(view, sample) == sorted(want.pairs)
            chosen.append(want.selected)
        choices.append(chosen)
    return choices


def test_relax_defaults_over_two_minutes_equal_a_full_reservoir():
    choices = check_relax({}, 160)
    assert any(first != second for first, second in choices), "samples never differ, so selection is not per sample"


@pytest.mark.parametrize("positions", ["hybrid", "true"])
def test_relax_small_reservoir(positions):
    check_relax({"reservoir_frames": 18, "positions": positions}, 20)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_relax_any_settings(data):
    draw = data.draw
    candidates = draw(st.integers(1, 6))
    sizes = {
        "sink_frames": draw(st.integers(1, 4)),
        "tail_frames": draw(st.integers(1, 4)),
        "history_candidates": candidates,
        "history_frames": draw(st.integers(1, candidates)),
        "redundancy_weight": draw(st.floats(-3, 3)),
    }
    chunk = draw(st.integers(1, 4))
    least = sizes["sink_frames"] + sizes["tail_frames"] + chunk + 2 * sizes["history_frames"]
    sizes["reservoir_frames"] = draw(st.integers(max(least + 2, 8), least + 40))
    check_relax(sizes, 30, draw(st.integers(0, 9)), chunk)


def test_candidates_against_exact_fractions():
    """The float32 steps truncate as exact ones would (checked against torch.linspace for the same sizes, too)."""
    for length in range(2, 200):
        for count in range(1, 13):
            half = length // 2
            steps = min(count, length - half)
            places = {half + (length - 1 - half) * i // steps for i in range(steps + 1)}
            want = [half] if steps == 1 else sorted(places)[:-1]
            assert candidate_indices(length, count).tolist() == want


def test_relax_stores_47_frames_of_the_120():
    state = memory.create("relax_forcing").init(SHAPE, 10_000, jnp.float32)
    assert state.frames.shape == (2, 47)


def test_roles_follow_from_the_frame():
    for start, view, _ in follow(memory.create("relax_forcing"), 8):
        roles, frames = np.asarray(view.trace.roles), np.asarray(view.trace.frames)
        assert (roles[(frames >= 0) & (frames < 2)] == SINK).all()
        assert (roles[frames == start - 1] == TAIL).all() or start < 3
        assert (roles[(frames >= 2) & (frames < start - 1)] == HISTORY).all()
        assert (roles[frames < 0] == 0).all()


def test_redundancy_weight_is_traced():
    state = memory.create("relax_forcing").init(SHAPE, 60, jnp.float32)
    read = jax.jit(lambda policy, state: policy.read(state, jnp.zeros(2, jnp.int32)))
    for weight in (0.5, 1.0, 2.0):
        read(memory.create("relax_forcing", redundancy_weight=weight), state)
    assert compilations(read) == 1


def test_samples_may_stand_at_different_chunks():
    """Continuous batching needs a start per sample: each then behaves as if it were alone."""
    policy = memory.create("relax_forcing", reservoir_frames=18)
    shape = MemoryShape(1, 2, 2, 4, 1, 3, 3)
    rng = np.random.default_rng(1)
    read, commit = jax.jit(policy.read), jax.jit(policy.commit)
    keys = rng.normal(size=(1, 1, 30, 3, 8)).astype(np.float32)
    state = policy.init(shape, 60, jnp.float32)
    lone = policy.init(MemoryShape(1, 1, 2, 4, 1, 3, 3), 60, jnp.float32)
    for chunk in range(9):
        starts = jnp.asarray([3 * chunk, max(3 * (chunk - 2), 0)], jnp.int32)
        if chunk == 2:  # the second sample starts afresh
            state = dataclasses.replace(state, frames=state.frames.at[1].set(-1))
        both = jnp.concatenate([jnp.asarray(keys[:, :, int(s) : int(s) + 3]) for s in starts], axis=1)
        if chunk >= 2:
            first = jnp.asarray([3 * (chunk - 2)], jnp.int32)
            own, alone = read(state, starts), read(lone, first)
            np.testing.assert_array_equal(own.trace.frames[1], alone.trace.frames[0])
            np.testing.assert_array_equal(own.positions[:, 1], alone.positions[:, 0])
            own_chunk = both[:, 1:]
            lone = commit(lone, CleanChunk(first[:, None] + jnp.arange(3), own_chunk, own_chunk, own_chunk))
        state = commit(state, CleanChunk(starts[:, None] + jnp.arange(3), both, both, both))
