"""Videos divided among devices of a group; `test_mesh.py` runs this file in a process that has eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices_rollout import embeds
from test_cli_generate import make_checkpoint

from rfjax import cli, memory, parallelize, rollout
from rfjax.io.checkpoints import load
from rfjax.sampling.batch import Batch, Occupant
from rfjax.sampling.pipeline import keys_from_seed
from rfjax.sampling.switching import Switch

SIZE, SAMPLES = (8, 8), 2
SHAPE = (SAMPLES, 12, *SIZE, 4)
MESHES = [(2, 4, 1), (2, 2, 2), (1, 8, 1), (1, 4, 2), (4, 2, 1), (4, 1, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny"))


def both(model, mesh, policy, samples=SAMPLES, **given):
    shape = (samples, *SHAPE[1:])
    divided = parallelize(model, *mesh, fully_sharded=mesh[1] == 4)
    given = {"key": jax.random.key(5), **given}
    return [rollout(each, policy, embeds(model, samples), shape, **given) for each in (model, divided)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_rollout_is_that_of_one_device(model, mesh):
    alone, together = both(model, mesh, memory.create("relax_forcing"), max(SAMPLES, mesh[0]))
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)


@pytest.mark.parametrize("mesh", [(2, 4, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("name", sorted(memory.POLICIES))
def test_every_policy_is_that_of_one_device(model, mesh, name):
    alone, together = both(model, mesh, memory.create(name), max(SAMPLES, mesh[0]))
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)


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

    for one, other in zip(frames(model), frames(parallelize(model, *mesh)), strict=True):
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
