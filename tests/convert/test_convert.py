import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tokenizers
from checkpoint_files import BFLOAT16, GOLDEN, Ordered, View, random_tensors, save_safetensors, save_shards, save_torch

from checkpoints_convert.convert import convert
from checkpoints_convert.export import export
from checkpoints_convert.torch_zip import read_torch
from rfjax.config import load_model_config
from rfjax.io.checkpoints import load
from rfjax.models.functional import bind
from rfjax.models.text_encoder import encode_tokens
from rfjax.models.transformer import WanTransformer
from rfjax.models.vae import decode, encode

CONFIG = GOLDEN / "config.json"


def golden_tensors(name: str, key: str | None = None) -> dict[str, np.ndarray]:
    content = read_torch(GOLDEN / name)
    return {n: np.array(tensor.load()) for n, tensor in (content[key] if key else content).items()}


def run(transformer, output, **options):
    convert(transformer, output, **{"config": CONFIG, "report": lambda _: None, **options})
    return load(output)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """All three tiny networks, with the bidirectional transformer."""
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    lines: list[str] = []
    convert(
        GOLDEN / "wan_bidirectional_tiny.pth",
        folder,
        vae=GOLDEN / "wan_vae_tiny.pth",
        text_encoder=GOLDEN / "umt5_tiny.pth",
        config=CONFIG,
        report=lines.append,
    )
    assert [line.split(":")[0] for line in lines] == ["transformer", "vae", "text_encoder", f"wrote {folder}"]
    return folder


def test_configuration_is_written(converted):
    assert load_model_config(converted / "config.json") == load_model_config(CONFIG)


def test_bidirectional_network_by_value(converted):
    golden = np.load(GOLDEN / "bidirectional.npz")
    model = load(converted)
    timestep = jnp.repeat(jnp.asarray(golden["timestep"], jnp.float32)[:, None], golden["x"].shape[1], axis=1)

    @jax.jit
    def flow(params):
        network = bind(WanTransformer, model.config.transformer, params)
        latents = jnp.asarray(golden["x"].transpose(0, 1, 3, 4, 2))
        return network(latents, timestep, network.embed_text(jnp.asarray(golden["context"])))[0]

    result = np.asarray(flow(model.transformer)).transpose(0, 1, 4, 2, 3)
    np.testing.assert_allclose(result, golden["flow"], atol=1e-4 * np.ptp(golden["flow"]))


def test_text_encoder_by_value(converted):
    golden = np.load(GOLDEN / "umt5.npz")
    model = load(converted)
    assert model.config.umt5 is not None
    assert model.text_encoder is not None
    ids, mask = (jnp.asarray(golden[name], jnp.int32) for name in ("ids", "mask"))
    result = encode_tokens(model.config.umt5, model.text_encoder, ids, mask)
    np.testing.assert_allclose(result, golden["prompt_embeds"], atol=1e-4 * np.ptp(golden["prompt_embeds"]))


@pytest.mark.slow
def test_autoencoder_by_value(converted):
    golden = np.load(GOLDEN / "vae.npz")
    model = load(converted)
    assert model.config.vae is not None
    assert model.vae is not None
    video = jnp.asarray(golden["video"].transpose(0, 2, 3, 4, 1))
    latents = encode(model.config.vae, model.vae, video)
    expected = golden["latents"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_allclose(latents, expected, atol=1e-4 * np.ptp(expected))
    decoded = decode(model.config.vae, model.vae, jnp.asarray(golden["z"].transpose(0, 2, 3, 4, 1)))
    np.testing.assert_allclose(decoded, np.clip(golden["decoded"].transpose(0, 2, 3, 4, 1), -1, 1), atol=2e-4)


def test_axes_of_each_kind_of_tensor(converted):
    """A few formulas written out, independent of the tables."""
    vae = golden_tensors("wan_vae_tiny.pth")
    video = load(converted).vae
    assert video is not None
    encoder, up = video["encoder"], video["decoder"]["up"]
    np.testing.assert_array_equal(encoder["conv_in"]["kernel"], np.einsum("oithw->thwio", vae["encoder.conv1.weight"]))
    np.testing.assert_array_equal(
        up[2]["time_conv"]["kernel"], np.einsum("oit->tio", vae["decoder.upsamples.2.time_conv.weight"][..., 0, 0])
    )
    np.testing.assert_array_equal(
        up[2]["conv"]["kernel"], np.einsum("oihw->hwio", vae["decoder.upsamples.2.resample.1.weight"])
    )
    np.testing.assert_array_equal(video["quant_conv"]["kernel"], vae["conv1.weight"][..., 0, 0, 0].T)
    np.testing.assert_array_equal(up[10]["norm2"]["scale"], vae["decoder.upsamples.10.residual.3.gamma"].ravel())
    wan = golden_tensors("wan_bidirectional_tiny.pth")
    kernel = load(converted).transformer["patch_embedding"]["kernel"]
    weight = wan["patch_embedding.weight"]
    for row, column, channel in ((0, 0, 1), (0, 1, 0), (1, 0, 3)):
        feature = (row * 2 + column) * weight.shape[1] + channel
        np.testing.assert_array_equal(kernel[feature], weight[:, channel, 0, row, column])


@pytest.mark.parametrize("key", ["generator", "generator_ema", None])
def test_key_of_a_self_forcing_checkpoint(tmp_path, key):
    model = run(GOLDEN / "self_forcing_tiny.pt", tmp_path / "out", transformer_key=key)
    tensors = golden_tensors("self_forcing_tiny.pt", key or "generator_ema")
    for layer in range(3):
        np.testing.assert_array_equal(
            model.transformer["blocks"]["cross_attn"]["o"]["kernel"][layer],
            tensors[f"model.blocks.{layer}.cross_attn.o.weight"].T,
        )
    assert (model.config.vae, model.vae, model.config.umt5, model.text_encoder) == (None,) * 4


@pytest.mark.parametrize(
    ("preset", "key", "steps"),
    [
        ("causvid", "generator", (1000, 757, 522)),
        ("rolling_forcing", "generator_ema", (1000, 800, 600, 400, 200)),
        ("self_forcing", "generator_ema", (1000, 750, 500, 250)),
    ],
)
def test_presets_choose_key_and_schedule(tmp_path, preset, key, steps):
    """The golden file holds both keys, so that the preset's own choice shows."""
    settings = tmp_path / "settings.yaml"
    settings.write_text("transformer: {num_heads: 2}\n", encoding="utf-8")
    model = run(GOLDEN / "self_forcing_tiny.pt", tmp_path / "out", preset=preset, config=settings)
    assert model.config.denoising_steps == steps
    assert model.config.timestep_shift == (8.0 if preset == "causvid" else 5.0)
    assert model.config.warp_denoising_steps == (preset != "causvid")
    tensors = golden_tensors("self_forcing_tiny.pt", key)
    got = model.transformer["blocks"]["cross_attn"]["o"]["kernel"][0]
    np.testing.assert_array_equal(got, tensors["model.blocks.0.cross_attn.o.weight"].T)


def test_a_preset_serves_files_without_its_key_and_a_config_over_it(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("timestep_shift: 3.0\ntransformer: {num_heads: 2}\n", encoding="utf-8")
    model = run(GOLDEN / "wan_bidirectional_tiny.pth", tmp_path / "out", preset="causvid", config=settings)
    assert model.config.denoising_steps == (1000, 757, 522)
    assert model.config.timestep_shift == 3.0


@pytest.mark.parametrize("key", ["generator", "state_dict"])
def test_a_single_state_dict_needs_no_key(tmp_path, key):
    tensors = golden_tensors("wan_bidirectional_tiny.pth")
    content = {key: Ordered(tensors), "step": 600, "ema_decay": 0.99, "counter": np.array(3, np.int64)}
    run(save_torch(tmp_path / "a.pt", content), tmp_path / "out")


def same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_wrapped_names(tmp_path, converted):
    tensors = golden_tensors("wan_bidirectional_tiny.pth")
    wrapped = {
        "model._fsdp_wrapped_module." + n.replace(".ffn.", "._checkpoint_wrapped_module.ffn._orig_mod."): t
        for n, t in tensors.items()
    }
    model = run(save_torch(tmp_path / "a.pt", {"generator": wrapped}), tmp_path / "out")
    same(model.transformer, load(converted).transformer)


def to_diffusers(name: str) -> str:
    """The names that diffusers gives upstream's tensors, written down apart from the converter's tables."""
    for old, new in (
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        ("modulation", "scale_shift_table"),
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"),
        ("norm3", "norm2"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        *((f".{p}.", f".to_{p}.") for p in "qkv"),
        (".o.", ".to_out.0."),
    ):
        name = name.replace(old, new)
    return name


def test_sharded_diffusers_folder_with_its_config(tmp_path, converted):
    """The parent folder is given, and `config.json` beside the shards tells the number of heads."""
    tensors = {to_diffusers(n): t for n, t in golden_tensors("wan_bidirectional_tiny.pth").items()}
    save_shards(tmp_path / "wan" / "transformer", tensors, "diffusion_pytorch_model")
    settings = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "text_len": 12}
    (tmp_path / "wan" / "transformer" / "config.json").write_text(json.dumps(settings))
    model = run(tmp_path / "wan", tmp_path / "out", config=None)
    same(model.transformer, load(converted).transformer)
    assert model.config.transformer == load(converted).config.transformer


def test_single_safetensors_file(tmp_path, converted):
    path = save_safetensors(
        tmp_path / "diffusion_pytorch_model.safetensors", golden_tensors("wan_bidirectional_tiny.pth")
    )
    for given in (path, tmp_path):
        model = run(given, tmp_path / f"out-{given.name}")
        same(model.transformer, load(converted).transformer)


@pytest.mark.parametrize("source", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_16_bit_sources(tmp_path, source, dtype):
    kind = BFLOAT16 if source == "bfloat16" else np.dtype(source)
    tensors = {n: t.astype(kind) for n, t in golden_tensors("wan_bidirectional_tiny.pth").items()}
    convert(save_torch(tmp_path / "a.pt", tensors), tmp_path / "out", config=CONFIG, dtype=dtype, report=lambda _: None)
    stored = ocp.PyTreeCheckpointer().restore(tmp_path / "out" / "transformer")
    bias = stored["blocks"]["ffn"]["fc1"]["bias"]
    assert bias.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(bias[1], tensors["blocks.1.ffn.0.bias"].astype(bias.dtype))


def test_transposed_views_in_the_file(tmp_path, converted):
    """Tied, sliced or transposed storages are read by their strides."""
    tensors: dict = golden_tensors("wan_bidirectional_tiny.pth")
    weight = tensors["blocks.0.ffn.0.weight"]
    tensors["blocks.0.ffn.0.weight"] = View(np.ascontiguousarray(weight.T), 0, weight.shape, (1, weight.shape[0]))
    model = run(save_torch(tmp_path / "a.pt", tensors), tmp_path / "out")
    same(model.transformer, load(converted).transformer)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_round_trip_is_bit_exact(tmp_path, dtype):
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    files = {
        "diffusion_pytorch_model": "wan_bidirectional_tiny.pth",
        "Wan2.1_VAE": "wan_vae_tiny.pth",
        "models_t5_umt5-xxl-enc": "umt5_tiny.pth",
    }
    tensors = {name: {n: t.astype(kind) for n, t in golden_tensors(file).items()} for name, file in files.items()}
    tensors["diffusion_pytorch_model"]["head.head.bias"].ravel().view(np.uint8)[:4] = (1, 0x80, 0xC1, 0x7F)  # a NaN
    paths = [save_torch(tmp_path / f"{name}.pth", t) for name, t in tensors.items()]
    convert(
        *(paths[0], tmp_path / "out"),
        vae=paths[1],
        text_encoder=paths[2],
        config=CONFIG,
        dtype=dtype,
        report=lambda _: None,
    )
    export(tmp_path / "out", tmp_path / "back", lambda _: None)
    for name, expected in tensors.items():
        read = safetensors.numpy.load_file(tmp_path / "back" / f"{name}.safetensors")
        assert read.keys() == expected.keys()
        for key, values in expected.items():
            assert (read[key].dtype, read[key].shape) == (values.dtype, values.shape)
            assert read[key].tobytes() == values.tobytes(), key
    again = tmp_path / "again"
    back = tmp_path / "back"
    convert(
        back, again, vae=back, text_encoder=back, config=back / "rfjax_config.json", dtype=dtype, report=lambda _: None
    )
    assert (again / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def umt5_of_transformers(layers: int = 2) -> dict[str, np.ndarray]:
    shapes = {"shared.weight": (64, 32), "encoder.final_layer_norm.weight": (32,)}
    for layer in range(layers):
        stem = f"encoder.block.{layer}.layer"
        shapes |= {f"{stem}.0.SelfAttention.{p}.weight": (48, 32) for p in "qkv"}
        shapes[f"{stem}.0.SelfAttention.o.weight"] = (32, 48)
        shapes[f"{stem}.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
        shapes |= {f"{stem}.{i}.layer_norm.weight": (32,) for i in (0, 1)}
        shapes |= {f"{stem}.1.DenseReluDense.{n}.weight": (56, 32) for n in ("wi_0", "wi_1")}
        shapes[f"{stem}.1.DenseReluDense.wo.weight"] = (32, 56)
    return random_tensors(shapes)


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",), None])
def test_tied_embeddings_of_transformers(tmp_path, names):
    tensors = umt5_of_transformers()
    table = tensors.pop("shared.weight")
    tensors |= dict.fromkeys(names or ("shared.weight", "encoder.embed_tokens.weight"), table)
    save_shards(tmp_path / "wan" / "text_encoder", tensors, "model", 2)
    model = run(GOLDEN / "wan_bidirectional_tiny.pth", tmp_path / "out", text_encoder=tmp_path / "wan")
    assert model.text_encoder is not None
    np.testing.assert_array_equal(model.text_encoder["token_embedding"]["embedding"], table)
    np.testing.assert_array_equal(
        model.text_encoder["blocks"]["ffn"]["gate"]["kernel"][1],
        tensors["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"].T,
    )


def test_tokenizer_is_copied(tmp_path):
    folder = tmp_path / "wan" / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "sea": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.save(str(folder / "tokenizer.json"))
    shutil.copy(folder / "tokenizer.json", folder / "README.md")
    model = run(GOLDEN / "wan_bidirectional_tiny.pth", tmp_path / "out", tokenizer=tmp_path / "wan")
    assert model.tokenizer is not None
    assert model.tokenizer.max_tokens == 12
    assert [path.name for path in (tmp_path / "out" / "tokenizer").iterdir()] == ["tokenizer.json"]
