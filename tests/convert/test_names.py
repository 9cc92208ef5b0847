"""Every name of the published checkpoints finds its parameter; shapes only."""

import json
from collections import Counter

import pytest
from checkpoint_files import GOLDEN

from checkpoints_convert.export import upstream_shapes
from checkpoints_convert.infer import guess_settings, infer_sizes
from checkpoints_convert.matching import check, match
from checkpoints_convert.names import bare_name, flat_up_blocks, nested_up_block
from checkpoints_convert.networks import NETWORKS
from rfjax.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from rfjax.io.checkpoints import parameter_trees

WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
PUBLISHED = {
    "self_forcing_dmd_generator": ("transformer", "upstream", TransformerConfig()),
    "wan2.1_t2v_1.3b": ("transformer", "upstream", TransformerConfig()),
    "wan2.1_t2v_14b": ("transformer", "upstream", WAN_14B),
    "diffusers_wan2.1_t2v_1.3b_transformer": ("transformer", "diffusers", TransformerConfig()),
    "wan2.1_vae": ("vae", "upstream", VAEConfig()),
    "diffusers_wan2.1_vae": ("vae", "diffusers", VAEConfig()),
    "models_t5_umt5-xxl-enc-bf16": ("text_encoder", "upstream", TextEncoderConfig()),
    "transformers_umt5_xxl_encoder": ("text_encoder", "transformers", TextEncoderConfig()),
}
SECTIONS = {"transformer": TransformerConfig, "vae": VAEConfig, "text_encoder": TextEncoderConfig}


def published(name: str) -> dict[str, tuple[int, ...]]:
    shapes = json.loads((GOLDEN / "upstream_keys" / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items()}


def test_every_list_is_tested():
    assert {path.stem for path in (GOLDEN / "upstream_keys").glob("*.json")} == PUBLISHED.keys()


def _whole_config(network, sizes) -> ModelConfig:
    return ModelConfig(**{NETWORKS[network].section: sizes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_inferred_and_every_tensor_is_used_once(name):
    network, layout, sizes = PUBLISHED[name]
    shapes = published(name)
    matched = match(name, NETWORKS[network], shapes)
    assert matched.layout == layout
    inferred = infer_sizes(matched, shapes)
    assert SECTIONS[network].from_dict({**guess_settings(matched, inferred, {}), **inferred}) == sizes
    expected = parameter_trees(_whole_config(network, sizes))[network]
    check(matched, shapes, dict.fromkeys(shapes, "bfloat16"), expected, (1, 2, 2))
    used = Counter(key for found in matched.slots.values() for key in found)
    assert used == Counter(list(shapes))


@pytest.mark.parametrize("name", ["wan2.1_t2v_14b", "wan2.1_vae", "models_t5_umt5-xxl-enc-bf16"])
def test_export_has_upstream_names_and_shapes(name):
    network, _, sizes = PUBLISHED[name]
    expected = parameter_trees(_whole_config(network, sizes))[network]
    assert upstream_shapes(NETWORKS[network], expected, (1, 2, 2)) == published(name)


def test_wrappers_of_sharded_training_are_dropped():
    name = "model._fsdp_wrapped_module.blocks.3._checkpoint_wrapped_module._fsdp_wrapped_module.ffn._orig_mod.0.weight"
    assert bare_name(name) == "blocks.3.ffn.0.weight"
    assert bare_name("_orig_mod.model.head.modulation") == "head.modulation"


@pytest.mark.parametrize("number", ["999999", "9" * 5000])
def test_absurd_numbers_are_unknown_names(number):
    names = ("decoder.up_blocks.0.resnets.NUMBER.conv1.bias", "decoder.up_blocks.NUMBER.upsamplers.0.resample.1.bias")
    added = tuple(name.replace("NUMBER", number) for name in names)
    assert match("", NETWORKS["vae"], [*published("diffusers_wan2.1_vae"), *added]).unmapped == added


def test_counting_up_blocks_can_be_undone():
    names = [name for name in published("diffusers_wan2.1_vae") if "up_blocks" in name]
    flat = flat_up_blocks(names)
    assert flat["decoder.up_blocks.2.upsamplers.0.resample.1.bias"] == "decoder.up_blocks.11.resample.1.bias"
    assert flat["decoder.up_blocks.3.resnets.0.conv1.bias"] == "decoder.up_blocks.12.conv1.bias"
    assert [nested_up_block(flat[name], resnets=3) for name in names] == names
