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
KEY = jax.random.key(11)


def context(batch=1):
    return np.asarray(golden("rollout_dense")["context"])[:batch]


@pytest.mark.parametrize("name", POLICIES)
def test_streamed_and_scanned_videos_are_the_same(tiny_model, name, tmp_path):
    """27 chunks of two samples: one compilation, one trace of fixed shape, and a timeline that can be drawn."""
    policy = memory.create(name)
    jax.clear_caches()
    shape = (2, 81, 6, 8, 4)
    chunks = list(rfjax.stream(tiny_model, policy, context(2), shape, key=KEY))
    assert compilations(module.step) == 1
    whole = rfjax.rollout(tiny_model, policy, context(2), shape, key=KEY)
    assert whole.finite.all()
    latents = np.concatenate([chunk.latents for chunk in chunks], axis=1)
    np.testing.assert_allclose(latents, whole.latents, atol=2e-4)
    trace = jax.tree.map(lambda *leaves: np.stack(leaves), *(chunk.trace for chunk in chunks))
    np.testing.assert_array_equal(trace.frames, whole.trace.frames)
    starts = 3 * np.arange(27).reshape(-1, 1, 1, 1, 1)
    assert (trace.frames < np.maximum(starts, 1)).all()
    assert ((trace.frames >= 0) == (trace.roles > 0)).all()
    assert (trace.positions[trace.frames >= 0] < 0).all()
    memory_timeline(trace, 3, tmp_path / "timeline.png", name, sample=1)
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", POLICIES)
def test_a_sample_does_not_depend_on_its_batch(tiny_model, name):
    policy, keys = memory.create(name), jax.random.split(KEY, 2)
    both = rfjax.rollout(tiny_model, policy, context(2), (2, 33, 6, 8, 4), key=keys)
    alone = rfjax.rollout(tiny_model, policy, context(2)[1:], (1, 33, 6, 8, 4), key=keys[1:])
    np.testing.assert_allclose(both.latents[1], alone.latents[0], atol=2e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_prompts_switch_under_every_policy(tiny_model, name):
    policy = memory.create(name)
    first, second = (context(2)[i : i + 1] for i in range(2))
    videos = {
        recache: rfjax.rollout(
            tiny_model, policy, first, (1, 36, 6, 8, 4), key=KEY, switches=[rfjax.Switch(30, second, recache=recache)]
        )
        for recache in (True, False)
    }
    plain = rfjax.rollout(tiny_model, policy, first, (1, 36, 6, 8, 4), key=KEY).latents
    for video in videos.values():
        assert video.finite.all()
        np.testing.assert_allclose(video.latents[:, :30], plain[:, :30], atol=2e-4)
        assert np.abs(video.latents[:, 30:33] - plain[:, 30:33]).max() > 1e-2
    assert np.abs(videos[True].latents[:, 30:33] - videos[False].latents[:, 30:33]).max() > 1e-3


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
