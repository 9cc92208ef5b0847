"""Which tensor of which layout is which parameter: one table for each network and layout.

A rule's two templates serve both directions. `{layer}` numbers the layers that rfjax stacks on the first axis, `{i}` a
block of the autoencoder, `{p}` is one of q, k, v, o. The pattern is einops', from PyTorch's axes to rfjax's.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

_NUMBER = r"0|[1-9][0-9]{0,4}"
"""Of a layer or block; names with larger numbers are unknown ones, before anything is sized by them."""
_PLACEHOLDERS = {"{layer}": f"(?P<layer>{_NUMBER})", "{i}": f"(?P<i>{_NUMBER})", "{p}": "(?P<p>[qkvo])"}

SAME = "c -> c"
LINEAR = "o i -> i o"
TABLE = "n d -> n d"
POINT_2D = "o i 1 1 -> i o"
POINT_3D = "o i 1 1 1 -> i o"
TIME_CONV = "o i t 1 1 -> t i o"
CONV_2D = "o i h w -> h w i o"
CONV_3D = "o i t h w -> t h w i o"
PATCH = "o i pt ph pw -> (pt ph pw i) o"
MODULATION = "1 n d -> n d"
GAMMA_2D = "c 1 1 -> c"
GAMMA_3D = "c 1 1 1 -> c"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table."""

    source: str
    """Template of the tensor's name in the file."""
    target: str
    """Template of the parameter's path, joined by dots."""
    pattern: str
    """Einops pattern from the file's axes to the parameter's (without the layer axis)."""

    @property
    def stacked(self) -> bool:
        """Whether the parameter holds this tensor of all layers."""
        return "{layer}" in self.source

    def find(self, name: str) -> dict[str, str] | None:
        """Return the placeholders' values in a tensor's name, or None where the rule does not apply."""
        return _find(self.source, name)

    def find_target(self, path: str) -> dict[str, str] | None:
        """Return the placeholders' values in a parameter's path, or None where the rule does not apply."""
        return _find(self.target, path)


@functools.cache
def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", template)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


def _find(template: str, text: str) -> dict[str, str] | None:
    match = _regex(template).fullmatch(text)
    return match.groupdict() if match else None


def _layer(source: str, target: str, pattern: str) -> tuple[Rule, Rule]:
    """A layer with weight and bias."""
    return Rule(f"{source}.weight", f"{target}.kernel", pattern), Rule(f"{source}.bias", f"{target}.bias", SAME)


def _within(stems: Mapping[str, str], rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules below several stems."""
    rules = tuple(rules)
    return tuple(
        Rule(f"{source}.{rule.source}", f"{target}.{rule.target}", rule.pattern)
        for source, target in stems.items()
        for rule in rules
    )


_UPSTREAM_ATTENTION = (
    *_layer("{p}", "{p}", LINEAR),
    Rule("norm_q.weight", "norm_q.scale", SAME),
    Rule("norm_k.weight", "norm_k.scale", SAME),
)

TRANSFORMER_UPSTREAM = (
    *_layer("patch_embedding", "patch_embedding", PATCH),
    *_layer("text_embedding.0", "text_embedding.fc1", LINEAR),
    *_layer("text_embedding.2", "text_embedding.fc2", LINEAR),
    *_layer("time_embedding.0", "time_embedding.fc1", LINEAR),
    *_layer("time_embedding.2", "time_embedding.fc2", LINEAR),
    *_layer("time_projection.1", "time_projection", LINEAR),
    Rule("blocks.{layer}.modulation", "blocks.modulation", MODULATION),
    *_within(
        {
            "blocks.{layer}.self_attn": "blocks.self_attn",
            "blocks.{layer}.cross_attn": "blocks.cross_attn",
        },
        _UPSTREAM_ATTENTION,
    ),
    Rule("blocks.{layer}.norm3.weight", "blocks.cross_norm.scale", SAME),
    Rule("blocks.{layer}.norm3.bias", "blocks.cross_norm.bias", SAME),
    *_layer("blocks.{layer}.ffn.0", "blocks.ffn.fc1", LINEAR),
    *_layer("blocks.{layer}.ffn.2", "blocks.ffn.fc2", LINEAR),
    Rule("head.modulation", "head.modulation", MODULATION),
    *_layer("head.head", "head.linear", LINEAR),
)

_DIFFUSERS_ATTENTION = (
    *_layer("to_q", "q", LINEAR),
    *_layer("to_k", "k", LINEAR),
    *_layer("to_v", "v", LINEAR),
    *_layer("to_out.0", "o", LINEAR),
    Rule("norm_q.weight", "norm_q.scale", SAME),
    Rule("norm_k.weight", "norm_k.scale", SAME),
)

TRANSFORMER_DIFFUSERS = (
    *_layer("patch_embedding", "patch_embedding", PATCH),
    *_layer("condition_embedder.text_embedder.linear_1", "text_embedding.fc1", LINEAR),
    *_layer("condition_embedder.text_embedder.linear_2", "text_embedding.fc2", LINEAR),
    *_layer("condition_embedder.time_embedder.linear_1", "time_embedding.fc1", LINEAR),
    *_layer("condition_embedder.time_embedder.linear_2", "time_embedding.fc2", LINEAR),
    *_layer("condition_embedder.time_proj", "time_projection", LINEAR),
    Rule("blocks.{layer}.scale_shift_table", "blocks.modulation", MODULATION),
    *_within(
        {"blocks.{layer}.attn1": "blocks.self_attn", "blocks.{layer}.attn2": "blocks.cross_attn"},
        _DIFFUSERS_ATTENTION,
    ),
    Rule("blocks.{layer}.norm2.weight", "blocks.cross_norm.scale", SAME),
    Rule("blocks.{layer}.norm2.bias", "blocks.cross_norm.bias", SAME),
    *_layer("blocks.{layer}.ffn.net.0.proj", "blocks.ffn.fc1", LINEAR),
    *_layer("blocks.{layer}.ffn.net.2", "blocks.ffn.fc2", LINEAR),
    Rule("scale_shift_table", "head.modulation", MODULATION),
    *_layer("proj_out", "head.linear", LINEAR),
)

_ATTENTION_2D = (
    Rule("norm.gamma", "norm.scale", GAMMA_2D),
    *_layer("to_qkv", "qkv", POINT_2D),
    *_layer("proj", "proj", POINT_2D),
)
_RESAMPLE = (*_layer("resample.1", "conv", CONV_2D), *_layer("time_conv", "time_conv", TIME_CONV))

_UPSTREAM_RESIDUAL = (
    Rule("residual.0.gamma", "norm1.scale", GAMMA_3D),
    *_layer("residual.2", "conv1", CONV_3D),
    Rule("residual.3.gamma", "norm2.scale", GAMMA_3D),
    *_layer("residual.6", "conv2", CONV_3D),
    *_layer("shortcut", "shortcut", POINT_3D),
)

VAE_UPSTREAM = (
    *_within(
        {"encoder": "encoder", "decoder": "decoder"},
        (
            *_layer("conv1", "conv_in", CONV_3D),
            *_within({"middle.0": "mid.block1", "middle.2": "mid.block2"}, _UPSTREAM_RESIDUAL),
            *_within({"middle.1": "mid.attention"}, _ATTENTION_2D),
            Rule("head.0.gamma", "norm_out.scale", GAMMA_3D),
            *_layer("head.2", "conv_out", CONV_3D),
        ),
    ),
    *_within(
        {"encoder.downsamples.{i}": "encoder.down.{i}", "decoder.upsamples.{i}": "decoder.up.{i}"},
        (*_UPSTREAM_RESIDUAL, *_RESAMPLE),
    ),
    *_layer("conv1", "quant_conv", POINT_3D),
    *_layer("conv2", "post_quant_conv", POINT_3D),
)

_DIFFUSERS_RESIDUAL = (
    Rule("norm1.gamma", "norm1.scale", GAMMA_3D),
    *_layer("conv1", "conv1", CONV_3D),
    Rule("norm2.gamma", "norm2.scale", GAMMA_3D),
    *_layer("conv2", "conv2", CONV_3D),
    *_layer("conv_shortcut", "shortcut", POINT_3D),
)

# The decoder's `up_blocks` arrive here counted through, see `flat_up_blocks`.
VAE_DIFFUSERS = (
    *_within(
        {"encoder": "encoder", "decoder": "decoder"},
        (
            *_layer("conv_in", "conv_in", CONV_3D),
            *_within({"mid_block.resnets.0": "mid.block1", "mid_block.resnets.1": "mid.block2"}, _DIFFUSERS_RESIDUAL),
            *_within({"mid_block.attentions.0": "mid.attention"}, _ATTENTION_2D),
            Rule("norm_out.gamma", "norm_out.scale", GAMMA_3D),
            *_layer("conv_out", "conv_out", CONV_3D),
        ),
    ),
    *_within(
        {"encoder.down_blocks.{i}": "encoder.down.{i}", "decoder.up_blocks.{i}": "decoder.up.{i}"},
        (*_DIFFUSERS_RESIDUAL, *_RESAMPLE),
    ),
    *_layer("quant_conv", "quant_conv", POINT_3D),
    *_layer("post_quant_conv", "post_quant_conv", POINT_3D),
)

TEXT_ENCODER_UPSTREAM = (
    Rule("token_embedding.weight", "token_embedding.embedding", TABLE),
    Rule("blocks.{layer}.norm1.weight", "blocks.norm1.scale", SAME),
    Rule("blocks.{layer}.attn.{p}.weight", "blocks.attn.{p}.kernel", LINEAR),
    Rule("blocks.{layer}.norm2.weight", "blocks.norm2.scale", SAME),
    Rule("blocks.{layer}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", LINEAR),
    Rule("blocks.{layer}.ffn.fc1.weight", "blocks.ffn.fc1.kernel", LINEAR),
    Rule("blocks.{layer}.ffn.fc2.weight", "blocks.ffn.fc2.kernel", LINEAR),
    Rule("blocks.{layer}.pos_embedding.embedding.weight", "blocks.position_bias.embedding", TABLE),
    Rule("norm.weight", "norm.scale", SAME),
)

TEXT_ENCODER_TRANSFORMERS = (
    Rule("shared.weight", "token_embedding.embedding", TABLE),
    Rule("encoder.embed_tokens.weight", "token_embedding.embedding", TABLE),
    *_within(
        {"encoder.block.{layer}.layer": "blocks"},
        (
            Rule("0.layer_norm.weight", "norm1.scale", SAME),
            Rule("0.SelfAttention.{p}.weight", "attn.{p}.kernel", LINEAR),
            Rule("0.SelfAttention.relative_attention_bias.weight", "position_bias.embedding", TABLE),
            Rule("1.layer_norm.weight", "norm2.scale", SAME),
            Rule("1.DenseReluDense.wi_0.weight", "ffn.gate.kernel", LINEAR),
            Rule("1.DenseReluDense.wi_1.weight", "ffn.fc1.kernel", LINEAR),
            Rule("1.DenseReluDense.wo.weight", "ffn.fc2.kernel", LINEAR),
        ),
    ),
    Rule("encoder.final_layer_norm.weight", "norm.scale", SAME),
)

TIED = frozenset({"shared.weight", "encoder.embed_tokens.weight"})
"""The one pair of names under which a file may hold the same tensor twice."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def bare_name(name: str) -> str:
    """Drop what sharded training and compilation put into a tensor's name, and the leading `model.`."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


_UP_BLOCK = re.compile(rf"decoder\.up_blocks\.({_NUMBER})\.(resnets|upsamplers)\.({_NUMBER})\.(.*)")


def flat_up_blocks(names: Iterable[str]) -> dict[str, str]:
    """Count diffusers' nested decoder blocks through, as its encoder and upstream do: `decoder.up_blocks.<flat>`.

    Each level has as many `resnets` as the largest number says, then one upsampler.

    Returns:
        The new name of every name; those that are no nested decoder block keep theirs.
    """
    names = list(names)
    found = {name: match for name in names if (match := _UP_BLOCK.fullmatch(name))}
    resnets = 1 + max((int(match[3]) for match in found.values() if match[2] == "resnets"), default=0)
    flat = {
        name: int(match[1]) * (resnets + 1) + (int(match[3]) if match[2] == "resnets" else resnets + int(match[3]))
        for name, match in found.items()
    }
    return {name: f"decoder.up_blocks.{flat[name]}.{found[name][4]}" if name in found else name for name in names}


def nested_up_block(name: str, resnets: int) -> str:
    """Undo `flat_up_blocks` for one name, where a level has this many `resnets`."""
    match = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.*)", name)
    if not match:
        return name
    level, within = divmod(int(match[1]), resnets + 1)
    kind = f"resnets.{within}" if within < resnets else "upsamplers.0"
    return f"decoder.up_blocks.{level}.{kind}.{match[2]}"
