import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfjax.config import ModelConfig, TransformerConfig, VAEConfig
from rfjax.errors import UserError
from rfjax.io.atomic import write_json
from rfjax.io.checkpoints import LazyArray, load, parameter_trees, read_leaf, save, write_folder

CONFIG = ModelConfig(
    transformer=TransformerConfig(text_len=8, in_dim=2, dim=8, ffn_dim=12, freq_dim=4, text_dim=6, num_heads=2),
    vae=VAEConfig(2, 2, (1, 1, 2, 2), 1, latent_mean=(0.0, 0.1), latent_std=(1.0, 1.1)),
)


def random_params(config: ModelConfig, as_array=jnp.asarray):
    draw = np.random.default_rng(0)

    def leaf(abstract):
        return as_array(draw.standard_normal(abstract.shape).astype(np.float32))

    return {name: jax.tree.map(leaf, tree) for name, tree in parameter_trees(config).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    params = random_params(CONFIG)
    save(folder, CONFIG, params)
    return folder, params


def test_round_trip_with_numbered_blocks(saved):
    folder, params = saved
    model = load(folder)
    assert model.config == CONFIG
    assert (model.text_encoder, model.tokenizer, model.dtype) == (None, None, jnp.float32)
    assert model.vae is not None
    assert list(model.vae["decoder"]["up"]) == list(range(11))
    jax.tree.map(np.testing.assert_array_equal, {"transformer": model.transformer, "vae": model.vae}, params)


def test_numpy_leaves(tmp_path):
    params = random_params(CONFIG, as_array=np.asarray)
    save(tmp_path / "model", CONFIG, params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model").vae, params["vae"])


def test_leaves_are_cast_as_jax_casts_them(saved):
    folder, params = saved
    model = load(folder, "bfloat16")
    assert model.dtype == jnp.bfloat16
    for leaf, exact in zip(jax.tree.leaves(model.transformer), jax.tree.leaves(params["transformer"]), strict=True):
        assert isinstance(leaf, jax.Array)
        np.testing.assert_array_equal(leaf, exact.astype(jnp.bfloat16))


def test_lazy_leaves_are_ordinary_arrays_once_written(tmp_path):
    """Written in pieces, and read by Orbax without anything of rfjax's."""
    params = random_params(CONFIG, as_array=np.asarray)
    asked = []

    def lazy(path, array):
        stacked = path[0].key == "blocks"

        def read(start, stop):
            asked.append(stop - start)
            return array[start:stop]

        return LazyArray(array.shape, array.dtype, stacked, read)

    tree = jax.tree_util.tree_map_with_path(lazy, params["transformer"])
    save(tmp_path / "model", CONFIG, {**params, "transformer": tree})
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "model" / "transformer")
    jax.tree.map(np.testing.assert_array_equal, restored, params["transformer"])
    assert asked.count(1) >= 30 * 20, "layers are read one by one"


def test_a_leaf_can_be_read_alone(saved):
    folder, params = saved
    expected = params["transformer"]["blocks"]["ffn"]["fc1"]["bias"]
    np.testing.assert_array_equal(list(read_leaf(folder / "transformer", "blocks.ffn.fc1.bias", 30)), expected)
    (whole,) = read_leaf(folder / "transformer", "blocks.ffn.fc1.bias", None)
    np.testing.assert_array_equal(whole, expected)


def test_unknown_dtype(saved):
    with pytest.raises(UserError, match=r"dtype is 'float16'; it must be float32 or bfloat16"):
        load(saved[0], "float16")


def test_missing_folders(saved, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is a file; a folder"):
        load(saved[0] / "config.json")
    with pytest.raises(UserError, match="File name too long"):
        load(tmp_path / ("a" * 300))
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)
    folder = shutil.copytree(saved[0], tmp_path / "model")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="vae is missing"):
        load(folder)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    with pytest.raises(UserError, match="transformer is damaged or no Orbax checkpoint"):
        load(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_layers": 29}, r"has blocks\.\S+ with the shape \[30, .*asks for \[29, "),
        ({"ffn_dim": 13}, r"with the shape .* asks for"),
    ],
)
def test_a_configuration_of_another_model(saved, tmp_path, setting, message):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["transformer"].update(setting)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load(folder)


def test_parameters_of_another_network(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "model")
    shutil.rmtree(folder / "vae")
    shutil.copytree(folder / "transformer", folder / "vae")
    with pytest.raises(UserError, match=r"vae lacks the parameter \S+, which config\.json asks for"):
        load(folder)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(saved, tmp_path, data):
    source, params = saved
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    folder = shutil.copytree(source, tmp_path / "model")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = folder / data.draw(st.sampled_from(files))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, size - 1))])
    try:
        model = load(folder)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        jax.tree.map(np.testing.assert_array_equal, {"transformer": model.transformer, "vae": model.vae}, params)
    assert "\n" not in message


def test_every_data_file_is_needed(saved, tmp_path):
    for name in ("transformer", "vae"):
        count = len(list((saved[0] / name / "d").iterdir()))
        assert count > 0
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = shutil.copytree(saved[0], tmp_path / "model")
        for path in (folder / name / "d").iterdir():
            path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load(folder)


def test_save_needs_the_same_networks(tmp_path):
    params = random_params(CONFIG)
    with pytest.raises(ValueError, match="configuration of"):
        save(tmp_path / "model", CONFIG, {"transformer": params["transformer"]})
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_hold_something(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_folder(tmp_path / "file", lambda _: None)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", lambda folder: (folder / "a").touch())
    with pytest.raises(UserError, match="already holds files"):
        write_folder(tmp_path / "empty", lambda _: None)


def test_outputs_that_are_links(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_folder(tmp_path / "link", lambda folder: (folder / "a").touch())
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["a"]
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        write_folder(tmp_path / "loop", lambda _: None)


def test_outputs_that_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\. is the current folder"):
        write_folder(Path("."), lambda _: None)
    write_folder(Path("new/../other"), lambda folder: (folder / "a").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(UserError, match="File name too long"):
        write_folder(Path("new") / ("a" * 300) / "model", lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UserError, match="is a mount point"):
        write_folder(tmp_path / "volume", lambda _: None)


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.json", tmp_path / ("a" * 300) / "a.json", tmp_path, Path("/")):
        with pytest.raises(UserError, match="cannot write"):
            write_json(path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: disk")])
def test_a_full_disk_leaves_nothing(tmp_path, error):
    def fail(folder):
        (folder / "half").touch()
        raise error

    with pytest.raises(UserError, match=r"[Nn]o space left"):
        write_folder(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []
