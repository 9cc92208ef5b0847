"""Attention of a chunk's tokens: to themselves and what is remembered, and to the prompt.

Where devices divide a video (`rfjax.models.layout`), each attends with its own heads. Where the heads do not divide
over `sequence`, each attends with its own tokens and gathers all keys.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rfjax.models.attention import attention
from rfjax.models.layout import SEQUENCE, TENSOR, WHOLE, division, exchanges, remembered_spec


def chunk_attention(
    q: Float[Array, "B F T H D"],
    k: Float[Array, "B F T H D"],
    v: Float[Array, "B F T H D"],
    past: tuple[Float[Array, "B S T H D"], Float[Array, "B S T H D"], Int[Array, "B"]] | None = None,
) -> Float[Array, "B F T H D"]:
    """Attention of a chunk to itself and to what is remembered.

    Args:
        q: of the chunk's tokens, rotated.
        k: the same.
        v: of the same tokens.
        past: remembered keys, rotated, and values, valid frames first, and how many of the S frames are valid.
    """
    if division() is None:
        return _attend(q, k, v, past)
    gather = not exchanges(q.shape[3])
    spec = PartitionSpec(None, None, *remembered_spec(q.shape[3]))

    def on_each(q, k, v, past):
        if gather:
            k, v = _gathered(k), _gathered(v)
            past = None if past is None else (_gathered(past[0]), _gathered(past[1]), past[2])
        return _attend(q, k, v, past)

    past_spec = WHOLE if past is None else (spec, spec, WHOLE)
    return _on_every_device(on_each, (spec, spec, spec, past_spec), spec)(q, k, v, past)


def prompt_attention(
    q: Float[Array, "B F T H D"], k: Float[Array, "B K H D"], v: Float[Array, "B K H D"]
) -> Float[Array, "B F T H D"]:
    """Attention of a chunk to all tokens of its prompt."""

    def attend(q, k, v):
        out = attention(rearrange(q, "b f t h d -> b (f t) h d"), k, v)
        return rearrange(out, "b (f t) h d -> b f t h d", f=q.shape[1])

    if division() is None:
        return attend(q, k, v)
    tokens, prompt = PartitionSpec(None, None, SEQUENCE, TENSOR), PartitionSpec(None, None, TENSOR)
    return _on_every_device(attend, (tokens, prompt, prompt), tokens)(q, k, v)


def _attend(q, k, v, past):
    frames, tokens = q.shape[1], k.shape[2]
    q, k, v = (rearrange(x, "b f t h d -> b (f t) h d") for x in (q, k, v))
    length = None
    if past is not None:
        length = past[2] * tokens + k.shape[1]
        past_k, past_v = (rearrange(x, "b s t h d -> b (s t) h d") for x in past[:2])
        k, v = jnp.concatenate([k, past_k], axis=1), jnp.concatenate([v, past_v], axis=1)
    return rearrange(attention(q, k, v, length), "b (f t) h d -> b f t h d", f=frames)


def _gathered(x):
    return jax.lax.all_gather(x, SEQUENCE, axis=2, tiled=True)


def _on_every_device(function, in_specs, out_specs):
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names={SEQUENCE, TENSOR}, check_vma=False
    )
