"""Reward Forcing and MemRoPE against the slow transcriptions of their rules, over long rollouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from long_rollout import SHAPE, commit, random_chunk, read, recache, roles_in_order, roll, slots_in_order
from transcribed_sinks import LONG, SHORT, MemRope, RewardForcing

from rfjax import memory
from rfjax.memory import BLEND, SINK, TAIL


def follows(policy, make, name_of, chunks, shape=SHAPE, dtype=jnp.float32, drift=0.0, tolerance=1e-5):
    """Follow one transcription for each layer and sample; `name_of` turns its name of an entry into the trace's."""
    slow = {(layer, sample): make() for layer in range(shape.layers) for sample in range(shape.batch)}
    for start, view, past in roll(policy, chunks, shape, dtype, drift):
        for (layer, sample), one in slow.items():
            if start:
                new = [np.stack(part[-shape.chunk_frames :])[:, layer, sample] for part in past]
                one.commit(start - shape.chunk_frames, *new)
            want, slots = one.attended(start), slots_in_order(view, sample)
            assert [row[1:] for row in slots] == [(name_of(entry.frame, start), entry.position) for entry in want]
            at = [slot for slot, _, _ in slots]
            for got, exact in ((view.keys, [e.key for e in want]), (view.values, [e.value for e in want])):
                got = np.asarray(got[layer, sample, at], np.float32)
                exact = np.asarray(exact).reshape(got.shape)
                assert (np.abs(got - exact) <= tolerance * (1 + np.abs(exact))).all(), start


def reward_forcing(chunks, tail=3, rate=0.001, shape=SHAPE, **rest):
    chunk = shape.chunk_frames

    def name_of(frame, start):
        """Frame i of the sink is named by the newest frame folded into it."""
        return start - tail - chunk + frame if frame < chunk and start > chunk + tail else frame

    policy = memory.create("reward_forcing", tail_frames=tail, rate=rate)
    follows(policy, lambda: RewardForcing(chunk, chunk, tail, rate), name_of, chunks, shape, **rest)


def memrope(chunks, sink=3, tail=4, long_rate=0.01, short_rate=0.1, shape=SHAPE, **rest):
    def name_of(frame, start):
        """Both averages are named by the newest frame before the tail."""
        return start - tail - 1 if frame in (LONG, SHORT) else frame

    policy = memory.create("memrope", sink_frames=sink, tail_frames=tail, long_rate=long_rate, short_rate=short_rate)
    make = functools.partial(MemRope, shape.chunk_frames, sink, tail, long_rate, short_rate)
    follows(policy, make, name_of, chunks, shape, **rest)


@pytest.mark.parametrize(("tail", "rate"), [(3, 0.001), (3, 0.0), (6, 0.3), (9, 1.0)])
def test_reward_forcing(tail, rate):
    reward_forcing(64, tail, rate, drift=1.0)


@pytest.mark.parametrize(("sink", "tail", "rates"), [(3, 4, (0.01, 0.1)), (0, 4, (0.5, 1.0)), (5, 5, (0.0, 0.3))])
def test_memrope(sink, tail, rates):
    memrope(64, sink, tail, *rates, drift=1.0)


@settings(max_examples=3, deadline=None)
@given(chunk=st.integers(1, 4), blocks=st.integers(1, 3), rate=st.floats(0, 1))
def test_any_sizes(chunk, blocks, rate):
    shape = dataclasses.replace(SHAPE, layers=3, rows=2, columns=3, chunk_frames=chunk)
    reward_forcing(12, blocks * chunk, rate, shape)
    tail = chunk + blocks
    memrope(12, -(tail + 2) % chunk, tail, rate, 1 - rate, shape)


@pytest.mark.parametrize("method", [reward_forcing, memrope])
def test_blends_do_not_freeze_in_bfloat16(method):
    """With keys that drift: folded in bfloat16, the blends would be many roundings away from the exact ones."""
    method(80, dtype=jnp.bfloat16, drift=1.0, tolerance=2**-8)


def test_the_sink_of_reward_forcing_moves_in_bfloat16():
    views = [view for _, view, _ in roll(memory.create("reward_forcing"), 80, dtype=jnp.bfloat16, drift=1.0)]
    first, last = (np.asarray(views[i].keys[:, :, :3], np.float32) for i in (1, -1))
    assert 0.5 < np.mean(last - first) < 1.5


def test_roles():
    sinks = [roles_in_order(view) for _, view, _ in roll(memory.create("reward_forcing"), 9)]
    assert sinks == [[], [SINK] * 3, [SINK] * 3 + [TAIL] * 3, *[[BLEND] * 3 + [TAIL] * 3] * 6]
    averages = [roles_in_order(view) for _, view, _ in roll(memory.create("memrope"), 9)]
    # What is to become an average is an ordinary frame as long as it is one.
    early = [[SINK] * 3 + [TAIL] * count for count in (0, 3, 6)]
    assert averages == [[], *early, *[[SINK] * 3 + [BLEND] * 2 + [TAIL] * 4] * 5]


@pytest.mark.parametrize(("name", "rates"), [("reward_forcing", ["rate"]), ("memrope", ["long_rate", "short_rate"])])
def test_rates_are_traced(name, rates):
    chunk = random_chunk(np.random.default_rng(3), [9, 9])
    counts = []
    for rate in (0.0, 0.01, 0.5):
        policy = memory.create(name, **dict.fromkeys(rates, rate))
        commit(policy, policy.init(SHAPE, 60, jnp.float32), chunk)
        counts.append(compilations(commit))
    assert counts[1:] == counts[:1] * 2


@pytest.mark.parametrize(("name", "blends"), [("reward_forcing", {0: 9, 1: 10, 2: 11}), ("memrope", {3: 10, 4: 10})])
def test_recache_leaves_blends(name, blends):
    """The frames that a blend is named by and began as are among the given ones, and do not touch it."""
    policy, rng = memory.create(name), np.random.default_rng(4)
    state = policy.init(SHAPE, 60, jnp.float32)
    for start in range(0, 15, 3):
        state = commit(policy, state, random_chunk(rng, [start] * 2))
    given = random_chunk(rng, [0, 0], dataclasses.replace(SHAPE, chunk_frames=15))
    renewed = recache(policy, state, given)
    before, after = (jax.device_get(read(policy, s, jnp.full(2, 15, jnp.int32))) for s in (state, renewed))
    jax.tree.map(np.testing.assert_array_equal, before.trace, after.trace)
    for slot, frame, _ in slots_in_order(after, 0):
        assert frame == blends.get(slot, frame)
        want = (before.keys[:, :, slot], before.values[:, :, slot])
        if slot not in blends:
            want = (given.keys[:, :, frame], given.values[:, :, frame])
        np.testing.assert_array_equal(after.keys[:, :, slot], want[0])
        np.testing.assert_array_equal(after.values[:, :, slot], want[1])
    np.testing.assert_array_equal(state.key_blends, renewed.key_blends)


def test_blends_begin_with_renewed_frames():
    """A recache before the first fold changes what is folded, and the sink into which it is folded."""
    rng = np.random.default_rng(5)
    chunks = [random_chunk(rng, [start] * 2) for start in (0, 3, 6, 9)]
    given = random_chunk(rng, [0, 0], dataclasses.replace(SHAPE, chunk_frames=9))

    def renewed_before(policy, last):
        state = policy.init(SHAPE, 60, jnp.float32)
        for chunk in chunks[:last]:
            state = commit(policy, state, chunk)
        return commit(policy, recache(policy, state, given), chunks[last])

    sink = renewed_before(memory.create("reward_forcing", rate=0.25), 2).keys[:, :, :3]
    np.testing.assert_allclose(sink, 0.75 * given.keys[:, :, :3] + 0.25 * given.keys[:, :, 3:6], rtol=1e-5, atol=1e-6)
    averages = renewed_before(memory.create("memrope"), 3).values[:, :, 3:5, 0]
    mean = given.values[:, :, 5:8].mean(axis=(2, 3))
    np.testing.assert_allclose(averages, np.stack([mean, mean], axis=2), rtol=1e-5, atol=1e-6)
