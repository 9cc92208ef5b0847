"""Rolling Forcing's memory against the transcription of its rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from transcribed_rolling import attended, attended_clean

from rfjax.errors import UserError
from rfjax.memory import NONE, SINK, TAIL, CleanChunk, MemoryShape
from rfjax.memory.frames import empty_store
from rfjax.memory.rolling_window import RollingForcing

SHAPE = MemoryShape(layers=3, batch=2, heads=2, head_dim=4, rows=1, columns=3, chunk_frames=3)


def chunk_at(rng, starts, shape, dtype=jnp.float32):
    """A clean chunk of random keys whose first frames are `starts`; values are its keys with the sign changed."""
    size = (shape.layers, shape.batch, shape.chunk_frames, shape.frame_tokens, shape.heads * shape.head_dim)
    keys = jnp.asarray(rng.normal(size=size), dtype)
    return CleanChunk(jnp.asarray(starts)[:, None] + jnp.arange(shape.chunk_frames), 2 * keys, keys, -keys)


def pairs(view, sample):
    """(frame, position) of the sample's valid slots, in order."""
    length = int(view.length[sample])
    frames, positions = np.asarray(view.trace.frames)[sample, 0, :, 0], np.asarray(view.positions)[0, sample, :, 0]
    assert (frames[length:] == -1).all()
    return list(zip(frames[:length].tolist(), positions[:length].tolist(), strict=True))


def check(view, wanted, history, anchor=3):
    """Each sample's slots hold the wanted (frame, position) pairs, in order, and the keys of these frames."""
    keys, values, roles = (np.asarray(a) for a in (view.keys, view.values, view.trace.roles))
    for sample, want in enumerate(wanted):
        assert pairs(view, sample) == want
        assert (roles[sample, 0, len(want) :] == NONE).all()
        for slot, (frame, _) in enumerate(want):
            assert roles[sample, 0, slot, 0] == (SINK if frame < anchor else TAIL)
            np.testing.assert_array_equal(keys[:, sample, slot], history[sample][frame])
            np.testing.assert_array_equal(values[:, sample, slot], -history[sample][frame])


def remember(history, chunk):
    for sample, frames in enumerate(np.asarray(chunk.frames)):
        history[sample].update({int(f): np.asarray(chunk.keys[:, sample, i]) for i, f in enumerate(frames)})


@pytest.mark.parametrize(
    ("anchor", "window", "chunk_frames", "dtype"),
    [(3, 21, 3, jnp.float32), (3, 21, 3, jnp.bfloat16), (2, 17, 2, jnp.float32), (0, 9, 3, jnp.float32)],
)
def test_reads_what_the_public_code_attends(anchor, window, chunk_frames, dtype):
    chunks, rng, policy = 62, np.random.default_rng(0), RollingForcing(anchor_frames=anchor, window_frames=window)
    shape = dataclasses.replace(SHAPE, chunk_frames=chunk_frames)
    sizes = {"chunk": chunk_frames, "attention": window}
    read, commit = jax.jit(policy.read), jax.jit(policy.commit, donate_argnums=0)
    read_window = jax.jit(policy.read_window, static_argnums=2)
    state, history = policy.init(shape, chunk_frames * chunks, dtype), ({}, {})
    assert state.frames.shape == (2, anchor + window - chunk_frames)
    for index in range(chunks):
        starts = jnp.full(2, index * chunk_frames, jnp.int32)
        joint = min(5, chunks - index) * chunk_frames
        view = read_window(state, starts, joint)
        assert view.keys.shape[2] == max(window - joint, anchor)
        # Until its first chunk is due the window starts at 0 and reads nothing; then the first is chunk `index`.
        check(view, [attended(index + 4, chunks, anchor=anchor, **sizes)] * 2, history, anchor)
        check(read(state, starts), [attended_clean(index * chunk_frames, **sizes)] * 2, history, anchor)
        chunk = chunk_at(rng, starts, shape, dtype)
        state = commit(state, chunk)
        remember(history, chunk)
        assert state.keys.dtype == dtype
    assert compilations(read) == compilations(commit) == 1
    assert compilations(read_window) == 5


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_chooses_by_the_rule_for_any_sizes(data):
    chunk, window = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    anchor = data.draw(st.integers(0, chunk))
    attention = data.draw(st.integers(max(anchor, 1) + chunk, 24))
    policy = RollingForcing(anchor_frames=anchor, window_frames=attention)
    shape = dataclasses.replace(SHAPE, layers=1, batch=14, chunk_frames=chunk)
    everything = jnp.broadcast_to(jnp.arange(14 * chunk), (14, 14 * chunk))  # a sample for each chunk of one video
    state = dataclasses.replace(empty_store(policy, shape, 14 * chunk, jnp.float32), frames=everything)
    starts = jnp.arange(14) * chunk
    read = jax.jit(
        lambda state, starts: (policy.read_window(state, starts, window * chunk), policy.read(state, starts))
    )
    joint, clean = read(state, starts)
    sizes = {"chunk": chunk, "attention": attention}
    for index in range(14):
        # Of a longer video, so that the window is full.
        assert pairs(joint, index) == attended(index + window - 1, 30, window, anchor=anchor, **sizes)
        assert pairs(clean, index) == attended_clean(index * chunk, **sizes)


def test_samples_may_stand_at_different_chunks():
    policy, rng = RollingForcing(), np.random.default_rng(1)
    read, commit = jax.jit(policy.read), jax.jit(policy.commit)
    read_window = jax.jit(policy.read_window, static_argnums=2)
    state, history = policy.init(SHAPE, 90, jnp.float32), ({}, {})
    for index in range(20):
        starts = jnp.asarray([3 * index, 3 * max(index - 7, 0)], jnp.int32)
        if index == 7:  # the second sample starts afresh
            state = dataclasses.replace(state, frames=state.frames.at[1].set(-1))
            history[1].clear()
        if index >= 7:
            check(read_window(state, starts, 15), [attended(int(s) // 3 + 4, 40) for s in starts], history)
            check(read(state, starts), [attended_clean(int(s)) for s in starts], history)
        chunk = chunk_at(rng, starts, SHAPE)
        state = commit(state, chunk)
        remember(history, chunk)


def test_recache_renews_what_is_stored():
    policy, rng = RollingForcing(), np.random.default_rng(2)
    commit, recache = jax.jit(policy.commit), jax.jit(policy.recache)
    state, history = policy.init(SHAPE, 90, jnp.float32), ({}, {})
    for start in range(0, 30, 3):
        chunk = chunk_at(rng, [start, start], SHAPE)
        state = commit(state, chunk)
        remember(history, chunk)
    for frames in ([0, 1, 2], [24, 25, 26], [6, 7, 8], [-1, -1, -1]):  # anchor, recent, long gone, none
        chunk = chunk_at(rng, [frames[0]] * 2, SHAPE)
        chunk = dataclasses.replace(chunk, frames=jnp.asarray([frames] * 2))
        state = recache(state, chunk)
        remember(history, chunk)
    starts = jnp.full(2, 30, jnp.int32)
    check(policy.read_window(state, starts, 3), [attended(14, 11)] * 2, history)
    check(policy.read(state, starts), [attended_clean(30)] * 2, history)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"anchor_frames": -1}, "rolling_forcing: anchor_frames is -1; 0 or more is needed"),
        ({"window_frames": 0}, "rolling_forcing: window_frames is 0; 1 or more is needed"),
        (
            {"anchor_frames": 4, "window_frames": 6},
            "window_frames is 6; anchor_frames 4 and the chunk's 3 need at least 7",
        ),
        ({"anchor_frames": 0, "window_frames": 3}, "anchor_frames 0 and the chunk's 3 need at least 4"),
    ],
)
def test_says_what_does_not_fit(policy, message):
    with pytest.raises(UserError, match=message):
        RollingForcing(**policy).init(SHAPE, 30, jnp.float32)
