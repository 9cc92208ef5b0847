"""Videos divided among devices of a group; `test_mesh.py` runs this file in a process that has eight."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices_rollout import embeds
from test_cli_generate import make_checkpoint

from rfjax import cli, make_mesh, memory, parallelize, rollout
from rfjax.io.checkpoints import load
from rfjax.parallel.collectives import collectives
from rfjax.sampling import rollout as module
from rfjax.sampling.batch import Batch, Occupant
from rfjax.sampling.pipeline import keys_from_seed
from rfjax.sampling.request import request_of, spread_noise
from rfjax.sampling.switching import Switch

SIZE, SAMPLES = (8, 8), 2
SHAPE = (SAMPLES, 12, *SIZE, 4)
MESHES = [(2, 4, 1), (2, 2, 2), (1, 8, 1), (1, 4, 2), (4, 2, 1), (4, 1, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def many_heads(model):
    """The same weights, read as eight heads."""
    transformer = dataclasses.replace(model.config.transformer, num_heads=8)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, transformer=transformer))


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_weights_are_read_into_their_places(checkpoint, model, mesh, fully_sharded):
    mesh = make_mesh(*mesh)
    read = load(checkpoint, mesh=mesh, fully_sharded=fully_sharded)
    moved = parallelize(model, mesh, fully_sharded=fully_sharded)
    for name in ("transformer", "vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, getattr(read, name), getattr(moved, name))
        places = [jax.tree.map(lambda leaf: leaf.sharding, getattr(each, name)) for each in (read, moved)]
        assert places[0] == places[1]
    assert read.mesh == mesh


def both(model, mesh, policy, samples=SAMPLES, **given):
    shape = (samples, *SHAPE[1:])
    divided = parallelize(model, make_mesh(*mesh), fully_sharded=mesh[1] == 4)
    given = {"key": jax.random.key(5), **given}
    return [rollout(each, policy, embeds(model, samples), shape, **given) for each in (model, divided)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_rollout_is_that_of_one_device(model, mesh):
    alone, together = both(model, mesh, memory.create("relax_forcing"), max(SAMPLES, mesh[0]))
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_a_rollout_whose_heads_are_exchanged(many_heads, mesh):
    """Its 8 heads divide over all of these groups: a device has all of a chunk's tokens for its own heads."""
    alone, together = both(many_heads, mesh, memory.create("relax_forcing"))
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)


@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)], ids=str)
def test_a_device_remembers_its_share(many_heads, mesh):
    """Of the keys and values: its samples, and its heads of the group's."""
    divided, policy = parallelize(many_heads, make_mesh(*mesh)), memory.create("relax_forcing")
    batch = Batch(divided, policy, (8, *SHAPE[1:]))
    texts, keys = jnp.asarray(embeds(many_heads, 8)), keys_from_seed(1, range(8))
    batch.admit({n: Occupant(texts[n : n + 1], keys[n]) for n in range(8)})
    batch.step().fetch()
    assert batch.state is not None
    kept = [leaf for leaf in jax.tree.leaves(batch.state.rollout.memory) if leaf.ndim == 5]
    assert kept
    for leaf in kept:
        layers, samples, frames, tokens, channels = leaf.shape
        share = (layers, samples // mesh[0], frames, tokens, channels // (mesh[1] * mesh[2]))
        assert {piece.data.shape for piece in leaf.addressable_shards} == {share}


@pytest.mark.parametrize("mesh", [(2, 4, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("name", sorted(memory.POLICIES))
def test_every_policy_is_that_of_one_device(model, mesh, name):
    alone, together = both(model, mesh, memory.create(name), max(SAMPLES, mesh[0]))
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)


@pytest.mark.parametrize(
    ("mesh", "fully_sharded", "expected"),
    [
        ((8, 1, 1), False, {}),
        ((4, 2, 1), False, {"all-to-all": 60, "all-gather": 4, "all-reduce": 2}),
        ((2, 4, 1), False, {"all-gather": 64, "all-reduce": 2}),
        ((4, 1, 2), False, {"all-reduce": 76}),
        ((2, 2, 2), False, {"all-gather": 64, "all-reduce": 78}),
        ((4, 2, 1), True, {"all-to-all": 60, "all-gather": 127, "all-reduce": 2}),
    ],
    ids=str,
)
def test_collectives_of_a_chunk(model, mesh, fully_sharded, expected):
    """In each of 3 layers and 5 passes 4 exchanges, or 4 gatherings of keys and values; over `tensor` 5 sums.

    Fully sharded, 8 parameters a layer are gathered. The few others are outside of the layers: the policy's scores, the
    chunk's latents.
    """
    divided = parallelize(model, make_mesh(*mesh), fully_sharded=fully_sharded)
    policy, texts = memory.create("relax_forcing"), jnp.asarray(embeds(model))
    sizes, noise = request_of(divided.config, texts, (8, *SHAPE[1:]), None, jax.random.key(0), None)
    text, state = module.begin(divided, policy, texts, sizes)
    shared = (divided.config, sizes.frame_size, policy, divided.transformer)
    step = module.step.lower(*shared, text, state, spread_noise(noise, divided.mesh).at(0), divided.mesh)
    found = collections.Counter()
    for each in collectives(step.compile()):
        found[each.kind] += each.times
    assert found == expected


def test_prompts_that_change(model):
    switch = Switch(6, jnp.asarray(embeds(model, SAMPLES))[::-1])
    alone, together = both(model, (2, 2, 2), memory.create("relax_forcing"), switches=[switch])
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (2, 4, 1)], ids=str)
def test_pixels_of_places_that_take_the_next_video(model, mesh):
    """Widths of 8 latent columns divide over all of these groups."""

    def frames(model):
        batch = Batch(model, memory.create("relax_forcing"), SHAPE)
        texts, keys = jnp.asarray(embeds(model, 3)), keys_from_seed(1, range(3))
        seats = [Occupant(texts[n : n + 1], keys[n]) for n in range(3)]
        batch.admit(dict(enumerate(seats[:2])))
        made = [batch.step().fetch()]
        batch.admit({1: seats[2]})
        made += [batch.step().fetch(), batch.step().fetch()]
        return [np.concatenate([pieces[place].frames for pieces in made]) for place in (0, 1)]

    for one, other in zip(frames(model), frames(parallelize(model, make_mesh(*mesh))), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_the_command_divides_videos(model, tmp_path, capsys):
    checkpoint = str(make_checkpoint(tmp_path / "tiny"))
    flags = ["generate", "--checkpoint", checkpoint, "--latent-frames", "6", "--height", "64", "--width", "64"]
    flags += ["--prompt", "a cat", "--output", str(tmp_path / "o"), "--mesh"]
    assert cli.main([*flags, "data=1,sequence=4,tensor=2"]) == 0
    assert "8 x CPU" in capsys.readouterr().out
    for mesh, message in {
        "sequence=16": "mesh is sequence=16,tensor=1, but there are 8 devices",
        "sequence=2,tensor=2,data=3": "but there are 8 devices; data=2 would make them",
        "tensor=8": "tensor is 8, which does not divide",
    }.items():
        assert cli.main([*flags, mesh, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
