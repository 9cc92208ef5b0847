"""Layers that more than one network has."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float


class RMSNorm(nnx.Module):
    """Scale every token to unit mean square over all its channels, statistics in float32, then weigh the channels."""

    def __init__(self, dim: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
        """Norm the last axis, in x's type."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)
