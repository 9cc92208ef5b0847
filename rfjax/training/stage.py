"""What the one loop asks of a stage: who learns when, and each player's loss."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PyTree

from rfjax.models.functional import Params

Networks = Mapping[str, Params]
"""Parameters by network."""
Batch = Mapping[str, Array]
"""Arrays whose first axis counts examples."""
Metrics = dict[str, Float[Array, ""]]
"""Numbers to be watched, by name."""


@runtime_checkable
class Stage(Protocol):
    """A stage of training: pure functions of parameters, data and keys."""

    @property
    def players(self) -> tuple[str, ...]:
        """Names of the sets of networks with an optimizer of their own; the first is what the run is for."""
        ...

    def turn(self, step: int) -> tuple[str, ...]:
        """Return who learns at this step, in order."""
        ...

    def loss(
        self, player: str, params: Mapping[str, Networks], frozen: Mapping[str, Any], batch: Batch, key: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the player's loss, in float32, and what else is to be watched.

        Args:
            player: who learns; the loss is differentiated with respect to `params[player]`.
            params: by player and network, in the type of the computation.
            frozen: networks and embeddings that do not learn, by name.
            batch: from the reader, with `prompt_embeds` where the stage needs prompts.
            key: all randomness of this call.
        """
        ...


class OnePlayer:
    """A stage in which everything that learns has one optimizer."""

    players = ("model",)

    def turn(self, step: int) -> tuple[str, ...]:
        """Return the one player."""
        return self.players


def cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Return the tree with its floating-point arrays in another type."""

    def one(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
