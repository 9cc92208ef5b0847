"""How a network's arrays lie on devices that work on a video together: which axis is cut over which axis of the mesh.

Two axes of a mesh divide a video. Over `sequence` the tokens of a chunk are cut, over `tensor` heads and the hidden
channels of the feed-forward part. Nothing here holds a mesh: the one that a computation runs under is asked for its
axes, and without these two everything is left as it is. For self-attention, tokens are exchanged for heads where the
heads divide (DeepSpeed-Ulysses, arXiv 2309.14509); the memory then lies with its heads and is never moved. Heads and
feed-forward are cut as in Megatron-LM (arXiv 1909.08053).
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, PyTree

from rfjax.errors import UserError

SEQUENCE, TENSOR = "sequence", "tensor"
WHOLE = PartitionSpec()

_ALL = (TENSOR, SEQUENCE)

PARAMETERS: tuple[tuple[str, PartitionSpec], ...] = (
    # Layers of the transformer and of the text encoder
    (r"blocks\.((self|cross)_)?attn\.[qkv]\.kernel", PartitionSpec(SEQUENCE, TENSOR)),
    (r"blocks\.((self|cross)_)?attn\.o\.kernel", PartitionSpec(TENSOR, SEQUENCE)),
    (r"blocks\.(self|cross)_attn\.([qkv]\.bias|norm_[qk]\.scale)", PartitionSpec(TENSOR)),
    (r"blocks\.ffn\.(gate|fc1)\.kernel", PartitionSpec(SEQUENCE, TENSOR)),
    (r"blocks\.ffn\.fc2\.kernel", PartitionSpec(TENSOR, SEQUENCE)),
    (r"blocks\.ffn\.fc1\.bias", PartitionSpec(TENSOR)),
    (r"blocks\.((self|cross)_attn\.o|ffn\.fc2)\.bias", WHOLE),
    (r"blocks\.(modulation|cross_norm\.(scale|bias)|norm[12]\.scale)", WHOLE),
    (r"blocks\.position_bias\.embedding", PartitionSpec(None, TENSOR)),
    # What is around them
    (r"(text_embedding\.fc[12]|time_embedding\.fc[12]|time_projection)\.kernel", PartitionSpec(SEQUENCE)),
    (r"(text_embedding\.fc[12]|time_embedding\.fc[12]|time_projection)\.bias", WHOLE),
    (r"(patch_embedding|head)\..*", WHOLE),
    (r"token_embedding\.embedding", PartitionSpec(None, _ALL)),
    (r"norm\.scale", WHOLE),
    # The autoencoder: small, and it divides the width of its frames
    (r"(encoder|decoder|quant_conv|post_quant_conv)\..*", WHOLE),
)
"""Where each parameter of all networks is cut, by its path; for those of a layer without the axis of layers.

What `sequence` cuts is only stored so, where parameters are fully sharded: `gathered` makes it whole, layer by layer.
"""


def parameter_spec(path: str, table: Iterable[tuple[str, PartitionSpec]] = PARAMETERS) -> PartitionSpec:
    """Return where the parameter of that path, joined by dots, is cut.

    Raises:
        UserError: no line of the table names it, or more than one.
    """
    found = [(pattern, spec) for pattern, spec in table if re.fullmatch(pattern, path)]
    if len(found) != 1:
        lines = " and ".join(repr(pattern) for pattern, _ in found) or "none"
        raise UserError(f"parameter {path} must match one line of the table of layouts; it matches {lines}")
    return found[0][1]


def used_spec(path: str) -> PartitionSpec:
    """Return where that parameter is cut while it is used: as it is stored, without `sequence`."""
    return PartitionSpec(*(None if axis == SEQUENCE else axis for axis in parameter_spec(path)))


def path_of(keys: tuple[Any, ...], above: str = "") -> str:
    """Join the keys of a parameter's place in a tree by dots, below those `above`."""
    names = [str(key.key) for key in keys if hasattr(key, "key")]  # without the attribute of an `nnx.Param`
    return ".".join([above, *names] if above else names)


def division() -> tuple[int, int] | None:
    """Return how many devices divide the tokens and the heads of a video where this is traced; None where none do."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)) if not mesh.empty else {}
    if kinds.get(SEQUENCE) != AxisType.Auto or kinds.get(TENSOR) != AxisType.Auto:
        return None
    return mesh.shape[SEQUENCE], mesh.shape[TENSOR]


def exchanges(heads: int) -> bool:
    """Whether self-attention exchanges tokens for heads: there is something to exchange, and the heads divide."""
    parts = division()
    return parts is not None and heads % (parts[0] * parts[1]) == 0


def remembered_spec(heads: int) -> PartitionSpec:
    """Return where keys and values [T, heads * head_dim] of a memory are cut, beside the axes before these two."""
    return PartitionSpec(None, _ALL) if exchanges(heads) else PartitionSpec(SEQUENCE, TENSOR)


def remembered(x: Array, heads: int) -> Array:
    """Lay out keys or values `[..., T, C]` as self-attention reads them."""
    return x if division() is None else _laid(x, remembered_spec(heads))


def by_tokens(x: Float[Array, "*shape T C"]) -> Float[Array, "*shape T C"]:
    """Give every device its share of the tokens, with all channels of them."""
    return x if division() is None else _laid(x, PartitionSpec(SEQUENCE, None))


def whole(x: Array) -> Array:
    """Give every device of a video all of an array."""
    return x if division() is None else _laid(x, WHOLE)


def by_width(frames: PyTree, latent_width: int) -> PyTree:
    """Give every device its columns of frames `[B, T, H, W, C]`, where those of a latent frame divide."""
    parts = division()
    if parts is None or latent_width % (parts[0] * parts[1]):
        return frames
    return jax.tree.map(lambda x: _laid(x, PartitionSpec((SEQUENCE, TENSOR), None)), frames)


def tokens_to_heads(x: Float[Array, "B F T C"], heads: int) -> Float[Array, "B F T C"]:
    """Exchange a share of the tokens for a share of the heads, where the heads divide."""
    return _exchange(x, 3, 2, _TOKENS, _HEADS) if exchanges(heads) else x


def heads_to_tokens(x: Float[Array, "B F T C"], heads: int) -> Float[Array, "B F T C"]:
    """Undo `tokens_to_heads`."""
    return _exchange(x, 2, 3, _HEADS, _TOKENS) if exchanges(heads) else x


_TOKENS, _HEADS = PartitionSpec(None, None, SEQUENCE, TENSOR), PartitionSpec(None, None, None, _ALL)


def _exchange(x, split, joined, before, after):
    def on_each(x):
        return jax.lax.all_to_all(x, SEQUENCE, split, joined, tiled=True)

    return jax.shard_map(on_each, in_specs=before, out_specs=after, axis_names={*_ALL}, check_vma=False)(x)


def _laid(x: Array, last: PartitionSpec) -> Array:
    """Cut the last axes of an array; those before are whole."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * (x.ndim - len(last)), *last))
