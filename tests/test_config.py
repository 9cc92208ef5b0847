import json

import pytest
from conftest import GOLDEN

from rfjax.config import ModelConfig, TransformerConfig, VAEConfig, load_model_config, preset_path
from rfjax.errors import UserError


def test_the_golden_configuration_is_read_as_it_stands():
    config = load_model_config(GOLDEN / "config.json")
    assert (config.transformer.dim, config.transformer.num_layers, config.chunk_frames) == (64, 3, 3)
    assert config.vae is not None
    assert config.vae.temporal_downsample == (False, True, True)
    assert config.umt5 is not None
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transfromer": {}}, "config.transfromer is not a known setting; did you mean 'transformer'"),
        ({"transformer": {"nun_heads": 2}}, "transformer.nun_heads is not a known setting; did you mean 'num_heads'"),
        ({"transformer": {"num_heads": 0}}, "num_heads is 0; a positive whole number"),
        ({"transformer": {"num_heads": 7}}, "dim 1536 over num_heads 7"),
        ({"transformer": {"dim": "64"}}, "transformer.dim is '64'; a whole number is needed"),
        ({"transformer": {"dim": True}}, "transformer.dim is True; a whole number is needed"),
        ({"transformer": {"qk_norm": False}}, "qk_norm is False; rfjax has this network with True only"),
        ({"transformer": {"patch_size": [2, 2, 2]}}, "patch_size is (2, 2, 2); rfjax needs (1, rows, columns)"),
        ({"transformer": 3}, "config.transformer is 3; a mapping is needed"),
        ({"vae": {"z_dim": 4}}, "latent_mean has 16 numbers; z_dim 4"),
        ({"vae": {"dim_mult": [1, 2]}}, "temporal_downsample has 3 entries; 2 levels need 1"),
        ({"vae": {"attn_scales": [0.5]}}, "attn_scales is [0.5]; rfjax has this network with [] only"),
        ({"umt5": {"shared_pos": True}}, "shared_pos is True"),
        ({"frame_tokens": 12}, "frame_tokens is 12; a latent frame of 60x104 has 1560"),
        ({"denoising_steps": []}, "denoising_steps is []; numbers that fall from at most 1000"),
        ({"denoising_steps": [250, 500]}, "denoising_steps is [250, 500]"),
        ({"denoising_steps": [1500, 750]}, "denoising_steps is [1500, 750]"),
        ({"timestep_shift": "nan"}, "timestep_shift is 'nan'; a finite number"),
        ({"timestep_shift": -1}, "timestep_shift is -1.0; a positive number"),
        ({"transformer": {"eps": -1}}, "transformer.eps is -1.0; a positive number"),
        ({"vae": {"latent_std": [0] * 16}}, "vae.latent_std has 0.0; positive numbers"),
        ({"latent_height": 61}, "latent_height is 61; a multiple of the patch's 2"),
        ({"denoising_steps": 1000}, "denoising_steps is 1000; a list is needed"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError) as error:
        ModelConfig.from_dict(change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "- 1", "holds a list; a mapping"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.yaml", "# nothing", "is empty; a mapping"),
        ("a.yaml", "description: \xe9", r"a\.yaml is not UTF-8 \(byte 13\); save it as UTF-8"),
        ("missing.yaml", None, r"cannot read the configuration .*missing\.yaml: No such file or directory$"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        load_model_config(tmp_path / name)


def test_presets_are_found_and_named():
    assert load_model_config(preset_path("models", "wan_1_3b")).transformer == TransformerConfig()
    large = load_model_config(preset_path("models", "wan_14b")).transformer
    assert (large.dim, large.num_heads, large.ffn_dim, large.num_layers) == (5120, 40, 13824, 40)
    with pytest.raises(UserError, match=r"no preset 'wan' in configs/models; there are: .*wan_1_3b"):
        preset_path("models", "wan")


def test_factors_of_wan():
    assert (VAEConfig().spatial_factor, VAEConfig().temporal_factor) == (8, 4)
    assert TransformerConfig().frame_tokens(60, 104) == 1560
