"""What a training run carries from step to step, and all that a checkpoint of it holds."""

import dataclasses
from typing import Any

from jaxtyping import Array, Int

from rfjax.models.functional import Params
from rfjax.pytree import pytree


@pytree()
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Players are the sets of networks that have an optimizer of their own, such as a generator and its critic."""

    step: Int[Array, ""]
    """Steps done."""
    params: dict[str, dict[str, Params]]
    """float32 parameters, by player and network."""
    opt_state: dict[str, Any]
    """The optimizer's state, by player."""
    ema: dict[str, Params]
    """Running average of the first player's networks; empty where none is kept."""
