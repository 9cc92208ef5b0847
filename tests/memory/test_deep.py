"""Deep Forcing, token by token, and its deep sink alone, against the slow transcription of their rules."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transcribed_deep
from conftest import compilations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_policies import attended, follow, holds_its_frames

from rfjax import memory
from rfjax.errors import UserError
from rfjax.memory import HISTORY, NONE, SINK, TAIL, CleanChunk, DeepForcing, DeepSinkOnly, MemoryShape

SHAPE = MemoryShape(layers=2, batch=2, heads=2, head_dim=10, rows=2, columns=2, chunk_frames=3)
PRESETS = Path(__file__).parents[2] / "configs" / "policies"


READ = jax.jit(lambda policy, state, start: policy.read(state, start))
COMMIT = jax.jit(lambda policy, state, chunk: policy.commit(state, chunk), donate_argnums=1)


class Side:
    """A policy and the transcription of each layer and sample, fed alike."""

    def __init__(self, policy, shape=SHAPE, seed=0, dtype=jnp.float32):
        self.policy, self.shape, self.dtype = policy, shape, dtype
        self.rng = np.random.default_rng(seed)
        self.state = policy.init(shape, 0, dtype)
        self.slow = [[self.fresh() for _ in range(shape.batch)] for _ in range(shape.layers)]

    def fresh(self):
        shape, policy = self.shape, self.policy
        sizes = (policy.buffer_frames, policy.sink_frames, policy.budget_frames, policy.recent_frames)
        grid = (shape.rows, shape.columns)
        return transcribed_deep.DeepForcing(shape.heads, grid, shape.chunk_frames, *sizes, policy.max_selections)

    def draw(self, frames):
        """Random queries, keys and values, rounded as the store rounds them."""
        shape = self.shape
        size = (3, shape.layers, shape.batch, frames, shape.frame_tokens, shape.heads * shape.head_dim)
        return jnp.asarray(self.rng.normal(size=size), self.dtype)

    def compare(self, starts):
        """Whatever the chunks at `starts` attend to; returns the view."""
        view = jax.tree.map(np.asarray, READ(self.policy, self.state, jnp.asarray(starts, jnp.int32)))
        for sample, start in enumerate(starts):
            for layer, slow in enumerate(row[sample] for row in self.slow):
                if slow.begun < start:
                    slow.begin(start, None)
                self._compare_one(view, layer, sample, slow.attended(start))
        return view

    def _compare_one(self, view, layer, sample, want):
        slots = int(view.length[sample])
        trace = jax.tree.map(lambda leaf: leaf[sample, layer], view.trace)
        got = [entries[:slots].ravel() for entries in (trace.frames, view.places[layer, sample], trace.positions)]
        assert np.transpose(got).tolist() == [[one.frame, one.place, one.position] for one in want]
        np.testing.assert_array_equal(trace.positions, view.positions[layer, sample])
        for stored, field in ((view.keys, "key"), (view.values, "value")):
            rows = stored[layer, sample, :slots].astype(np.float64).ravel()
            np.testing.assert_array_equal(rows, np.ravel([getattr(one, field) for one in want]))
        assert (trace.frames[slots:] == -1).all()
        assert (trace.roles[slots:] == NONE).all()

    def take(self, starts, made=None):
        """Commit a chunk of each sample: `made`, or random queries, keys and values."""
        made = self.draw(self.shape.chunk_frames) if made is None else made
        frames = jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(self.shape.chunk_frames, dtype=jnp.int32)
        self.state = COMMIT(self.policy, self.state, CleanChunk(frames, *made))
        made = np.asarray(made, np.float64)
        for layer, row in enumerate(self.slow):
            for sample, slow in enumerate(row):
                slow.commit(starts[sample], *made[:, layer, sample])

    def run(self, chunks):
        """Follow a video of so many chunks; return all views."""
        views = []
        for chunk in range(chunks):
            starts = [chunk * self.shape.chunk_frames] * self.shape.batch
            views.append(self.compare(starts))
            self.take(starts)
        return views


def sizes(buffer, budget, sink, recent, limit=7):
    names = ("buffer_frames", "budget_frames", "sink_frames", "recent_frames", "max_selections")
    return dict(zip(names, (buffer, budget, sink, recent, limit), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_selections": 1},
        {"sink_frames": 5, "max_selections": 0},  # refused with a limit
        sizes(12, 9, 2, 5, 2),
        sizes(9, 9, 3, 3, 0),  # compresses before every chunk, and keeps no whole frame
        sizes(12, 8, 1, 6),  # keeps all of the newest chunk
        sizes(21, 14, 10, 4),  # selects nothing
        sizes(12, 5, 0, 4, 1),  # has no sink
    ],
)
def test_long_rollout(settings):
    before = compilations(READ), compilations(COMMIT)
    Side(memory.create("deep_forcing", **settings)).run(66 if not settings else 20)
    assert compilations(READ) <= before[0] + 1
    assert compilations(COMMIT) <= before[1] + 1


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_sizes(data):
    draw = data.draw
    chunk = draw(st.integers(1, 4))
    recent, sink, selected = draw(st.integers(chunk, 2 * chunk)), draw(st.integers(0, 5)), draw(st.integers(0, 4))
    budget = sink + selected + recent
    buffer = chunk * draw(st.integers(max(-(-budget // chunk), 2), -(-budget // chunk) + 3))
    limit = draw(st.integers(0, 3)) if selected <= chunk * ((buffer - budget) // chunk + 1) else 0
    shape = MemoryShape(layers=1, batch=1, heads=2, head_dim=8, rows=2, columns=3, chunk_frames=chunk)
    policy = memory.create("deep_forcing", **sizes(buffer, budget, sink, recent, limit))
    Side(policy, shape, draw(st.integers(0, 9))).run(16)


def test_schedule_positions_and_roles():
    """The figures of the public code, written out: 16 and 19 frames with the own chunk, the sink at -16 and at -19."""
    views = Side(memory.create("deep_forcing")).run(14)
    for chunk, view in enumerate(views):
        start = 3 * chunk
        compressed = start in (21, 27, 33, 39)
        grown = start in (24, 30, 36)
        stored = 13 if compressed else 16 if grown else start
        assert view.length.tolist() == [stored, stored]
        sink = view.positions[:, :, :10]
        if compressed or grown:
            first = -16 if compressed else -19
            assert (sink == np.arange(first, first + 10)[:, None]).all()
            want = [SINK] * 10 + [HISTORY] * 2 + [TAIL] * (stored - 12)
        else:
            want = [SINK] * min(start, 10) + [TAIL] * max(start - 10, 0)
        want = np.reshape([*want, *[NONE] * (18 - stored)], (18, 1))
        assert (view.trace.roles == want).all()
        assert (view.trace.positions[:, :, stored - 1] == -1).all() or start == 0


def test_samples_and_layers_choose_for_themselves():
    view = Side(memory.create("deep_forcing")).run(12)[-1]
    chosen = [sorted(zip(*rows, strict=True)) for rows in _chosen(view)]
    assert len({tuple(one) for one in chosen}) == 4


def _chosen(view):
    """Frames and places of the selected tokens, of every layer and sample."""
    for layer, sample in np.ndindex(*view.keys.shape[:2]):
        history = view.trace.roles[sample, layer] == HISTORY
        yield view.trace.frames[sample, layer][history].tolist(), view.places[layer, sample][history].tolist()


@pytest.mark.parametrize(("limit", "until"), [(7, 60), (2, 30), (0, 66)])
def test_a_token_is_dropped_once_it_was_selected_often(limit, until):
    """Frame 10's keys score best wherever they stand: only their row channels, all of row 0, are not 0."""
    shape = dataclasses.replace(SHAPE, rows=1)
    side = Side(memory.create("deep_forcing", max_selections=limit), shape)
    row_channels = np.tile([0] * 6 + [1, 0, 0, 0], 2)
    seen = []
    for start in range(0, 69, 3):
        view = side.compare([start, start])
        if (view.trace.frames == 10).any():
            seen.append(start)
        made = np.zeros((3, *side.draw(3).shape[1:]))
        made[0] = row_channels
        for i in range(3):
            made[1, :, :, i] = row_channels * (100 if start + i == 10 else -1)
        side.take([start, start], jnp.asarray(made, jnp.float32))
    assert seen == list(range(12, until + 3, 3))


@pytest.mark.parametrize("key", [0.0, 1.0])
def test_of_equal_tokens_the_older_is_kept(key):
    """Without queries all scores are 0, and with keys of 0 as well."""
    side = Side(memory.create("deep_forcing"))
    for start in range(0, 21, 3):
        side.compare([start, start])
        made = side.draw(3)
        side.take([start, start], jnp.stack([made[0] * (1 - key), jnp.full_like(made[1], key), made[2]]))
    for frames, places in _chosen(side.compare([21, 21])):
        assert frames == [10] * 4 + [11] * 4
        assert places == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("late", [1, 2, 9])
def test_samples_at_different_chunks(late):
    """The second sample's video ends after `late` chunks, and another one starts in its place."""
    side = Side(memory.create("deep_forcing"))
    for chunk in range(18):
        if chunk == late:
            for row in side.slow:
                row[1] = side.fresh()
        starts = [3 * chunk, 3 * (chunk - late if chunk >= late else chunk)]
        side.compare(starts)
        side.take(starts)


def test_far_into_a_video():
    """Only differences of time enter, and they do not lose digits: a day later the same tokens are chosen."""
    side, day = Side(memory.create("deep_forcing")), 6 * 57_600
    side.run(9)
    made = [side.draw(3) for _ in range(8)]

    def run(shift):
        state = jax.tree.map(jnp.copy, side.state)
        moved = dataclasses.replace(state.selected, frames=state.selected.frames + shift)
        state = dataclasses.replace(state, start=state.start + shift, selected=moved)
        for chunk, new in enumerate(made, 9):
            frames = shift + 3 * chunk + jnp.tile(jnp.arange(3, dtype=jnp.int32), (2, 1))
            state = COMMIT(side.policy, state, CleanChunk(frames, *new))
        return READ(side.policy, state, jnp.full(2, shift + 51, jnp.int32))

    now, later = run(0), run(day)
    np.testing.assert_array_equal(now.keys, later.keys)
    np.testing.assert_array_equal(now.positions[:, :, :13], later.positions[:, :, :13])
    np.testing.assert_array_equal(now.trace.frames[:, :, 10:13] + day, later.trace.frames[:, :, 10:13])


@pytest.mark.parametrize(
    ("settings", "start"),
    [({}, 6), ({}, 21), ({}, 24), ({}, 27), (sizes(21, 14, 10, 4), 27), (sizes(9, 9, 3, 3, 0), 12)],
)
def test_recache(settings, start):
    """What of the given frames is stored is renewed, token by token, and so are the queries of the next choice."""
    side = Side(memory.create("deep_forcing", **settings))
    side.run(start // 3)
    side.compare([start, start])  # what the last commit selected stays selected
    frames = [-1, 0, 2, *range(max(start - 9, 3), start)]
    made = side.draw(len(frames))
    given = CleanChunk(jnp.tile(jnp.asarray(frames, jnp.int32), (2, 1)), *made)
    side.state = jax.jit(side.policy.recache, donate_argnums=0)(side.state, given)
    made = np.asarray(made, np.float64)
    changed = set()
    for layer, sample in np.ndindex(2, 2):
        slow, (queries, keys, values) = side.slow[layer][sample], made[:, layer, sample]
        for token in slow.memory:
            if token.frame in frames:
                at = frames.index(token.frame), token.place
                token.key, token.value = keys[at], values[at]
                changed.add(token.frame)
        slow.clean_queries |= {frame: queries[i] for i, frame in enumerate(frames) if frame in slow.clean_queries}
    assert {0, 2, start - 1} <= changed
    for chunk in range(start // 3, start // 3 + 8):
        side.compare([3 * chunk] * 2)
        side.take([3 * chunk] * 2)


def test_bfloat16_store():
    side = Side(memory.create("deep_forcing"), dtype=jnp.bfloat16)
    view = side.run(20)[-1]
    assert view.keys.dtype == view.values.dtype == jnp.bfloat16
    assert side.state.queries.dtype == jnp.float32


def test_scanned_and_in_64_bit_mode():
    """A loop needs a state that keeps its types, and gives what single calls give."""
    side = Side(memory.create("deep_forcing"))
    made = jnp.stack([side.draw(3) for _ in range(20)])

    def step(state, scanned):
        start, new = scanned
        view = side.policy.read(state, start)
        frames = start[:, None] + jnp.arange(3, dtype=jnp.int32)
        return side.policy.commit(state, CleanChunk(frames, *new)), view.trace

    starts = np.tile(np.arange(0, 60, 3, dtype=np.int32)[:, None], (1, 2))
    _, trace = jax.jit(lambda state: jax.lax.scan(step, state, (jnp.asarray(starts), made)))(side.state)
    with jax.enable_x64(True):
        state, wide = jax.jit(lambda state: jax.lax.scan(step, state, (jnp.asarray(starts), made)))(side.state)
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves((state, wide))}
    assert kinds == {"int32", "float32"}
    np.testing.assert_array_equal(trace.frames, wide.frames)
    for chunk, start in enumerate(starts):
        view = side.compare(start.tolist())
        np.testing.assert_array_equal(trace.frames[chunk], view.trace.frames)
        np.testing.assert_array_equal(trace.positions[chunk], view.trace.positions)
        side.take(start.tolist(), made[chunk])


def test_the_store_is_updated_in_place():
    """Beside the donated store a commit needs less than the candidates' keys, and no copy of the store."""
    shape = MemoryShape(layers=8, batch=1, heads=12, head_dim=64, rows=6, columns=10, chunk_frames=3)
    policy = memory.create("deep_forcing")
    state = jax.eval_shape(lambda: policy.init(shape, 0, jnp.float32))
    made = jax.ShapeDtypeStruct((8, 1, 3, 60, 768), jnp.float32)
    chunk = jax.eval_shape(
        lambda x: CleanChunk(jnp.zeros((1, 3), jnp.int32), x, x, x), jax.ShapeDtypeStruct(made.shape, made.dtype)
    )
    memory_use = jax.jit(policy.commit, donate_argnums=0).lower(state, chunk).compile().memory_analysis()
    assert memory_use is not None
    store = 2 * state.keys.size * 4
    assert memory_use.alias_size_in_bytes >= store
    assert memory_use.temp_size_in_bytes < store / 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_frames": -1}, "deep_forcing: sink_frames is -1; 0 or more is needed"),
        ({"recent_frames": 0}, "deep_forcing: recent_frames is 0; 1 or more is needed"),
        ({"max_selections": -1}, "deep_forcing: max_selections is -1; 0 or more is needed"),
        ({"sink_frames": 13}, "budget_frames is 16; sink_frames 13 and recent_frames 4 need at least 17"),
        ({"buffer_frames": 15}, "buffer_frames is 15; budget_frames 16 need at least as many"),
        ({"buffer_frames": 22}, "buffer_frames is 22; a multiple of 3 (the frames of a chunk), at least 6"),
        (sizes(3, 3, 0, 3), "buffer_frames is 3; a multiple of 3 (the frames of a chunk), at least 6"),
        ({"recent_frames": 2}, "recent_frames is 2; 3 (the frames of a chunk) to 6 are possible"),
        ({"recent_frames": 7, "sink_frames": 9}, "recent_frames is 7; 3 (the frames of a chunk) to 6 are possible"),
        ({"sink_frames": 5}, "these are 7 frames of selected tokens, and at most 6 (the new frames at each"),
    ],
)
def test_sizes_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        memory.create("deep_forcing", **settings).init(SHAPE, 60, jnp.float32)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("buffer", "sink"), [(21, 10), (21, 18), (12, 0), (6, 2)])
def test_deep_sink_only(buffer, sink):
    policy = memory.create("deep_sink_only", buffer_frames=buffer, sink_frames=sink)
    for start, view, history in follow(policy, 16):
        holds_its_frames(view, history)
        want = transcribed_deep.deep_sink_only(start, 3, buffer, sink)
        for sample in range(2):
            assert attended(view, sample) == sorted(want)
        frames, roles = np.asarray(view.trace.frames), np.asarray(view.trace.roles)
        assert (roles == np.where(frames < 0, NONE, np.where(frames < sink, SINK, TAIL))).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_frames": -1}, "deep_sink_only: sink_frames is -1; 0 or more is needed"),
        ({"sink_frames": 19}, "buffer_frames is 21; sink_frames 19 and the chunk's 3 need at least 22"),
        ({"buffer_frames": 20}, "deep_sink_only: buffer_frames is 20; a multiple of 3"),
    ],
)
def test_deep_sink_only_refuses(settings, message):
    with pytest.raises(UserError) as error:
        memory.create("deep_sink_only", **settings).init(SHAPE, 60, jnp.float32)
    assert message in str(error.value)


@pytest.mark.parametrize("policy", [DeepForcing(), DeepSinkOnly()])
def test_presets_are_the_defaults(policy):
    assert memory.create(str(PRESETS / f"{policy.name}.yaml")) == policy
