"""LongLive, Infinity-RoPE and Rolling Sink against the slow transcriptions of their rules, over long rollouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from long_rollout import SHAPE, commit, random_chunk, read, recache, roles_in_order, roll, slots_in_order
from transcribed_sinks import rolling_sink
from transcribed_switching import infinity_rope, longlive

from rfjax import memory
from rfjax.config import preset_path, read_mapping
from rfjax.errors import UserError
from rfjax.memory import SINK, TAIL, footprint

ALL = ["longlive", "infinity_rope", "rolling_sink", "reward_forcing", "memrope"]
WHOLE = ALL[:3]


def holds(view, start, past, want):
    """The view is the (frame, position) pairs that are wanted, with the keys and values of those frames."""
    for sample in range(view.length.shape[0]):
        slots = slots_in_order(view, sample)
        assert [(frame, position) for _, frame, position in slots] == want, start
        for slot, frame, _ in slots:
            assert np.array_equal(view.keys[:, sample, slot], past[0][frame][:, sample])
            assert np.array_equal(view.values[:, sample, slot], past[1][frame][:, sample])


@pytest.mark.parametrize(("sink", "tail"), [(3, 6), (1, 4), (0, 3), (2, 0)])
def test_longlive(sink, tail):
    policy = memory.create("longlive", sink_frames=sink, tail_frames=tail)
    for start, view, past in roll(policy, 64):
        holds(view, start, past, longlive(start, 3, sink, sink + tail + 3))


@pytest.mark.parametrize(("sink", "tail"), [(1, 2), (3, 3)])
def test_infinity_rope(sink, tail):
    policy = memory.create("infinity_rope", sink_frames=sink, tail_frames=tail)
    for start, view, past in roll(policy, 64):
        holds(view, start, past, infinity_rope(start, 3, sink=sink, tail=tail))


@pytest.mark.parametrize(("sink", "chunks", "dtype"), [(15, 72, "float32"), (3, 64, "float32"), (6, 30, "bfloat16")])
def test_rolling_sink(sink, chunks, dtype):
    for start, view, past in roll(memory.create("rolling_sink", sink_frames=sink), chunks, dtype=jnp.dtype(dtype)):
        holds(view, start, past, rolling_sink(start, 3, sink))


@settings(max_examples=4, deadline=None)
@given(chunk=st.integers(1, 4), blocks=st.integers(1, 5))
def test_rolling_sink_any_sizes(chunk, blocks):
    shape = dataclasses.replace(SHAPE, layers=1, chunk_frames=chunk)
    for start, view, past in roll(memory.create("rolling_sink", sink_frames=blocks * chunk), 30, shape):
        holds(view, start, past, rolling_sink(start, chunk, blocks * chunk))


def test_rolling_sink_attends_a_frame_twice_at_the_turn():
    views = {start: view for start, view, _ in roll(memory.create("rolling_sink"), 15)}
    frames = [frame for _, frame, _ in slots_in_order(views[42], 0)]
    assert frames == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 1, 2, 39, 40, 41]


@pytest.mark.parametrize(
    ("name", "full", "second"),
    [
        ("longlive", [SINK] * 3 + [TAIL] * 6, [SINK] * 3),
        ("infinity_rope", [SINK, TAIL, TAIL], [SINK, TAIL, TAIL]),
        ("rolling_sink", [SINK] * 15 + [TAIL] * 3, [TAIL] * 3),
    ],
)
def test_roles(name, full, second):
    roles = [roles_in_order(view) for _, view, _ in roll(memory.create(name), 9)]
    assert (roles[0], roles[1], roles[-1]) == ([], second, full)


@pytest.mark.parametrize("name", ALL)
def test_samples_may_stand_at_different_chunks(name):
    """Each behaves as if it were alone, also where a video starts afresh beside another."""
    policy, fresh, rng = memory.create(name), 5, np.random.default_rng(1)
    state, lone = (policy.init(dataclasses.replace(SHAPE, batch=batch), 60, jnp.float32) for batch in (2, 1))
    for chunk in range(14):
        starts = jnp.asarray([3 * chunk, 3 * (chunk - fresh if chunk >= fresh else chunk)], jnp.int32)
        both = random_chunk(rng, starts)
        if chunk == fresh:
            state = dataclasses.replace(state, frames=state.frames.at[1].set(-1))
        if chunk >= fresh:
            together, alone = jax.device_get((read(policy, state, starts), read(policy, lone, starts[1:])))
            ours, others = slots_in_order(together, 1), slots_in_order(alone, 0)
            assert [row[1:] for row in ours] == [row[1:] for row in others]
            assert (len(ours) > 0) == (chunk > fresh)
            assert roles_in_order(together, 1) == roles_in_order(alone)
            for (slot, *_), (other, *_) in zip(ours, others, strict=True):
                np.testing.assert_array_equal(together.keys[:, 1, slot], alone.keys[:, 0, other])
                np.testing.assert_array_equal(together.values[:, 1, slot], alone.values[:, 0, other])
            second = jax.tree.map(lambda leaf: leaf[1:] if leaf.ndim == 2 else leaf[:, 1:], both)
            lone = commit(policy, lone, second)
        state = commit(policy, state, both)


@pytest.mark.parametrize("name", ALL)
def test_a_scan_commits_the_same(name):
    policy, rng = memory.create(name), np.random.default_rng(2)
    chunks = [random_chunk(rng, [3 * i] * 2) for i in range(9)]

    def whole(chunks):
        state = policy.init(SHAPE, 27, jnp.float32)
        return jax.lax.scan(lambda state, chunk: (policy.commit(state, chunk), None), state, chunks)[0]

    scanned = jax.jit(whole)(jax.tree.map(lambda *parts: jnp.stack(parts), *chunks))
    state = policy.init(SHAPE, 27, jnp.float32)
    for chunk in chunks:
        state = commit(policy, state, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, scanned)


@pytest.mark.parametrize(
    ("name", "large"),
    [
        *((name, {"tail_frames": 60}) for name in ("longlive", "infinity_rope", "reward_forcing")),
        ("memrope", {"tail_frames": 61}),
        ("rolling_sink", {"sink_frames": 60}),
    ],
)
def test_a_large_memory_is_updated_in_place(name, large):
    policy, shape = memory.create(name, **large), dataclasses.replace(SHAPE, rows=8, columns=8)
    state = jax.eval_shape(lambda: policy.init(shape, 60, jnp.float32))
    chunk = jax.eval_shape(lambda: random_chunk(np.random.default_rng(), [0, 0], shape))
    use = commit.lower(policy, state, chunk).compile().memory_analysis()
    assert use is not None
    assert use.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in (state.keys, state.values))
    assert use.temp_size_in_bytes < 0.1 * use.alias_size_in_bytes


@pytest.mark.parametrize("name", ALL)
def test_types_stay_where_jax_counts_in_64_bits(name):
    policy, chunk = memory.create(name), random_chunk(np.random.default_rng(), [0, 0])
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda: policy.init(SHAPE, 60, jnp.float32))
        after = jax.eval_shape(lambda state: policy.commit(policy.recache(state, chunk), chunk), state)
        view = jax.eval_shape(policy.read, state, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state, view))} == {"int32", "float32"}


@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize("name", WHOLE)
def test_recache_renews_the_given_frames(name, chunks):
    policy, rng, start = memory.create(name), np.random.default_rng(4), 3 * chunks
    state = policy.init(SHAPE, 60, jnp.float32)
    for i in range(chunks):
        state = commit(policy, state, random_chunk(rng, [3 * i] * 2))
    given = random_chunk(rng, [start - 9] * 2, dataclasses.replace(SHAPE, chunk_frames=9))
    # Frames before the video are none, and the second sample renews its last one alone.
    frames = np.where(np.asarray(given.frames) < [[0], [start - 1]], -1, given.frames)
    renewed = recache(policy, state, dataclasses.replace(given, frames=jnp.asarray(frames, jnp.int32)))
    before, after = (jax.device_get(read(policy, s, jnp.full(2, start, jnp.int32))) for s in (state, renewed))
    jax.tree.map(np.testing.assert_array_equal, before.trace, after.trace)
    seen = [0, 0]
    for sample in range(2):
        for slot, frame, _ in slots_in_order(after, sample):
            want_keys, want_values = before.keys[:, sample, slot], before.values[:, sample, slot]
            if frame in frames[sample]:
                i = list(frames[sample]).index(frame)
                want_keys, want_values = given.keys[:, sample, i], given.values[:, sample, i]
                seen[sample] += 1
            np.testing.assert_array_equal(after.keys[:, sample, slot], want_keys)
            np.testing.assert_array_equal(after.values[:, sample, slot], want_values)
    assert seen[0] >= 2
    assert seen[1] == 1


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("longlive", {"sink_frames": -1}, "longlive: sink_frames is -1; 0 or more is needed"),
        ("infinity_rope", {"tail_frames": -2}, "infinity_rope: tail_frames is -2; 0 or more is needed"),
        ("rolling_sink", {"sink_frames": 0}, "rolling_sink: sink_frames is 0; 1 or more is needed"),
        ("rolling_sink", {"sink_frames": 16}, "rolling_sink: sink_frames is 16; a multiple of the chunk's 3"),
        ("reward_forcing", {"tail_frames": 0}, "reward_forcing: tail_frames is 0; 1 or more is needed"),
        ("reward_forcing", {"tail_frames": 4}, "reward_forcing: tail_frames is 4; a multiple of the chunk's 3"),
        ("reward_forcing", {"rate": 1.5}, "reward_forcing: rate is 1.5; a number from 0 to 1 is needed"),
        ("memrope", {"sink_frames": -1}, "memrope: sink_frames is -1; 0 or more is needed"),
        ("memrope", {"tail_frames": 0}, "memrope: tail_frames is 0; 1 or more is needed"),
        ("memrope", {"long_rate": -0.1}, "memrope: long_rate is -0.1; a number from 0 to 1 is needed"),
        ("memrope", {"short_rate": 2}, "memrope: short_rate is 2.0; a number from 0 to 1 is needed"),
        ("memrope", {"tail_frames": 2}, "memrope: tail_frames is 2; at least the chunk's 3 are needed"),
        ("memrope", {"tail_frames": 5}, "tail_frames is 5; .* with sink_frames 3 and 2 averages a multiple of them"),
    ],
)
def test_mistakes_are_one_line(name, chosen, message):
    with pytest.raises(UserError, match=message) as error:
        memory.create(name, **chosen).init(SHAPE, 60, jnp.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "attended"), list(zip(ALL, [12, 6, 21, 9, 12], strict=True)))
def test_the_memory_does_not_grow_with_the_video(name, attended):
    policy = memory.create(name)
    assert footprint(policy, SHAPE, 21, "bfloat16").attended_frames == attended
    assert footprint(policy, SHAPE, 21, "bfloat16") == footprint(policy, SHAPE, 2100, "bfloat16")


@pytest.mark.parametrize(
    ("preset", "name", "changed"),
    [
        *((name, name, {}) for name in [*ALL, "self_forcing", "attention_sink", "relax_forcing"]),
        ("self_forcing_window", "self_forcing", {"window_frames": 21}),
        ("relax_forcing_true_positions", "relax_forcing", {"positions": "true"}),
    ],
)
def test_presets_state_every_setting(preset, name, changed):
    policy, content = memory.create(name, **changed), read_mapping(preset_path("policies", preset))
    assert content["policy"] == name
    assert content["settings"] == dataclasses.asdict(policy)  # pyright: ignore[reportArgumentType]
    assert memory.create(preset) == policy
