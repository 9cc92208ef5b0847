"""Each mistake gives one line, exit code 2 and no output folder."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from checkpoint_files import GOLDEN, Pickled, save_safetensors, save_shards, save_torch
from test_convert import golden_tensors, umt5_of_transformers

from rfjax.cli import main
from rfjax.io.checkpoints import load

CONFIG = str(GOLDEN / "config.json")
WAN = str(GOLDEN / "wan_bidirectional_tiny.pth")


@pytest.fixture
def refuse(tmp_path, capsys):
    """Run the command and return its one line of error."""

    def run(*arguments, output=None, config=CONFIG):
        output = output or tmp_path / "out" / "model"
        before = sorted(tmp_path.rglob("*"))
        options = ["--config", str(config)] if config else []
        assert main(["convert", *map(str, arguments), *options, "--output", str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("rfjax: error: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return run


def changed(tmp_path, change) -> str:
    tensors = golden_tensors("wan_bidirectional_tiny.pth")
    change(tensors)
    return str(save_torch(tmp_path / "changed.pt", {"generator": tensors}))


def test_missing_files(refuse, tmp_path):
    assert "nowhere.pt does not exist" in refuse("--transformer", tmp_path / "nowhere.pt")
    assert "holds no .pt" in refuse("--transformer", tmp_path)
    assert "nowhere.yaml" in refuse("--transformer", WAN, config=tmp_path / "nowhere.yaml")
    assert "holds no tokenizer.json" in refuse("--transformer", WAN, "--tokenizer", tmp_path)


def test_missing_and_misspelt_options(refuse):
    assert "--transformer --to-torch is required" in refuse()
    assert "--transfomer" in refuse("--transformer", WAN, "--transfomer", WAN)


def test_wrong_key_lists_those_present(refuse):
    message = refuse("--transformer", GOLDEN / "self_forcing_tiny.pt", "--transformer-key", "generator_em")
    assert "it holds: generator, generator_ema; did you mean 'generator_ema'?" in message
    assert "without keys" in refuse("--transformer", WAN, "--transformer-key", "generator")


def test_no_single_state_dict(refuse, tmp_path):
    tensors = golden_tensors("wan_bidirectional_tiny.pth")
    path = save_torch(tmp_path / "a.pt", {"critic": tensors, "actor": tensors, "step": 3})
    assert "those it holds: critic, actor, step" in refuse("--transformer", path)
    path = save_torch(tmp_path / "a.pt", {"step": 3})
    assert "it holds: generator" not in refuse("--transformer", path)


@pytest.mark.parametrize(
    ("option", "file", "looks"),
    [
        ("--transformer", "wan_vae_tiny.pth", "looks like a Wan VAE (upstream names); give it as --vae"),
        ("--transformer", "umt5_tiny.pth", "looks like a UMT5 text encoder (upstream names)"),
        ("--vae", "wan_bidirectional_tiny.pth", "looks like a Wan transformer (upstream names); give it as --trans"),
        ("--text-encoder", "self_forcing_tiny.pt", "[generator_ema] was given as --text-encoder but looks like"),
    ],
)
def test_another_models_checkpoint(refuse, option, file, looks):
    first = () if option == "--transformer" else ("--transformer", WAN)
    assert looks in refuse(*first, option, GOLDEN / file)


def test_an_unknown_model(refuse, tmp_path):
    path = save_safetensors(tmp_path / "a.safetensors", {"down_blocks.0.attn.weight": np.ones((2, 2), np.float32)})
    assert "not a Wan transformer in a known layout; its first tensors are down_blocks" in refuse("--transformer", path)


def test_a_pickle_that_wants_to_run_code(refuse, tmp_path):
    path = save_torch(tmp_path / "a.pt", {"generator": Pickled(b"cposix\nsystem\n(X\x09\x00\x00\x00touch rantR")})
    assert "asks to load posix.system" in refuse("--transformer", path)


def test_unknown_dtype(refuse):
    assert "dtype is 'bfloat61'; it must be float32 or bfloat16; did you mean 'bfloat16'?" in refuse(
        "--transformer", WAN, "--dtype", "bfloat61"
    )


def test_outputs_that_cannot_be_written(refuse, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert "already holds files" in refuse("--transformer", WAN, output=tmp_path / "full")
    assert "is a file" in refuse("--transformer", WAN, output=tmp_path / "full" / "mine.txt")
    assert "is a file" in refuse("--transformer", WAN, output=tmp_path / "full" / "mine.txt" / "model")


def test_paths_that_cannot_be_looked_at(refuse, tmp_path):
    long = tmp_path / ("a" * 300)
    for path in (long, long / "model"):
        assert "File name too long" in refuse("--transformer", WAN, output=path)
        assert "File name too long" in refuse("--transformer", path)
        assert "File name too long" in refuse("--transformer", WAN, "--tokenizer", path)
        assert "File name too long" in refuse("--to-torch", path, config=None)


def test_the_current_folder_as_output(refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ". is the current folder" in refuse("--transformer", WAN, output=".")


def test_an_output_that_is_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    for link, target in (("full", "real"), ("dangling", "new")):
        (tmp_path / link).symlink_to(tmp_path / target)
        assert main(["convert", "--transformer", WAN, "--config", CONFIG, "--output", str(tmp_path / link)]) == 0
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target / "config.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(refuse, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "no permission" in refuse("--transformer", WAN, output=tmp_path / "closed" / "model")
    (tmp_path / "hidden").mkdir(mode=0o000)
    assert "Permission denied" in refuse("--transformer", WAN, output=tmp_path / "hidden" / "model")
    assert "Permission denied" in refuse("--transformer", tmp_path / "hidden" / "model.pt")


def test_no_space_left(refuse, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # pyright: ignore
    assert "0.0 GB are free" in refuse("--transformer", WAN)


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfjax.io.checkpoints.write_json", fail)
    command = ["convert", "--transformer", WAN, "--config", CONFIG, "--output", str(tmp_path / "new" / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def config_with(tmp_path, **sections):
    values = json.loads((GOLDEN / "config.json").read_text())
    for section, settings in sections.items():
        values[section] = {**values[section], **settings} if isinstance(settings, dict) else settings
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_configurations_that_contradict_the_tensors(refuse, tmp_path):
    message = refuse("--transformer", WAN, config=config_with(tmp_path, transformer={"num_layers": 4}))
    assert "transformer.num_layers 4, but the tensors of" in message
    assert "say 3" in message
    config = config_with(tmp_path, vae={"temperal_downsample": [True, True, False]})
    message = refuse("--transformer", WAN, "--vae", GOLDEN / "wan_vae_tiny.pth", config=config)
    assert "vae.temporal_downsample (True, True, False), but" in message


def test_unknown_settings(refuse, tmp_path):
    message = refuse("--transformer", WAN, config=config_with(tmp_path, transformer={"num_head": 2}))
    assert "transformer.num_head is not a known setting; did you mean 'num_heads'?" in message
    message = refuse("--transformer", WAN, config=config_with(tmp_path, vae={"dims": 2}))
    assert "vae.dims is not a known setting" in message
    assert "umt5 is 3" in refuse("--transformer", WAN, config=config_with(tmp_path, umt5=3))
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,\n")
    assert "not valid YAML" in refuse("--transformer", WAN, config=path)


def test_settings_that_nothing_tells(refuse):
    assert "give transformer.num_heads with --config" in refuse("--transformer", WAN, config=None)
    vae = ("--vae", GOLDEN / "wan_vae_tiny.pth")
    assert "num_heads" in refuse("--transformer", WAN, *vae, config=None)


def test_tensors_that_do_not_fit_are_all_listed(refuse, tmp_path):
    def change(tensors):
        tensors["blocks.1.ffn.0.weigth"] = tensors.pop("blocks.1.ffn.0.weight")
        tensors["model.blocks.2.norm3.bias"] = tensors["blocks.2.norm3.bias"]
        tensors["blocks.0.self_attn.q.weight"] = np.zeros((64, 63), np.float32)
        tensors["img_emb.proj.0.weight"] = np.zeros(3, np.float32)
        tensors["head.head.bias"] = np.zeros(16, np.int64)

    message = refuse("--transformer", changed(tmp_path, change))
    assert "1 missing (blocks.1.ffn.0.weight - did you mean 'blocks.1.ffn.0.weigth'?)" in message
    assert "2 unexpected (blocks.1.ffn.0.weigth - did you mean 'blocks.1.ffn.0.weight'?, img_emb.proj.0.wei" in message
    assert "1 doubled (blocks.2.norm3.bias and model.blocks.2.norm3.bias)" in message
    assert "1 misshaped (blocks.0.self_attn.q.weight is [64, 63], not [64, 64])" in message
    assert "1 of a type other than float32, bfloat16, float16 (head.head.bias is int64)" in message


@pytest.mark.parametrize("name", ["patch_embedding.weight", "head.head.weight", "text_embedding.0.weight"])
def test_a_missing_tensor_that_tells_a_size(refuse, tmp_path, name):
    message = refuse("--transformer", changed(tmp_path, lambda tensors: tensors.update(other=tensors.pop(name))))
    assert f"1 missing ({name})" in message
    assert "1 unexpected (other)" in message


def test_a_missing_layer(refuse, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("blocks.1.")]:
            del tensors[name]

    assert "27 missing (blocks.1." in refuse("--transformer", changed(tmp_path, change))


@pytest.mark.parametrize("number", ["1000", "99999", "999999999", "9" * 5000])
def test_blocks_of_absurd_numbers(refuse, tmp_path, number):
    path = changed(tmp_path, lambda t: t.update({f"blocks.{number}.modulation": t["blocks.0.modulation"]}))
    assert f"1 unexpected (blocks.{number}.modulation" in refuse("--transformer", path)
    tensors = golden_tensors("wan_vae_tiny.pth")
    tensors[f"encoder.downsamples.{number}.residual.2.bias"] = tensors["conv1.bias"]
    path = save_torch(tmp_path / "vae.pth", tensors)
    assert "1 unexpected (encoder.downsamples." in refuse("--transformer", WAN, "--vae", path)


@pytest.mark.parametrize("samplers", [[0], range(40, 80)])
def test_levels_that_the_tensors_cannot_fill(refuse, tmp_path, samplers):
    tensors = golden_tensors("wan_vae_tiny.pth")
    for name in [name for name in tensors if name.startswith("encoder.") and ".resample." in name]:
        del tensors[name]
    tensors |= {f"encoder.downsamples.{i}.resample.1.bias": tensors["conv1.bias"] for i in samplers}
    path = save_torch(tmp_path / "vae.pth", tensors)
    assert "residual blocks by its names, which its" in refuse("--transformer", WAN, "--vae", path)


def test_a_vae_without_one_tensor(refuse, tmp_path):
    for name in ("decoder.upsamples.3.shortcut.weight", "encoder.downsamples.6.residual.2.weight", "conv2.bias"):
        tensors = golden_tensors("wan_vae_tiny.pth")
        del tensors[name]
        path = save_torch(tmp_path / "vae.pth", tensors)
        assert f"1 missing ({name}" in refuse("--transformer", WAN, "--vae", path)


def test_tied_embeddings_that_differ(refuse, tmp_path):
    tensors = umt5_of_transformers()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + np.float32(1)
    path = save_safetensors(tmp_path / "model.safetensors", tensors)
    message = refuse("--transformer", WAN, "--text-encoder", path)
    assert "two different tensors for one parameter: shared.weight and encoder.embed_tokens.weight" in message


def test_damaged_shards(refuse, tmp_path):
    tensors = golden_tensors("wan_bidirectional_tiny.pth")
    folder = tmp_path / "wan"
    index = save_shards(folder, tensors, "diffusion_pytorch_model")
    places = json.loads(index.read_text())
    first = next(iter(places["weight_map"]))

    index.write_text(json.dumps({"weight_map": {**places["weight_map"], "ghost": places["weight_map"][first]}}))
    assert "1 tensors that its shards lack: ghost" in refuse("--transformer", folder)
    index.write_text(json.dumps({"weight_map": {**places["weight_map"], first: "../outside.safetensors"}}))
    assert "outside its folder" in refuse("--transformer", folder)
    index.write_text("[" * 100_000)
    assert "is no index" in refuse("--transformer", folder)
    index.write_text(json.dumps({"weight_map": {n: s for n, s in places["weight_map"].items() if n != first}}))
    assert f"holds {first}, which" in refuse("--transformer", folder)
    index.write_text(json.dumps(places))
    shard = folder / places["weight_map"][first]
    save_safetensors(folder / sorted(set(places["weight_map"].values()))[1], {first: tensors[first]})
    assert f"holds {first} twice" in refuse("--transformer", folder)
    index.unlink()
    assert "3 shards without their index" in refuse("--transformer", folder)
    index.write_text(json.dumps(places))
    shard.unlink()
    assert f"cannot read {shard}" in refuse("--transformer", folder)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.7, 0.999])
def test_a_cut_checkpoint(refuse, tmp_path, share):
    whole = (GOLDEN / "self_forcing_tiny.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
    assert "not a whole PyTorch zip checkpoint" in refuse("--transformer", tmp_path / "cut.pt")


def test_export_of_other_folders(refuse, tmp_path):
    assert "does not exist" in refuse("--to-torch", tmp_path / "nowhere", config=None)
    assert "has no config.json" in refuse("--to-torch", tmp_path, config=None)
    assert "--config does not go with --to-torch" in refuse("--to-torch", tmp_path)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rfjax.io.checkpoints.write_json", interrupt)
    assert main(["convert", "--transformer", WAN, "--config", CONFIG, "--output", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_checkpoint(tmp_path):
    command = [sys.executable, "-m", "checkpoints_convert", "--transformer", WAN, "--config", CONFIG]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists() or load(tmp_path / "out")


def test_the_command_as_a_user_runs_it(tmp_path):
    command = [sys.executable, "-m", "checkpoints_convert", "--transformer", WAN, "--output", str(tmp_path / "out")]
    failed = subprocess.run([*command, "--dtyp", "float32"], capture_output=True, text=True)
    message = "rfjax: error: unknown argument '--dtyp'; did you mean '--dtype'?\n"
    assert (failed.returncode, failed.stdout, failed.stderr) == (2, "", message)
    done = subprocess.run([*command, "--config", CONFIG], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
