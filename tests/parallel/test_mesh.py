"""Meshes of many devices on one machine: XLA can pretend to have them, from the start of a process on."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rfjax.errors import UserError
from rfjax.parallel.mesh import check_batch, make_mesh, parameter_sharding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight_devices", "eight_devices_rollout", "eight_devices_division"])
def test_on_eight_devices(name):
    file = Path(__file__).with_name(f"{name}.py")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, cwd=file.parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_parameters_are_cut_along_their_longest_axis_and_not_across_layers():
    mesh = jax.sharding.AbstractMesh((2, 8), ("data", "fsdp"))
    shapes = {
        "blocks": {"kernel": (16, 64, 128), "odd": (16, 63, 129), "bias": (16, 128)},
        "conv": (3, 3, 3, 64, 48),
        "indivisible": (999, 1001),
        "count": (),
    }
    tree = jax.tree.map(lambda s: np.empty(s, np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    specs = jax.tree.map(lambda sharding: sharding.spec, parameter_sharding(mesh, (tree,)))[0]
    assert specs == {
        "blocks": {"kernel": PartitionSpec(None, None, "fsdp"), "odd": PartitionSpec("fsdp"), "bias": PartitionSpec()},
        "conv": PartitionSpec(None, None, None, "fsdp"),
        "indivisible": PartitionSpec(),
        "count": PartitionSpec(),
    }


def test_one_device_is_a_mesh_too():
    mesh = make_mesh()
    assert mesh.shape == {"data": jax.device_count(), "fsdp": 1}
    with pytest.raises(
        UserError, match=r"batch_size 9 does not divide among 1 devices in 4 accumulated parts; 8 or 12"
    ):
        check_batch(9, mesh, 4, 1)
