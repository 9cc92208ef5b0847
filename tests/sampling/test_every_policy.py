"""What every policy owes to the sampler, and every preset to the user."""

import gc
import resource

import jax
import numpy as np
import pytest
from conftest import compilations, golden

import rfjax
from rfjax import memory
from rfjax.config import preset_names, preset_path, read_mapping
from rfjax.io.plots import memory_timeline
from rfjax.sampling import rollout as module

POLICIES = sorted(memory.POLICIES)
PRESETS = preset_names("policies")
QUICK = ("relax_forcing",)
KEY = jax.random.key(11)


def context(batch=1):
    return np.asarray(golden("rollout_dense")["context"])[:batch]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_streaming(tiny_model, name, tmp_path):
    """27 chunks of two samples, with and without another prompt from chunk 24 on: one compilation of the step."""
    policy, shape = memory.create(name), (2, 81, 6, 8, 4)
    jax.clear_caches()
    streams = {}
    for recache in (None, True, False):
        switches = [] if recache is None else [rfjax.Switch(72, context(2)[::-1], recache=recache)]
        streams[recache] = list(rfjax.stream(tiny_model, policy, context(2), shape, key=KEY, switches=switches))
    assert compilations(module.step) <= 2  # a recache keeps the newest latents, which makes another shape of state

    chunks = streams[None]
    for recache in (True, False):
        pairs = [(one.latents, other.latents) for one, other in zip(streams[recache], chunks, strict=True)]
        for switched, plain in pairs[:24]:
            np.testing.assert_allclose(switched, plain, atol=2e-4)
        assert np.abs(pairs[24][0] - pairs[24][1]).max() > 1e-2
    assert np.abs(streams[True][24].latents - streams[False][24].latents).max() > 1e-3

    assert all(bool(chunk.finite.all()) for stream in streams.values() for chunk in stream)
    trace = jax.tree.map(lambda *leaves: np.stack(leaves), *(chunk.trace for chunk in chunks))
    starts = 3 * np.arange(27).reshape(-1, 1, 1, 1, 1)
    assert (trace.frames < np.maximum(starts, 1)).all()
    assert ((trace.frames >= 0) == (trace.roles > 0)).all()
    assert (trace.positions[trace.frames >= 0] < 0).all()
    memory_timeline(trace, 3, tmp_path / "timeline.png", name, sample=1)
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_whole_rollouts_are_the_streams_of_their_samples(tiny_model, name):
    """Scanned or streamed, alone or in a batch, a sample is the same."""
    policy, keys = memory.create(name), jax.random.split(KEY, 2)
    both = rfjax.rollout(tiny_model, policy, context(2), (2, 66, 6, 8, 4), key=keys)
    alone = list(rfjax.stream(tiny_model, policy, context(2)[1:], (1, 66, 6, 8, 4), key=keys[1:]))
    latents = np.concatenate([chunk.latents for chunk in alone], axis=1)
    np.testing.assert_allclose(both.latents[1], latents[0], atol=2e-4)
    frames = np.stack([chunk.trace.frames for chunk in alone])
    np.testing.assert_array_equal(both.trace.frames[:, 1], frames[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "self_forcing"] + ["self_forcing_window"])
def test_300_seconds_without_growth_of_memory(tiny_model, name):
    """400 chunks; what lives on the device and in the process after 100 is what lives after 400."""
    stream = rfjax.stream(tiny_model, memory.create(name), context(), (1, 1200, 6, 8, 4), key=KEY)
    held = {}
    for index, chunk in enumerate(stream):
        assert bool(chunk.finite.all())
        if index in (100, 399):
            del chunk
            gc.collect()
            device = sum(array.nbytes for array in jax.live_arrays())
            held[index] = device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert held[399][0] == held[100][0]
    assert held[399][1] - held[100][1] < 20e6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete(name):
    """A preset names every setting, and one with a policy's own name is that policy as it is by default."""
    content = read_mapping(preset_path("policies", name))
    policy = memory.create(name)
    assert content["description"]
    assert set(content["settings"]) == set(memory.POLICIES[content["policy"]].__dataclass_fields__)
    if name in memory.POLICIES:
        assert policy == memory.create(content["policy"])


def test_every_policy_has_a_preset():
    assert set(POLICIES) <= set(PRESETS)
