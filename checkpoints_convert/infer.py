"""Sizes of the networks, read off the shapes of their tensors."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from checkpoints_convert.matching import Matched, misfit
from rfjax.errors import UserError

_HEAD_DIM = 128
"""Of both published Wan sizes; nothing in a checkpoint says it."""

Shapes = Mapping[str, tuple[int, ...]]


def infer_sizes(matched: Matched, shapes: Shapes) -> dict[str, Any]:
    """Return the settings of the network's section that its tensors determine.

    Raises:
        UserError: a tensor that tells a size is missing or has the wrong number of axes.
    """
    return _READERS[matched.network.name](matched, shapes)


def guess_settings(matched: Matched, sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that tensors do not determine: from the `config.json` beside the file, or as published.

    Raises:
        UserError: the number of heads cannot be guessed.
    """
    if matched.network.name == "transformer":
        guesses = {key: settings[key] for key in ("text_len", "eps", "num_heads") if key in settings}
        if "num_attention_heads" in settings:
            guesses["num_heads"] = settings["num_attention_heads"]
        if sizes["dim"] % _HEAD_DIM == 0:
            guesses.setdefault("num_heads", sizes["dim"] // _HEAD_DIM)
        return guesses
    if matched.network.name == "vae":
        names = {"latents_mean": "latent_mean", "latents_std": "latent_std"}
        return {name: settings[key] for key, name in names.items() if key in settings}
    return {}


def _shape(matched: Matched, shapes: Shapes, path: str, axes: int) -> tuple[int, ...]:
    """Return the shape that most layers have, so that a single bad tensor is the one reported later."""
    found = [name for (slot, _), names in matched.slots.items() if slot == path for name in names]
    if not found:
        name = matched.expected_name(path, 0)
        raise misfit(matched, missing=[name], unexpected=matched.unmapped, known=[name])
    shape = Counter(shapes[name] for name in found).most_common(1)[0][0]
    if len(shape) != axes or 0 in shape:
        raise misfit(matched, misshaped=[f"{found[0]} is {list(shape)}, which has not {axes} axes of 1 and more"])
    return shape


def _transformer(matched: Matched, shapes: Shapes) -> dict[str, Any]:
    _, in_dim, *patch = _shape(matched, shapes, "patch_embedding.kernel", 5)
    out, _ = _shape(matched, shapes, "head.linear.kernel", 2)
    return {
        "patch_size": patch,
        "in_dim": in_dim,
        "dim": _shape(matched, shapes, "blocks.self_attn.q.kernel", 2)[0],
        "ffn_dim": _shape(matched, shapes, "blocks.ffn.fc1.kernel", 2)[0],
        "freq_dim": _shape(matched, shapes, "time_embedding.fc1.kernel", 2)[1],
        "text_dim": _shape(matched, shapes, "text_embedding.fc1.kernel", 2)[1],
        "out_dim": out // (patch[0] * patch[1] * patch[2]),
        "num_layers": matched.layers(),
    }


def _vae(matched: Matched, shapes: Shapes) -> dict[str, Any]:
    """Read the levels off the encoder's blocks: residual ones, and one down-sampling between two levels.

    Raises:
        UserError: the blocks' numbers tell of no residual blocks, or of more blocks than there are tensors.
    """
    dim = _shape(matched, shapes, "encoder.conv_in.kernel", 5)[0]
    parts = {tuple(path.split(".")[2:4]) for path, _ in matched.slots if path.startswith("encoder.down.")}
    samplers = sorted(int(block) for block, part in parts if part == "conv")
    last = max((int(block) for block, part in parts if part != "conv"), default=0)
    residual = samplers[0] if samplers else last + 1
    if residual == 0 or (len(samplers) + 1) * (residual + 1) > len(matched.slots):
        raise UserError(
            f"{matched.label} has {len(samplers) + 1} levels of {residual} residual blocks by its names, which its "
            f"{len(matched.slots)} tensors cannot be"
        )
    widths = [
        _shape(matched, shapes, f"encoder.down.{i}.conv2.kernel", 5)[0] for i in (*(s - 1 for s in samplers), last)
    ]
    return {
        "dim": dim,
        "z_dim": _shape(matched, shapes, "decoder.conv_in.kernel", 5)[1],
        "dim_mult": [width // dim for width in widths],
        "num_res_blocks": residual,
        "temporal_downsample": [(str(i), "time_conv") in parts for i in samplers],
    }


def _text_encoder(matched: Matched, shapes: Shapes) -> dict[str, Any]:
    vocab, dim = _shape(matched, shapes, "token_embedding.embedding", 2)
    buckets, heads = _shape(matched, shapes, "blocks.position_bias.embedding", 2)
    return {
        "vocab": vocab,
        "dim": dim,
        "dim_attn": _shape(matched, shapes, "blocks.attn.q.kernel", 2)[0],
        "dim_ffn": _shape(matched, shapes, "blocks.ffn.fc1.kernel", 2)[0],
        "num_heads": heads,
        "num_layers": matched.layers(),
        "num_buckets": buckets,
    }


_READERS: dict[str, Callable[[Matched, Shapes], dict[str, Any]]] = {
    "transformer": _transformer,
    "vae": _vae,
    "text_encoder": _text_encoder,
}
