"""The devices as a grid of data-parallel groups, and where parameters and batches lie on it.

Every device works on its own part of the batch. The devices of a group share the parameters: each keeps a slice of
every large one, and gathers a layer's where they are used (fully-sharded data parallelism, with
`rfjax.models.functional.gathered`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rfjax.errors import UserError
from rfjax.models.functional import BLOCKS

DATA, FSDP = "data", "fsdp"
_SMALL = 2**14
"""Elements below which a parameter is kept whole: slicing it saves less than gathering it costs."""


def make_mesh(data: int = 0, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh with the axes `data` and `fsdp`.

    Args:
        data: Groups of devices with a whole copy of the parameters; 0 takes as many as there are devices for.
        fsdp: Devices of a group.
        devices: All of all processes where None.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data < 0 or fsdp < 1 or (data or max(count // fsdp, 1)) * fsdp != count:
        given = f"data {data} x fsdp {fsdp}" if data else f"fsdp {fsdp}"
        fitting = ", ".join(f"{count // size} x {size}" for size in range(1, count + 1) if count % size == 0)
        raise UserError(f"mesh is {given}, which does not make {count} devices; data x fsdp must be one of {fitting}")
    return jax.make_mesh(
        (count // fsdp, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices
    )


def parameter_sharding(mesh: Mesh | AbstractMesh, tree: PyTree) -> PyTree:
    """Return a `NamedSharding` for every leaf of parameters, of an optimizer's moments or of an average of them.

    Large leaves are cut over `fsdp` along their longest axis that divides, not along the layers of a stack unless
    nothing else does: a scan over layers would have to fetch each from another device. All others are kept whole.

    Args:
        mesh: From `make_mesh`.
        tree: Of arrays or of `jax.ShapeDtypeStruct`.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stacked = any(getattr(key, "key", None) == BLOCKS for key in path)
        axis = _cut_axis(leaf.shape, mesh.shape[FSDP], stacked)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _cut_axis(shape: tuple[int, ...], parts: int, stacked: bool) -> int | None:
    if parts == 1 or np.prod(shape) < _SMALL:
        return None
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    inner = [axis for axis in fitting if axis > 0 or not stacked]
    return max(inner or fitting, key=lambda axis: shape[axis], default=None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that gives every device its part of a batch's first axis."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int, processes: int) -> None:
    """Make sure that every device has the same number of examples in every accumulated part.

    Raises:
        UserError: it has not.
    """
    unit = int(np.lcm(mesh.size * accumulate, processes))
    if batch_size < 1 or batch_size % unit:
        parts = f" in {accumulate} accumulated parts" if accumulate > 1 else ""
        below = batch_size // unit * unit
        fitting = f"{below} or {below + unit}" if below > 0 else f"{unit} or {2 * unit}"
        raise UserError(f"batch_size {batch_size} does not divide among {mesh.size} devices{parts}; {fitting} would")


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Copy arrays that every process holds to their shardings; the copies share no memory with `tree`: donate them."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding, may_alias=False)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def global_batch(mesh: Mesh, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Return the batch of all processes of which each gives its own examples."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in local.items()}
