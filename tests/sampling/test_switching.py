"""Changes of prompt: LongLive's recache, carried out frame by frame, and Infinity-RoPE's cuts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compilations, golden
from transcribed_switching import infinity_rope, longlive_recache

import rfjax
from rfjax import memory
from rfjax.errors import UserError
from rfjax.models.functional import bind
from rfjax.models.transformer import AttendedMemory, WanTransformer
from rfjax.rope import rotate, rotation
from rfjax.sampling import rollout as module
from rfjax.sampling import switching

KEY = jax.random.key(2)


def context(sample=0):
    return np.asarray(golden("rollout_dense")["context"][sample : sample + 1])


def longlive():
    return memory.create("self_forcing", window_frames=12, sink_frames=3)


def follow(model, policy, frames):
    """Return the state before the chunk at `frames`, all latents and all clean keys and values so far [F, L, T, C]."""
    sizes = module.Sizes((1, 60, 6, 8, 4), 0, 3, 12)
    text, state = module.begin(model, policy, context(), sizes)
    latents, keys, values = [], [], []
    for chunk in range(frames // 3):
        noise = module.ChunkNoise(jax.random.split(KEY, 1), None, None)
        state, made = module.step(model.config, (6, 8), policy, model.transformer, text, state, noise)
        latents.append(made.latents)
        for frame in range(3 * chunk, 3 * chunk + 3):
            slot = int(np.flatnonzero(np.asarray(state.memory.frames[0]) == frame)[0])
            keys.append(np.asarray(state.memory.keys[:, 0, slot]))
            values.append(np.asarray(state.memory.values[:, 0, slot]))
    return state, np.concatenate(latents, axis=1), keys, values


@pytest.mark.parametrize("start", [12, *(pytest.param(start, marks=pytest.mark.slow) for start in (3, 15, 24))])
def test_recache_is_longlives(tiny_model, start):
    policy, config = longlive(), tiny_model.config.transformer
    state, latents, keys, values = follow(tiny_model, policy, start)
    rule = longlive_recache(start)
    assert rule is not None
    first = rule.rewritten[0]
    kept = np.asarray([rule.positions.get(f, f) - first for f, _ in rule.attended if f in rule.kept], int)
    heads = (config.num_heads, config.head_dim)
    turned = [
        rotate(jnp.asarray(keys[f]).reshape(-1, 1, 1, 12, *heads), *rotation(jnp.full((1, 1, 1), at), 3, 4, 32))
        for f, at in zip(rule.kept, kept, strict=True)
    ]
    older = None
    if turned:
        older = AttendedMemory(
            jnp.concatenate(turned, axis=2).reshape(len(keys[0]), 1, len(turned), 12, -1),
            jnp.stack([values[f] for f in rule.kept], axis=1)[:, None],
            jnp.asarray([len(turned)]),
        )
    network = bind(WanTransformer, config, tiny_model.transformer)
    text = network.embed_text(jnp.asarray(context(1)))
    given = jnp.asarray(latents[:, rule.rewritten])
    _, want = network(given, jnp.zeros(given.shape[:2]), text, older, return_projections=True)
    assert want is not None

    frames = switching.recached_frames(start, 3)
    assert frames == len(rule.rewritten)
    new_text, after = switching.switch_prompt(
        tiny_model.config, (6, 8), frames, False, policy, tiny_model.transformer, jnp.asarray(context(1)), state
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new_text, text)
    stored = np.asarray(after.memory.frames[0])
    assert sorted(f for f in stored if f >= 0) == sorted({*range(min(start, 3)), *range(max(start - 6, 0), start)})
    for slot, frame in enumerate(stored):
        if frame in rule.rewritten:
            i = rule.rewritten.index(frame)
            np.testing.assert_allclose(after.memory.keys[:, 0, slot], want.keys[:, 0, i], atol=2e-5)
            np.testing.assert_allclose(after.memory.values[:, 0, slot], want.values[:, 0, i], atol=2e-5)
            assert np.abs(after.memory.keys[:, 0, slot] - keys[frame]).max() > 1e-3
        elif frame >= 0:
            np.testing.assert_array_equal(after.memory.keys[:, 0, slot], keys[frame])


def run(model, policy, switches, frames=24, **named):
    return rfjax.rollout(model, policy, context(), (1, frames, 6, 8, 4), key=KEY, switches=switches, **named)


@pytest.mark.slow
@pytest.mark.parametrize("recache", [True, False])
def test_the_video_changes_from_the_switch_on(tiny_model, recache):
    policy = memory.create("relax_forcing")
    switch = rfjax.Switch(12, context(1), recache=recache)
    before, after = run(tiny_model, policy, ()).latents, run(tiny_model, policy, (switch,)).latents
    np.testing.assert_allclose(after[:, :12], before[:, :12], atol=1e-5)
    assert np.abs(after[:, 12:15] - before[:, 12:15]).max() > 0.01
    same = run(tiny_model, policy, (rfjax.Switch(12, context(), recache=False),)).latents
    np.testing.assert_allclose(same, before, atol=1e-5)


def test_a_recache_is_not_a_plain_switch(tiny_model):
    policy = memory.create("relax_forcing")
    with_it, without = (
        run(tiny_model, policy, (rfjax.Switch(12, context(1), recache=recache),)).latents for recache in (True, False)
    )
    assert np.abs(with_it[:, 12:15] - without[:, 12:15]).max() > 1e-3


def test_streaming_gives_the_same_numbers(tiny_model):
    policy = longlive()
    switches = (rfjax.Switch(9, context(1)), rfjax.Switch(18, context(), recache=False, cut=True))
    whole = run(tiny_model, policy, switches)
    chunks = list(rfjax.stream(tiny_model, policy, context(), (1, 24, 6, 8, 4), key=KEY, switches=switches))
    np.testing.assert_allclose(np.concatenate([c.latents for c in chunks], axis=1), whole.latents, atol=1e-5)
    np.testing.assert_array_equal(np.stack([c.trace.positions for c in chunks]), whole.trace.positions)


@pytest.mark.slow
def test_a_switch_in_a_continued_video(tiny_model):
    policy = longlive()
    switch = rfjax.Switch(18, context(1))
    whole = run(tiny_model, policy, (switch,))
    rest = run(tiny_model, policy, (switch,), frames=12, initial_latents=whole.latents[:, :12])
    np.testing.assert_allclose(rest.latents, whole.latents, atol=1e-5)


@pytest.mark.slow
def test_a_new_prompt_where_the_given_part_ends(tiny_model):
    whole = run(tiny_model, longlive(), ())
    switch = rfjax.Switch(12, context(1), recache=False)
    named = {"frames": 12, "initial_latents": whole.latents[:, :12]}
    rest = run(tiny_model, longlive(), [switch], **named)
    same = run(tiny_model, longlive(), (one for one in [switch]), **named)
    np.testing.assert_array_equal(rest.latents, same.latents)
    assert np.abs(rest.latents[:, 12:] - whole.latents[:, 12:]).max() > 1e-2
    chunks = rfjax.stream(
        tiny_model, longlive(), context(), (1, 12, 6, 8, 4), key=KEY, switches=[switch],
        initial_latents=whole.latents[:, :12],
    )  # fmt: skip
    streamed = np.concatenate([chunk.latents for chunk in chunks], axis=1)
    np.testing.assert_allclose(streamed, rest.latents[:, 12:], atol=1e-5)


def test_a_cut_places_one_chunk_far_away(tiny_model):
    policy = memory.create("attention_sink", sink_frames=1, tail_frames=2)
    trace = run(tiny_model, policy, (rfjax.Switch(12, context(1), recache=False, cut=True),)).trace
    for chunk in range(8):
        frames, at = (np.asarray(a)[chunk, 0, 0, :, 0] for a in (trace.frames, trace.positions))
        got = sorted((int(f), int(p)) for f, p in zip(frames, at, strict=True) if f >= 0)
        assert got == infinity_rope(3 * chunk, 3, switches=(12,), cuts=(12,))


def filled(model, policy, frames):
    """Return the state of a memory that has taken in random frames."""
    _, state = module.begin(model, policy, context(), module.Sizes((1, 60, 6, 8, 4), 0, 3, 12))
    rng = np.random.default_rng(0)
    for start in range(0, frames, 3):
        made = jnp.asarray(rng.normal(size=(3, 1, 3, 12, 64)), jnp.float32)
        indices = jnp.arange(start, start + 3)[None]
        committed = policy.commit(state.memory, memory.CleanChunk(indices, made, made, made))
        state = dataclasses.replace(state, memory=committed, start=state.start + 3)
    return state


@pytest.mark.slow
def test_closed_up_memories_stand_before_the_renewed_frames(tiny_model):
    """Sink and tail at contiguous positions: the pass over 9 frames attends to the sink directly before them."""
    policy = memory.create("attention_sink", sink_frames=2, tail_frames=4)
    state = filled(tiny_model, policy, 21)
    view = policy.read(state.memory, state.start)
    older = switching.older_memory(tiny_model.config, (6, 8), view, state.start - 9, 9)
    assert older.length.tolist() == [2]
    slots = [int(np.flatnonzero(np.asarray(view.trace.frames[0, 0, :, 0]) == frame)[0]) for frame in (0, 1)]
    for slot, at, sink in zip(range(2), (-2, -1), slots, strict=True):
        keys = view.keys[:, :, sink : sink + 1].reshape(3, 1, 1, 12, 2, 32)
        want = rotate(keys, *rotation(jnp.full((1, 1, 1), at), 3, 4, 32)).reshape(3, 1, 1, 12, 64)
        np.testing.assert_allclose(older.keys[:, :, slot : slot + 1], want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kept"), [("memrope", 5), ("reward_forcing", 3)])
def test_what_a_recache_does_not_renew_is_attended(tiny_model, name, kept):
    """Averages and blended sinks, however new what was folded into them last."""
    policy = memory.create(name)
    state = filled(tiny_model, policy, 30)
    older = switching.older_memory(
        tiny_model.config, (6, 8), policy.read(state.memory, state.start), state.start - 9, 9
    )
    assert older.length.tolist() == [kept]


def test_switches_compile_once_for_each_number_of_renewed_frames(tiny_model):
    jax.clear_caches()
    switches = [rfjax.Switch(start, context(start % 2)) for start in (15, 21, 24, 30)]
    list(rfjax.stream(tiny_model, longlive(), context(), (1, 33, 6, 8, 4), key=KEY, switches=switches))
    assert compilations(switching.switch_prompt) == 1


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ((7,), r"switches\[0\] starts at frame 7; a multiple of the chunk's 3"),
        ((0,), r"switches\[0\] starts at frame 0; a frame after 0 and before 24"),
        ((12, 9), r"switches\[1\] starts at frame 9; a frame after 12 and before 24"),
        ((24,), r"switches\[0\] starts at frame 24"),
    ],
)
def test_switches_out_of_order(tiny_model, starts, message):
    with pytest.raises(UserError, match=message):
        run(tiny_model, longlive(), [rfjax.Switch(start, context(1)) for start in starts])


def test_switches_of_the_wrong_kind(tiny_model):
    with pytest.raises(UserError, match=r"switches\[0\]: prompt_embeds is a str; an array"):
        run(tiny_model, longlive(), [_unchecked(12, "a fox")])
    with pytest.raises(UserError, match=r"switches\[0\] starts at frame 12.0; a whole number"):
        run(tiny_model, longlive(), [_unchecked(12.0, context(1))])


def _unchecked(start, embeds):
    """A Switch as it can be made where annotations are not checked."""
    switch = object.__new__(rfjax.Switch)
    for name, value in {"start": start, "prompt_embeds": embeds, "recache": True, "cut": False}.items():
        object.__setattr__(switch, name, value)
    return switch


def test_a_prompt_that_does_not_fit(tiny_model):
    with pytest.raises(UserError, match=r"switches\[0\]: prompt_embeds has 2 samples and noise 1"):
        run(tiny_model, longlive(), [rfjax.Switch(12, np.concatenate([context(0), context(1)]))])


@pytest.mark.slow
def test_given_latents_of_64_bits(tiny_model):
    given = np.random.default_rng(0).normal(size=(1, 3, 6, 8, 4))
    with jax.enable_x64(True):
        wide = run(tiny_model, longlive(), [rfjax.Switch(6, context(1))], frames=6, initial_latents=given).latents
    assert wide.dtype == jnp.float32
    assert np.isfinite(wide).all()
