"""The mesh `(data, sequence, tensor)` of generation: groups of devices with samples of their own, that divide each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rfjax.config import ModelConfig, TransformerConfig
from rfjax.errors import UserError
from rfjax.models.functional import BLOCKS
from rfjax.models.layout import SEQUENCE, TENSOR, parameter_spec, path_of
from rfjax.models.model import Model
from rfjax.parallel.mesh import DATA


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many devices there are along each axis of a mesh."""

    data: int = 1
    """Groups with samples of their own; nothing passes between them."""
    sequence: int = 1
    """Devices of a group among which a chunk's tokens are divided."""
    tensor: int = 1
    """Devices among which heads and the feed-forward part's hidden channels are divided."""
    fully_sharded: bool = False
    """Whether parameters are cut over `sequence` too, and gathered layer by layer where they are used."""

    @property
    def group(self) -> int:
        """Devices that work on a sample together."""
        return self.sequence * self.tensor

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.group

    def __str__(self) -> str:
        return f"data={self.data},sequence={self.sequence},tensor={self.tensor}"


ONE_DEVICE = Sizes()


def make_mesh(data: int = 0, sequence: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh on which `rfjax.load` and `rfjax.parallelize` lay a model.

    Args:
        data: groups of devices that each take an equal part of the batch; 0 takes as many as there are devices for.
        sequence: devices of a group among which the tokens of a chunk are divided.
        tensor: devices among which heads and the feed-forward part's hidden channels are divided.
        devices: those of this process where None.

    Raises:
        UserError: the sizes do not multiply to the devices.
    """
    devices = jax.local_devices() if devices is None else devices
    sizes = fill(Sizes(data, sequence, tensor), len(devices), exactly=True)
    return division_mesh(sizes, devices)


def parallelize(model: Model, mesh: Mesh | None = None, *, fully_sharded: bool = False) -> Model:
    """Return the model on several devices, on which `rfjax.stream` and `rfjax.rollout` then run.

    `rfjax.load(path, mesh=mesh)` gives the same without all weights ever being on one device.

    Args:
        model: from `rfjax.load`.
        mesh: from `make_mesh`; None is one of all devices, each with videos of its own.
        fully_sharded: also cut the parameters over `sequence`, and gather them layer by layer: needs the least memory.

    Raises:
        UserError: the model's heads or hidden channels do not divide over `tensor`.
    """
    mesh = make_mesh() if mesh is None else mesh
    networks = {"transformer": model.transformer, "vae": model.vae, "text_encoder": model.text_encoder}
    trees = {name: params for name, params in networks.items() if params is not None}
    shardings = network_shardings(model.config, mesh, trees, fully_sharded)
    placed = {name: jax.device_put(trees[name], sharding) for name, sharding in shardings.items()}
    return dataclasses.replace(model, mesh=mesh, **placed)


def network_shardings(
    config: ModelConfig, mesh: Mesh | None, networks: Mapping[str, PyTree], fully_sharded: bool = False
) -> dict[str, PyTree]:
    """Return a `NamedSharding` for every parameter of the networks that lie on a mesh.

    Where devices do not divide videos, prompts are encoded on one, and the text encoder is left out.

    Args:
        config: the model's.
        mesh: from `make_mesh`; None has no network on it.
        networks: parameters or their shapes, by the network's name.
        fully_sharded: see `parallelize`.

    Raises:
        UserError: the model's heads or hidden channels do not divide over `tensor`.
    """
    if mesh is None:
        return {}
    sizes = Sizes(**mesh.shape)
    check_heads(config.transformer, sizes)
    return {
        name: parameter_shardings(mesh, params, fully_sharded)
        for name, params in networks.items()
        if name != "text_encoder" or sizes.group > 1
    }


def fill(sizes: Sizes, devices: int, exactly: bool = False) -> Sizes:
    """Return the sizes with `data`, where it is 0, as many as there are devices for.

    Args:
        sizes: asked for.
        devices: there are.
        exactly: whether all of them are to be used.

    Raises:
        UserError: they need more devices than there are, or, with `exactly`, fewer.
    """
    if min(sizes.sequence, sizes.tensor) >= 1 and sizes.data >= 0:
        filled = dataclasses.replace(sizes, data=sizes.data or devices // sizes.group)
        if filled.data and (filled.devices == devices or (filled.devices < devices and not exactly)):
            return filled
    asked = f"sequence={sizes.sequence},tensor={sizes.tensor}"
    asked = f"data={sizes.data},{asked}" if sizes.data else asked
    whole = [n for n in range(1, devices + 1) if devices % n == 0]
    if sizes.sequence >= 1 and sizes.tensor >= 1 and sizes.group in whole:
        advice = f"data={devices // sizes.group} would make them, with this sequence and tensor"
    else:
        advice = f"data x sequence x tensor must be {devices}, so each one of {', '.join(map(str, whole))}"
    raise UserError(f"mesh is {asked}, but there are {devices} devices; {advice}")


def division_mesh(sizes: Sizes, devices: Sequence[Any]) -> Mesh:
    """Return the mesh of the first devices, those of a group next to each other."""
    shape = (sizes.data, sizes.sequence, sizes.tensor)
    chosen = np.array(devices[: sizes.devices]).reshape(shape)
    return Mesh(chosen, (DATA, SEQUENCE, TENSOR), axis_types=(AxisType.Auto,) * 3)


def check_heads(network: TransformerConfig, sizes: Sizes) -> None:
    """Make sure that heads and hidden channels divide over `tensor`.

    Raises:
        UserError: they do not; the message says which sizes would do.
    """
    for number, what in ((network.num_heads, "heads"), (network.ffn_dim, "feed-forward channels")):
        if number % sizes.tensor:
            common = [n for n in range(1, network.num_heads + 1) if network.num_heads % n == network.ffn_dim % n == 0]
            fitting = ", ".join(map(str, common))
            raise UserError(f"tensor is {sizes.tensor}, which does not divide {number} {what}; {fitting} would")


def check_tokens(network: TransformerConfig, frame_size: tuple[int, int], sequence: int) -> None:
    """Make sure that the tokens of a frame divide over `sequence`.

    Raises:
        UserError: they do not; the message says which sizes would do.
    """
    tokens = network.frame_tokens(*frame_size)
    if tokens % sequence:
        fitting = ", ".join(str(n) for n in range(1, min(tokens, 64) + 1) if tokens % n == 0)
        raise UserError(
            f"sequence is {sequence}, which does not divide the {tokens} tokens of a frame; {fitting} would"
        )


def sequence_of(mesh: Mesh | None) -> int:
    """Return how many devices divide the tokens of a chunk."""
    return 1 if mesh is None else mesh.shape[SEQUENCE]


def parameter_shardings(mesh: Mesh | AbstractMesh, params: PyTree, fully_sharded: bool = False) -> PyTree:
    """Return a `NamedSharding` for every parameter of a network, from the table of `rfjax.models.layout`.

    Args:
        mesh: with the axes `data`, `sequence` and `tensor`.
        params: arrays or shapes.
        fully_sharded: whether what the table cuts over `sequence` is; else it is whole there.

    Raises:
        UserError: a parameter that the table does not have.
    """

    def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = path_of(keys)
        axes = [None] * path.startswith(f"{BLOCKS}.") + list(parameter_spec(path))
        axes = [None if axis == SEQUENCE and not fully_sharded else axis for axis in axes]
        kept = [axis if _divides(mesh, axis, size) else None for axis, size in zip(axes, leaf.shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(sharding, params)


def _divides(mesh: Mesh | AbstractMesh, axis: Any, size: int) -> bool:
    names = axis if isinstance(axis, tuple) else (axis,)
    parts = [mesh.shape[name] for name in names if name is not None]
    return size % int(np.prod(parts)) == 0
