"""Slow-Fast memory against its slow transcription: every layer and sample, over long videos."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transcribed_slow_fast import SlowFast

from rfjax import memory
from rfjax.config import read_mapping
from rfjax.errors import UserError
from rfjax.memory import HISTORY, NONE, SINK, TAIL, CleanChunk, ContextForcing, MemoryShape

PRESETS = Path(__file__).parents[2] / "configs" / "policies"
SHAPE = MemoryShape(layers=3, batch=2, heads=2, head_dim=6, rows=1, columns=2, chunk_frames=3)

READ = jax.jit(lambda policy, state, start: policy.read(state, jnp.asarray(start, jnp.int32)))
COMMIT = jax.jit(lambda policy, state, chunk: policy.commit(state, chunk))


def video(chunks, shape=SHAPE, seed=0):
    """Keys and values [chunks, L, B, n, T, C] whose mean turns slowly, and now and then at once, layer by layer."""
    rng = np.random.default_rng(seed)
    kv = (shape.layers, shape.batch, shape.chunk_frames, shape.frame_tokens, shape.heads * shape.head_dim)
    direction, keys = rng.normal(size=(*kv[:2], 1, 1, kv[-1])), []
    for _ in range(chunks):
        turn = np.where(rng.random((*kv[:2], 1, 1, 1)) < 0.6, 1.0, 0.05)
        direction = direction / np.linalg.norm(direction, axis=-1, keepdims=True) * kv[-1] ** 0.5
        direction = direction + turn * rng.normal(size=direction.shape)
        keys.append(direction + 0.05 * rng.normal(size=kv))
    return np.stack(keys).astype(np.float32), rng.normal(size=(chunks, *kv)).astype(np.float32)


def clean(start, keys, values):
    """A chunk of the clean pass; `start` [B]."""
    frames = jnp.asarray(start, jnp.int32)[:, None] + jnp.arange(keys.shape[2], dtype=jnp.int32)
    keys, values = jnp.asarray(keys), jnp.asarray(values)
    return CleanChunk(frames, keys, keys, values)


def transcriptions(policy, shape):
    """One transcription for each layer and sample."""
    rule = {
        "chunk": shape.chunk_frames,
        "sink": policy.sink_frames,
        "slow": policy.slow_frames,
        "fast": policy.fast_frames,
        "threshold": policy.threshold,
        "every": policy.every_chunks,
        "uniform": policy.consolidate == "uniform",
        "bounded": policy.positions == "bounded",
    }
    return {at: SlowFast(**rule) for at in np.ndindex(shape.layers, shape.batch)}


def check_view(view, models, start):
    """Every layer and sample attends to the transcription's entries, with their keys and values."""
    view = jax.tree.map(np.asarray, view)
    for (layer, sample), model in models.items():
        want = sorted(model.attended(start), key=lambda entry: (entry.position, entry.frame))
        frames, positions = view.trace.frames[sample, layer, :, 0], view.positions[layer, sample, :, 0]
        assert view.length[sample] == len(want)
        assert (frames[len(want) :] == -1).all()
        np.testing.assert_array_equal(view.trace.positions[sample, layer, :, 0], positions)
        slots = np.lexsort((frames[: len(want)], positions[: len(want)]))
        assert [(frames[i], positions[i]) for i in slots] == [(entry.frame, entry.position) for entry in want]
        if want:
            np.testing.assert_array_equal(view.keys[layer, sample, slots], [entry.key for entry in want])
            np.testing.assert_array_equal(view.values[layer, sample, slots], [entry.value for entry in want])


def check_trace(view, models, start, policy, shape):
    """Roles by place, selected frames in time order, and the last chunk's cosine."""
    trace, last = jax.tree.map(np.asarray, view.trace), start - shape.chunk_frames
    slow_first, past = policy.sink_frames, policy.fast_frames - shape.chunk_frames
    for (layer, sample), model in models.items():
        length = int(view.length[sample])
        roles = np.full(trace.roles.shape[2], NONE)
        roles[:length], roles[max(length - past, 0) : length] = HISTORY, TAIL
        roles[: min(slow_first, length)] = SINK
        np.testing.assert_array_equal(trace.roles[sample, layer, :, 0], roles)
        selected = trace.selected_frames[sample, layer]
        assert selected[selected >= 0].tolist() == model.consolidated[-policy.slow_frames :]
        assert (selected[len(model.consolidated) :] == -1).all()
        if last in model.cosines and last // shape.chunk_frames % policy.every_chunks == 0:
            assert trace.candidates[sample, layer].tolist() == [last]
            np.testing.assert_allclose(trace.scores[sample, layer], model.cosines[last], atol=1e-5)
        else:
            assert trace.candidates[sample, layer].tolist() == [-1]
            assert np.isnan(trace.scores[sample, layer]).all()


def check(policy, chunks, shape=SHAPE, seed=0):
    """Follow a video; return the transcriptions."""
    programs = compilations(READ), compilations(COMMIT)
    state, models = policy.init(shape, chunks * shape.chunk_frames, jnp.float32), transcriptions(policy, shape)
    for chunk, (keys, values) in enumerate(zip(*video(chunks, shape, seed), strict=True)):
        start = chunk * shape.chunk_frames
        starts = np.full(shape.batch, start, np.int32)
        view = READ(policy, state, starts)
        check_view(view, models, start)
        check_trace(view, models, start, policy, shape)
        for at, model in models.items():
            model.commit(start, keys[at], values[at])
            cosine = model.cosines.get(start, np.nan)
            assert not abs(cosine - policy.threshold) < 1e-5, "too close to call: take another seed"
        state = COMMIT(policy, state, clean(starts, keys, values))
    assert compilations(READ) <= programs[0] + 1
    assert compilations(COMMIT) <= programs[1] + 1
    return models


@pytest.mark.parametrize(
    "name", ["context_forcing", "context_forcing_two_chunks", "context_forcing_uniform", "context_forcing_unbounded"]
)
def test_presets_over_a_long_video(name):
    preset = read_mapping(PRESETS / f"{name}.yaml")
    assert preset.keys() == {"description", "policy", "settings"}
    policy = memory.create(preset["policy"], **preset["settings"])
    assert isinstance(policy, ContextForcing)
    assert preset["settings"].keys() == {field.name for field in dataclasses.fields(policy)}
    consolidated = [tuple(model.consolidated) for model in check(policy, 80).values()]
    assert min(map(len, consolidated)) > policy.slow_frames, "Slow never forgets in this test"
    if policy.consolidate == "surprise":
        assert len(set(consolidated)) == len(consolidated), "layers and samples decide alike"


def test_the_defaults_are_the_plain_preset():
    assert ContextForcing(**read_mapping(PRESETS / "context_forcing.yaml")["settings"]) == ContextForcing()


@pytest.mark.parametrize(
    ("sink", "slow", "fast", "chunk"),
    [(3, 3, 6, 3), (0, 5, 4, 3), (5, 1, 6, 3), (2, 2, 8, 3), (3, 2, 4, 1), (4, 1, 5, 2), (3, 4, 5, 4)],
)
def test_other_sizes(sink, slow, fast, chunk):
    """Slow that is full before all slots are; Fast shorter than two chunks, longer, and no multiple of the chunk."""
    shape = dataclasses.replace(SHAPE, layers=2, chunk_frames=chunk)
    check(ContextForcing(sink_frames=sink, slow_frames=slow, fast_frames=fast), 24, shape)


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_settings(data):
    draw = data.draw
    chunk = draw(st.integers(1, 4))
    fast = draw(st.integers(chunk + 1, 3 * chunk + 1))
    sink = draw(st.integers(0, fast))
    slow = draw(st.integers(1, 8))
    policy = ContextForcing(
        sink_frames=sink,
        slow_frames=slow + -(sink + slow + fast) % chunk,
        fast_frames=fast,
        threshold=draw(st.floats(0.5, 0.99)),
        consolidate=draw(st.sampled_from(["surprise", "uniform"])),
        every_chunks=draw(st.integers(1, 3)),
        positions=draw(st.sampled_from(["bounded", "true"])),
    )
    check(policy, 24, dataclasses.replace(SHAPE, layers=2, chunk_frames=chunk), seed=draw(st.integers(0, 9)))


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_nothing_or_everything_surprises(threshold):
    """Other thresholds run the program that the defaults run."""
    check(ContextForcing(), 1)
    programs = compilations(READ), compilations(COMMIT)
    for model in check(ContextForcing(threshold=threshold), 30).values():
        assert model.consolidated == ([] if threshold < 0 else list(range(6, 90, 3)))
    assert (compilations(READ), compilations(COMMIT)) == programs


@pytest.mark.parametrize(("size", "cosine"), [(1.0, -1.0), (0.0, 0.0)])
def test_a_cosine_that_equals_the_threshold_is_no_surprise(size, cosine):
    """Keys that turn round at every chunk, and keys of zero, which have no direction."""
    policy, ones = ContextForcing(threshold=cosine), np.ones((3, 2, 3, 2, 12), np.float32)
    state = policy.init(SHAPE, 60, jnp.float32)
    for chunk in range(4):
        state = COMMIT(policy, state, clean(np.full(2, 3 * chunk), size * (-1) ** chunk * ones, ones))
    trace = READ(policy, state, np.full(2, 12)).trace
    assert (trace.candidates == 9).all()
    np.testing.assert_allclose(trace.scores, cosine, atol=1e-6)
    assert size or (trace.scores == 0).all()
    assert size or (trace.selected_frames == -1).all()


def test_samples_may_stand_at_different_chunks():
    """Each sample of a batch, also one whose slot is taken by a new video, has the memory that it has alone."""
    policy = ContextForcing()
    keys, values = video(40)
    alone = transcriptions(policy, SHAPE)
    state = policy.init(SHAPE, 200, jnp.float32)
    for chunk in range(40):
        starts = np.asarray([3 * chunk, 3 * (chunk - 17 if chunk >= 17 else chunk)])
        if chunk == 17:
            alone |= {at: new for at, new in transcriptions(policy, SHAPE).items() if at[1] == 1}
        view = READ(policy, state, starts)
        for sample, start in enumerate(starts.tolist()):
            check_view(view, {at: model for at, model in alone.items() if at[1] == sample}, start)
        if starts[1] == 0:
            assert (view.trace.selected_frames[1] == -1).all()
            assert (view.trace.candidates[1] == -1).all()
        for at, model in alone.items():
            model.commit(int(starts[at[1]]), keys[chunk][at], values[chunk][at])
        state = COMMIT(policy, state, clean(starts, keys[chunk], values[chunk]))


def test_recache_renews_both_slots_of_a_frame():
    """Some given frames are stored once, some twice, some not at all, and some places are empty."""
    policy, recache, twice = ContextForcing(threshold=1.0), jax.jit(lambda policy, *given: policy.recache(*given)), 0
    keys, values = video(31)
    state = policy.init(SHAPE, 200, jnp.float32)
    for chunks in range(1, 31):
        state = COMMIT(policy, state, clean(np.full(2, 3 * chunks - 3), keys[chunks - 1], values[chunks - 1]))
        given = np.asarray([[0, 3 * chunks - 3, 12], [9, -1, 3 * chunks - 1]], np.int32)
        new = dataclasses.replace(clean(np.zeros(2), keys[chunks], values[chunks]), frames=jnp.asarray(given))
        renewed = recache(policy, state, new)
        want_keys, want_values, frames = np.array(state.keys), np.array(state.values), np.asarray(state.frames)
        for sample, i in np.ndindex(*given.shape):
            for layer in range(SHAPE.layers) if given[sample, i] >= 0 else ():
                slots = np.flatnonzero(frames[layer, sample] == given[sample, i])
                want_keys[layer, sample, slots] = new.keys[layer, sample, i]
                want_values[layer, sample, slots] = new.values[layer, sample, i]
                twice += len(slots) == 2
        np.testing.assert_array_equal(renewed.keys, want_keys)
        np.testing.assert_array_equal(renewed.values, want_values)
        np.testing.assert_allclose(renewed.feature, new.keys.mean(axis=(2, 3)), atol=1e-6)
        for name in ("frames", "slow", "candidate", "similarity"):
            np.testing.assert_array_equal(getattr(renewed, name), getattr(state, name))
    assert twice > 10
    assert compilations(recache) == 1


def test_frames_are_twice_where_the_public_code_has_them_twice():
    """At s = 21 all from frame 6 on was consolidated: 18 is in Slow and Fast; 9 and 12 still have their first slots."""
    policy = ContextForcing(threshold=1.0)
    keys, values = video(7)
    state = policy.init(SHAPE, 60, jnp.float32)
    for chunk in range(7):
        state = COMMIT(policy, state, clean(np.full(2, 3 * chunk), keys[chunk], values[chunk]))
    view = READ(policy, state, np.full(2, 21))
    frames = [0, 1, 2, 6, 9, 12, 15, 18, 8, 9, 10, 11, 12, 13, 14, 18, 19, 20]
    assert view.trace.frames[0, 0, :, 0].tolist() == frames
    assert view.positions[0, 0, :, 0].tolist() == list(range(-18, 0))


def test_the_donated_state_is_updated_in_place():
    """Scratch is less than two frames' keys and values."""
    shape = MemoryShape(layers=3, batch=2, heads=2, head_dim=64, rows=8, columns=8, chunk_frames=3)
    policy, kv = ContextForcing(), jnp.zeros((3, 2, 3, 64, 128))
    state = policy.init(shape, 60, jnp.float32)
    plan = jax.jit(policy.commit, donate_argnums=0).lower(state, clean(np.zeros(2), kv, kv)).compile().memory_analysis()
    assert plan is not None
    assert plan.alias_size_in_bytes >= 2 * state.keys.nbytes
    assert plan.temp_size_in_bytes < 2 * 2 * state.keys.nbytes / 18


def test_bfloat16_frames_are_kept_as_they_are():
    policy = ContextForcing()
    keys, values = (jnp.asarray(x, jnp.bfloat16) for x in video(12))
    state = policy.init(SHAPE, 60, jnp.bfloat16)
    for chunk in range(12):
        state = COMMIT(policy, state, clean(np.full(2, 3 * chunk), keys[chunk], values[chunk]))
    view = READ(policy, state, np.full(2, 36))
    assert view.keys.dtype == view.values.dtype == jnp.bfloat16
    keys, values = np.asarray(keys), np.asarray(values)
    for layer, sample in np.ndindex(*state.frames.shape[:2]):
        frames = np.asarray(view.trace.frames[sample, layer, :, 0])
        np.testing.assert_array_equal(view.keys[layer, sample], keys[frames // 3, layer, sample, frames % 3])
        np.testing.assert_array_equal(view.values[layer, sample], values[frames // 3, layer, sample, frames % 3])


def test_types_hold_where_jax_counts_in_64_bits():
    policy = ContextForcing()
    kv = jax.ShapeDtypeStruct((3, 2, 3, 2, 12), jnp.float32)
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda: policy.init(SHAPE, 60, jnp.float32))
        frames = jax.ShapeDtypeStruct((2, 3), jnp.int32)
        after = jax.eval_shape(lambda s, f, k: policy.commit(s, CleanChunk(f, k, k, k)), state, frames, kv)
        view = jax.eval_shape(policy.read, state, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert {leaf.dtype for leaf in jax.tree.leaves((state, view))} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sink_frames": -1}, "context_forcing: sink_frames is -1; 0 or more is needed"),
        ({"slow_frames": 0}, "context_forcing: slow_frames is 0; 1 or more is needed"),
        ({"every_chunks": 0}, "context_forcing: every_chunks is 0; 1 or more is needed"),
        ({"sink_frames": 7}, "context_forcing: sink_frames is 7; at most fast_frames 6 are possible"),
        ({"threshold": 95.0}, "context_forcing: threshold is 95.0; a cosine from -1 to 1 is needed"),
        ({"consolidate": "always"}, "consolidate is 'always'; it must be one of 'surprise', 'uniform'"),
        ({"fast_frames": 3}, "context_forcing: fast_frames is 3; more than the chunk's 3 are needed"),
        ({"slow_frames": 11}, "slow_frames 11 and fast_frames 6 are 20; a multiple of the chunk's 3 is needed"),
    ],
)
def test_mistakes_are_one_line(wrong, message):
    with pytest.raises(UserError, match=message) as raised:
        memory.create("context_forcing", **wrong).init(SHAPE, 60, jnp.float32)
    assert "\n" not in str(raised.value)
