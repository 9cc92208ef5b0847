"""What needs no second device; `eight_devices_rollout.py` has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden

from rfjax import memory, rollout
from rfjax.errors import UserError
from rfjax.parallel.division import make_mesh, parallelize
from rfjax.parallel.samples import check_samples, sample_axes


def test_the_axis_of_samples_is_read_off_the_shapes():
    def make(samples):
        return {"a": jnp.zeros((4, samples, 3)), "b": jnp.zeros(samples), "c": jnp.zeros((2, 3))}

    assert sample_axes(make) == [1, 0, None]


@pytest.mark.slow
def test_a_mesh_of_one_device_gives_what_the_device_does(tiny_model):
    model, policy = parallelize(tiny_model, make_mesh(devices=jax.devices()[:1])), memory.create("relax_forcing")
    embeds = np.asarray(golden("rollout_dense")["context"])[:1]
    videos = [rollout(each, policy, embeds, (1, 12, 6, 8, 4), key=jax.random.key(2)) for each in (tiny_model, model)]
    np.testing.assert_allclose(videos[1].latents, videos[0].latents, atol=1e-5)
    assert jax.tree.map(jnp.shape, videos[0]) == jax.tree.map(jnp.shape, videos[1])


@pytest.mark.parametrize(("samples", "fitting"), [(1, "2"), (3, "2 or 4")])
def test_samples_that_do_not_divide_are_refused(samples, fitting):
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    check_samples(4, mesh)
    with pytest.raises(UserError, match=f"{samples} samples do not divide among 2 devices; {fitting} would"):
        check_samples(samples, mesh)
