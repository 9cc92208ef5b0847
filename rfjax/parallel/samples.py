"""A batch whose samples lie on different devices: each runs the same program on its own, and nothing is exchanged.

Where several devices share a sample (`rfjax.parallel.division`), the compiler divides each group's program among them.
Arguments and results are described as for `jax.vmap`, by the axis that counts samples.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, PyTree

from rfjax.errors import UserError
from rfjax.parallel.mesh import DATA

Tree = TypeVar("Tree")
Axes = int | None | list[int | None]
"""The axis that counts samples in all arrays of a pytree, or in each of its leaves; None where all devices share it."""


def divided(
    function: Callable[..., Any], mesh: Mesh | None, in_axes: Sequence[Axes], out_axes: Axes | tuple[Axes, ...]
) -> Callable[..., Any]:
    """Return a function that runs on every device with its own part of the samples; without a mesh, the function.

    What trees know of themselves beside their arrays, such as a memory's sizes, is that of a device's part.

    Args:
        function: of pytrees.
        mesh: of a model from `rfjax.parallelize`.
        in_axes: for each argument, the axis that counts samples.
        out_axes: the same of what is returned; a tuple where that is one.
    """
    if mesh is None:
        return function
    in_specs = tuple(_specs(axes) for axes in in_axes)
    out_specs = tuple(_specs(axes) for axes in out_axes) if isinstance(out_axes, tuple) else _specs(out_axes)

    def run(*arguments):
        inputs, made = [jax.tree.structure(argument) for argument in arguments], []

        def on_leaves(*leaves):
            outputs = function(*(jax.tree.unflatten(*pair) for pair in zip(inputs, leaves, strict=True)))
            outputs = outputs if isinstance(out_axes, tuple) else (outputs,)
            made[:] = [jax.tree.structure(output) for output in outputs]
            parts = tuple(jax.tree.leaves(output) for output in outputs)
            return parts if isinstance(out_axes, tuple) else parts[0]

        # By hand over all axes where no device shares a sample: then there is nothing that the compiler could exchange.
        by_hand = {*mesh.axis_names} if mesh.size == mesh.shape[DATA] else {DATA}
        on_every_device = jax.shard_map(
            on_leaves, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=by_hand, check_vma=False
        )
        parts = on_every_device(*(jax.tree.leaves(argument) for argument in arguments))
        if not isinstance(out_axes, tuple):
            return jax.tree.unflatten(made[0], parts)
        return tuple(jax.tree.unflatten(*pair) for pair in zip(made, parts, strict=True))

    return run


def spread(tree: Tree, mesh: Mesh | None, axis: int = 0) -> Tree:
    """Give every device its part of the samples, which `axis` counts; without a mesh, do nothing."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, _spec(axis)))


def sample_axes(make: Callable[[int], PyTree]) -> list[int | None]:
    """Return which axis of each leaf counts samples, None where none does, from the shapes for two batch sizes.

    Args:
        make: returns the pytree for so many samples; it is only traced.
    """

    def axis(two, three):
        differing = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
        return differing[0] if differing else None

    leaves = [jax.tree.leaves(jax.eval_shape(functools.partial(make, samples))) for samples in (2, 3)]
    return [axis(*pair) for pair in zip(*leaves, strict=True)]


def select(which: Bool[Array, "B"], chosen: Tree, other: Tree, axes: Axes = 0) -> Tree:
    """Return the pytree with the samples of `which` from `chosen` and the rest from `other`.

    Args:
        which: of the samples.
        chosen: a pytree of arrays.
        other: the same arrays; those without samples are taken from here.
        axes: which axis counts samples.
    """
    leaves, structure = jax.tree.flatten(other)
    every = axes if isinstance(axes, list) else [axes] * len(leaves)

    def one(a, b, axis):
        return b if axis is None else jnp.where(which.reshape(-1, *[1] * (b.ndim - axis - 1)), a, b)

    return structure.unflatten([one(*three) for three in zip(jax.tree.leaves(chosen), leaves, every, strict=True)])


def check_samples(samples: int, mesh: Mesh | AbstractMesh | None) -> None:
    """Make sure that every device, or group of devices that share samples, has equally many.

    Raises:
        UserError: it has not; the message says which numbers would do.
    """
    groups = 1 if mesh is None else mesh.shape[DATA]
    if mesh is not None and samples % groups:
        below = samples // groups * groups
        fitting = f"{below} or {below + groups}" if below else str(groups)
        among = "devices" if mesh.size == groups else "groups of devices"
        raise UserError(f"{samples} samples do not divide among {groups} {among}; {fitting} would")


def _specs(axes: Axes) -> PartitionSpec | list[PartitionSpec]:
    return [_spec(axis) for axis in axes] if isinstance(axes, list) else _spec(axes)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, DATA)
