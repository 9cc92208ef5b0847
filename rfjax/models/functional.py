"""From NNX modules, which declare parameters and nothing else, to pure functions of pytrees.

A network is used as `bind(WanTransformer, config, params)(x, ...)` inside a jitted function; `params` is a plain
nested dict of arrays whose paths are the module's attribute names.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from rfjax.models.layout import division, path_of, used_spec

Params = dict[str, Any]
"""Nested dict of arrays (or of `jax.ShapeDtypeStruct`)."""

AnyArray = jax.Array | np.ndarray
"""What the public functions take for an array."""

BLOCKS = "blocks"
"""Name of a network's layers: one tree, stacked on the first axis of its parameters."""

Network = TypeVar("Network", bound=nnx.Module)


@functools.lru_cache(maxsize=64)
def _split_abstract(network: Callable[..., nnx.Module], config: Any, dtype: Any) -> tuple[Any, Params]:
    module = nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0), param_dtype=dtype))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def abstract_params(network: Callable[..., Network], config: Any, dtype: Any = jnp.float32) -> Params:
    """Return the parameter tree of `network(config)` as shapes and types, without allocating anything."""
    return jax.tree.map(lambda leaf: leaf, _split_abstract(network, config, jnp.dtype(dtype))[1])


def init_params(network: Callable[..., Network], config: Any, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Draw fresh random parameters for `network(config)`."""

    @jax.jit
    def draw(key):
        module = network(config, rngs=nnx.Rngs(key), param_dtype=jnp.dtype(dtype))
        return nnx.to_pure_dict(nnx.state(module))

    return draw(key)


def bind(network: Callable[..., Network], config: Any, params: Params) -> Network:
    """Return the network holding `params`: cheap, and meant to be called inside a jitted function.

    Under a mesh the parameters are `gathered`; the network does so with its `blocks`, a layer at a time.
    """
    params = {name: tree if name == BLOCKS else gathered(tree, name) for name, tree in params.items()}
    return nnx.merge(_split_abstract(network, config, jnp.dtype(jnp.float32))[0], params)


def gathered(params: PyTree, above: str = "") -> PyTree:
    """Under a mesh, parameters as they are used, of those that are cut over its devices; else `params`.

    In training (`jax.set_mesh`) they are whole: every device computes its own part of the batch. Left to itself, XLA
    cuts activations as their parameters are, and moves them, which are many times larger, between the devices.
    Where devices divide a video, `rfjax.models.layout` says what is cut.

    Args:
        params: of a network or of a part of it, with `blocks` of a single layer.
        above: path of that part in the network.
    """
    if division() is not None:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: jax.lax.with_sharding_constraint(leaf, used_spec(path_of(keys, above))), params
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return params
    return jax.lax.with_sharding_constraint(params, PartitionSpec())
