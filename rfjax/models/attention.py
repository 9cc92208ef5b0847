"""Softmax attention over packed keys, with nothing about memory in it.

Softmax does not care for the order of keys, so callers pack `[own chunk | valid memory | padding]` and pass how many
keys are valid. Each platform has one implementation, chosen when the computation is traced.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rfjax.errors import UserError

Implementation = Literal["xla", "cudnn", "splash"]

SCORE_BYTES, QUERY_BLOCK = 2**26, 256
"""The XLA path works on blocks of at most so many queries, whose scores take at most so much (docs/architecture.md)."""


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K H D"],
    v: Float[Array, "B K H D"],
    kv_length: Int[Array, "B"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B Q H D"]:
    """Attention of every query to the first `kv_length` keys of its sample (to all of them where it is None).

    Scores are scaled by 1/sqrt(D); softmax is computed in float32. `implementation` None takes the platform's own:
    cuDNN for 16-bit types on NVIDIA GPUs, the Pallas splash kernel on TPU, blocked XLA elsewhere.

    Raises:
        UserError: cuDNN was asked for with 32-bit types or a head dimension above 128.
    """
    implementation = implementation or default_implementation(q.dtype, q.shape[-1])
    if implementation == "cudnn":
        return _cudnn(q, k, v, kv_length)
    if implementation == "splash":
        return _splash(q, k, v, kv_length)
    return _xla(q, k, v, kv_length)


def causal_attention(
    q: Float[Array, "B Q H D"], k: Float[Array, "B Q H D"], v: Float[Array, "B Q H D"], chunk: int, clean: int = 0
) -> Float[Array, "B Q H D"]:
    """Attention over a whole video at once in which every chunk sees itself and the chunks before it.

    A loop over chunks and no mask: what is not seen is not computed, and every implementation of `attention` serves.

    Args:
        q: of all tokens, in the order of time.
        k: of the same tokens.
        v: of the same tokens.
        chunk: tokens of a chunk.
        clean: how many of the first tokens are a clean copy of the others, 0 or half of all. Where there is one, the
            others see its past in place of their own.
    """
    parts = []
    for begin in range(0, q.shape[1], chunk):
        past = slice(0, begin if begin < clean else begin - clean)
        own = slice(begin, begin + chunk)
        keys, values = (jnp.concatenate([x[:, past], x[:, own]], axis=1) for x in (k, v))
        parts.append(attention(q[:, own], keys, values))
    return jnp.concatenate(parts, axis=1)


def default_implementation(dtype: jnp.dtype, head_dim: int) -> Implementation:
    """The fastest implementation that the default device has for these operands."""
    platform = jax.default_backend()
    if platform == "tpu":
        return "splash"
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    return "xla"


def _xla(q, k, v, kv_length):
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q * head_dim**-0.5, k, v))
    mask = None if kv_length is None else jnp.arange(keys) < kv_length[:, None, None, None]

    def attend(q_block):
        scores = jnp.einsum("bhqd,bhkd->bhqk", q_block, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        # Dividing after the product with the values saves one pass over the scores.
        # Their maximum has no influence on the result, hence no gradient.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(v.dtype)

    blocks = _query_blocks(queries, batch * heads * keys * 4)
    if blocks == 1:
        return rearrange(attend(q), "b h t d -> b t h d")
    out = jax.lax.map(attend, rearrange(q, "b h (n t) d -> n b h t d", n=blocks))
    return rearrange(out, "n b h t d -> b (n t) h d")


def _query_blocks(queries: int, bytes_per_query: int) -> int:
    """The smallest division of the queries into equal blocks within QUERY_BLOCK and SCORE_BYTES."""
    most = max(min(QUERY_BLOCK, SCORE_BYTES // bytes_per_query), 1)
    return next(blocks for blocks in range(1, queries + 1) if queries % blocks == 0 and queries // blocks <= most)


def _cudnn(q, k, v, kv_length):
    if q.dtype.itemsize != 2 or q.shape[-1] > 128:
        raise UserError(
            f"attention implementation 'cudnn' got {q.dtype} with head dimension {q.shape[-1]}; "
            "it needs a 16-bit type and at most 128 (use 'xla')"
        )
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=kv_length, implementation="cudnn")


def _splash_kernel(queries: int, keys: int, heads: int, interpret: bool = False):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
    block_q, block_kv = min(512, queries), min(1024, keys)
    block_compute = min(512, block_kv)
    sizes = kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_compute,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


def _splash(q, k, v, kv_length):
    """The TPU kernel; XLA cannot divide one, so under a mesh each device is told to run it on its part of the batch."""
    batch, mesh = q.shape[0], jax.sharding.get_abstract_mesh()
    length = jnp.full((batch,), k.shape[1], jnp.int32) if kv_length is None else kv_length
    if mesh.empty or mesh.are_all_axes_manual:  # a device's own part already
        return _splash_on_one_device(q, k, v, length)
    spec = PartitionSpec(mesh.axis_names if batch % mesh.size == 0 else None)
    divided = jax.shard_map(_splash_on_one_device, in_specs=spec, out_specs=spec, check_vma=False)
    return divided(q, k, v, length)


def _splash_on_one_device(q, k, v, length):
    """Tokens padded to whole blocks of 128, padding told apart from keys by its segment."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    padded_q, padded_k = _round_up(queries, 512), _round_up(keys, 1024)
    padded_d = _round_up(head_dim, 128)

    def pad(x, tokens):
        x = jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, padded_d - head_dim)))
        return rearrange(x, "b t h d -> b h t d")

    segments = kernel.SegmentIds(
        q=jnp.zeros((batch, padded_q), jnp.int32),
        kv=(jnp.arange(padded_k) >= length[:, None]).astype(jnp.int32),
    )
    attend = jax.vmap(_splash_kernel(padded_q, padded_k, heads))
    q, k, v = pad(q * head_dim**-0.5, padded_q), pad(k, padded_k), pad(v, padded_k)
    out = jnp.asarray(attend(q, k, v, segment_ids=segments))
    return rearrange(out[:, :, :queries, :head_dim], "b h t d -> b t h d")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
