"""A checkpoint in memory: sizes, parameters and tokenizer, with no behaviour of its own."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from rfjax.config import ModelConfig
from rfjax.models.functional import Params
from rfjax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """What `rfjax.load` returns and every public function takes."""

    config: ModelConfig
    transformer: Params
    """Parameters of `WanTransformer`, layers stacked on the first axis."""
    vae: Params | None = None
    """Parameters of `WanVAE`, or None where the checkpoint holds no autoencoder."""
    text_encoder: Params | None = None
    """Parameters of `UMT5Encoder`, or None."""
    tokenizer: Tokenizer | None = None
    dtype: DTypeLike = jnp.float32
    """Type of the parameters and of the networks' computation."""
    mesh: Mesh | None = None
    """Devices that share the samples of a batch, or work on each together (`rfjax.parallelize`); None is one device."""
