"""Videos divided among eight devices; `test_mesh.py` runs this file in a process that has them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli_generate import make_checkpoint, records

from rfjax import cli, memory, rolling, rollout, stream
from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.io.video import read_video
from rfjax.parallel.division import parallelize
from rfjax.sampling import pipeline
from rfjax.sampling import rollout as module
from rfjax.sampling.pipeline import stream_video
from rfjax.sampling.request import request_of, spread_noise
from rfjax.sampling.switching import Switch

SAMPLES, SIZE = 8, (6, 8)
SHAPE = (SAMPLES, 12, *SIZE, 4)
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective|reduce-scatter|send|recv|partition-id")


def collectives(lowered) -> list[str]:
    return COLLECTIVE.findall(str(lowered.compile().as_text()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def divided(model):
    return parallelize(model)


def embeds(model, samples=SAMPLES):
    network = model.config.transformer
    return np.random.default_rng(3).normal(size=(samples, network.text_len, network.text_dim)).astype(np.float32)


@pytest.mark.parametrize("name", sorted(memory.POLICIES))
def test_a_rollout_is_that_of_one_device(model, divided, name):
    policy, key = memory.create(name), jax.random.key(5)
    alone = rollout(model, policy, embeds(model), SHAPE, key=key)
    together = rollout(divided, policy, embeds(model), SHAPE, key=key)
    assert len(together.latents.sharding.device_set) == 8
    np.testing.assert_allclose(together.latents, alone.latents, atol=2e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)
    np.testing.assert_array_equal(together.finite, alone.finite)


def test_streams_continue_switch_and_take_noise_as_on_one_device(model, divided):
    rng = np.random.default_rng(4)
    steps = len(model.config.denoising_steps) - 1
    noise, renoise = rng.normal(size=SHAPE), rng.normal(size=(4, steps, SAMPLES, 3, *SIZE, 4))
    given = {
        "noise": noise.astype(np.float32),
        "renoise": renoise.astype(np.float32),
        "initial_latents": rng.normal(size=(SAMPLES, 3, *SIZE, 4)).astype(np.float32),
        "switches": [Switch(9, embeds(model)[::-1], recache=True, cut=True)],
    }
    policy = memory.create("relax_forcing")
    alone = list(stream(model, policy, embeds(model), **given))
    for one, other in zip(stream(divided, policy, embeds(model), **given), alone, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, atol=2e-5)
    whole = rollout(divided, policy, embeds(model), **given).latents
    np.testing.assert_allclose(whole[:, -3:], alone[-1].latents, atol=2e-5)


@pytest.mark.parametrize("name", sorted(memory.POLICIES))
def test_nothing_passes_between_devices(divided, name):
    policy, text_embeds = memory.create(name), jnp.asarray(embeds(divided))
    sizes, noise = request_of(divided.config, text_embeds, SHAPE, None, jax.random.key(0), None)
    noise = spread_noise(noise, divided.mesh)
    shared = (divided.config, sizes.frame_size, policy, divided.transformer)
    text, state = module.begin(divided, policy, text_embeds, sizes)
    lowered = module.step.lower(*shared, text, state, noise.at(0), divided.mesh)
    assert not collectives(lowered)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    after, _ = module.step(*shared, text, state, noise.at(0), divided.mesh)
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_nothing_passes_between_devices_in_whole_rollouts_and_decoding(divided):
    policy = memory.create("relax_forcing")
    sizes, noise = request_of(divided.config, embeds(divided), SHAPE, None, jax.random.key(0), None)
    placed = module.spread(jnp.asarray(embeds(divided)), divided.mesh)
    whole = module._whole.lower(
        divided.config, sizes, jnp.dtype("float32"), policy, divided.transformer, placed, None,
        spread_noise(noise, divided.mesh), 4, divided.mesh,
    )  # fmt: skip
    assert not collectives(whole)
    cache = pipeline._decode_init(divided.config.vae, jnp.dtype("float32"), SAMPLES, *SIZE, divided.mesh)
    latent = module.spread(jnp.zeros((SAMPLES, 1, *SIZE, 4)), divided.mesh)
    decode = pipeline._decode_next.lower(divided.config.vae, divided.vae, cache, latent, divided.mesh)
    assert not collectives(decode)


def test_pixels_are_those_of_one_device(model, divided):
    policy, keys = memory.create("relax_forcing"), pipeline.keys_from_seed(1, range(SAMPLES))
    videos = [
        np.concatenate(
            [c.frames for c in stream_video(each, policy, jnp.asarray(embeds(model)), 6, SIZE, keys)], axis=1
        )
        for each in (model, divided)
    ]
    assert np.abs(videos[0].astype(int) - videos[1]).max() <= 1


def test_samples_that_do_not_divide_and_the_rolling_sampler_are_refused(divided):
    policy = memory.create("relax_forcing")
    with pytest.raises(UserError, match="12 samples do not divide among 8 devices; 8 or 16 would"):
        rollout(divided, policy, embeds(divided, 12), (12, *SHAPE[1:]), key=jax.random.key(0))
    with pytest.raises(UserError, match="the rolling sampler runs on one device"):
        rolling.rollout(divided, policy, embeds(divided), SHAPE, key=jax.random.key(0))


def test_the_command_divides_its_videos(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["generate", "--checkpoint", str(checkpoint), "--prompt", "a cat", "--num-samples", "3"]
    flags += ["--latent-frames", "6"]
    for mesh, first, size in (
        (["--mesh", "data=2"], "2 x CPU", 4),
        ([], "3 x CPU", 3),
        (["--mesh", "data=1"], "CPU", 1),
    ):
        folder = tmp_path / first
        assert cli.main([*flags, *mesh, "--output", str(folder)]) == 0
        assert capsys.readouterr().out.startswith(f"{first} (")
        made = records(folder)
        assert len(made) == 3
        assert {record["timings"]["batch_size"] for record in made.values()} == {size if size != 4 else 2}
        for name in made:
            difference = read_video(folder / name).astype(int) - read_video(tmp_path / "2 x CPU" / name)
            assert np.abs(difference).mean() < 1
    assert cli.main([*flags, "--mesh", "data=9", "--overwrite"]) == 2
    assert "mesh is data=9,sequence=1,tensor=1, but there are 8 devices" in capsys.readouterr().err
    assert cli.main([*flags, "--mesh", "data=2", "--sampler", "rolling", "--output", "other"]) == 2
    assert "--mesh data=2,sequence=1,tensor=1 does not go with --sampler rolling" in capsys.readouterr().err
