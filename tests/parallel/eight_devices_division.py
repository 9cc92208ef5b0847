"""Videos divided among devices of a group; `test_mesh.py` runs this file in a process that has eight."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices_rollout import embeds
from test_cli_generate import make_checkpoint

from rfjax import memory, parallelize, rollout, stream
from rfjax.io.checkpoints import load
from rfjax.sampling import pipeline
from rfjax.sampling import rollout as module
from rfjax.sampling.request import request_of, spread_noise
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


@pytest.mark.parametrize("mesh", [(2, 4, 1), (4, 2, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("name", sorted(memory.POLICIES))
def test_every_policy_is_that_of_one_device(model, mesh, name):
    alone, together = both(model, mesh, memory.create(name), max(SAMPLES, mesh[0]))
    np.testing.assert_allclose(together.latents, alone.latents, atol=3e-5)
    np.testing.assert_array_equal(together.trace.frames, alone.trace.frames)
