"""`rfjax train` from the command line: every stage runs, what is killed goes on, mistakes are one line."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import yaml
from tiny_data import TINY, make_tiny_checkpoint

from rfjax import cli
from rfjax.commands import training
from rfjax.config import ModelConfig
from rfjax.data.moving_shapes import MovingShapesConfig, build
from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.io.ownership import owning
from rfjax.io.video_reader import read_frames
from rfjax.training import export as exporting
from rfjax.training.config import TrainConfig
from rfjax.training.export import export
from rfjax.training.setup import prepare

RUN = {
    "init": "start",
    "steps": 2,
    "batch_size": 2,
    "log_every": 1,
    "checkpoint": {"every": 1},
    "optimizer": {"learning_rate": 1e-3},
}
STAGES = {
    "vae": {"data": {"path": "pixels"}, "sample": {"every": 2}},
    "teacher": {
        "data": {"path": "latents", "frames": 3},
        "teacher": {"train_text_encoder": True},
        "sample": {"every": 2, "prompts": ["a red circle"], "latent_frames": 3},
    },
    "causal": {"data": {"path": "latents"}, "sample": {"every": 2, "prompts": ["a red circle"], "latent_frames": 3}},
    "ode": {"data": {"path": "trajectories"}},
    "self_forcing": {
        "data": {"path": "prompts.txt"},
        "self_forcing": {
            "teacher": "large",
            "critic_init": "start",
            "weak_teacher": "deep",
            "weak_guidance": 0.5,
            "policy": "relax_forcing",
            "latent_frames": 6,
            "window_frames": 6,
        },
        "ema": {"decay": 0.5},
    },
}


def sized(**sizes) -> ModelConfig:
    """The tiny model with a transformer of other sizes."""
    return dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, **sizes))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a checkpoint and with data for every stage."""
    folder = tmp_path_factory.mktemp("train")
    make_tiny_checkpoint(folder / "start")
    make_tiny_checkpoint(folder / "deep", sized(num_layers=2))
    make_tiny_checkpoint(folder / "large", sized(dim=24, ffn_dim=48, num_heads=3, num_layers=2))
    make_tiny_checkpoint(folder / "wide", sized(text_dim=12))
    make_tiny_checkpoint(folder / "short", sized(text_len=16))
    build(folder / "pixels", MovingShapesConfig(train=3, test=1, frames=9, height=16, width=32))
    (folder / "prompts.txt").write_text("a red circle\na blue star\na star\n")
    here = os.getcwd()
    os.chdir(folder)
    try:
        words = ["--checkpoint", "start", "--batch-size", "1"]
        assert cli.main(["data", "latents", "--dataset", "pixels", "--output", "latents", *words]) == 0
        also = ["--output", "embedded", "--embed-prompts"]
        assert cli.main(["data", "latents", "--dataset", "pixels", *also, *words]) == 0
        ways = ["--prompts", "prompts.txt", "--count", "2", "--solver-steps", "4", "--latent-frames", "3"]
        assert cli.main(["data", "trajectories", "--output", "trajectories", *ways, *words]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def train(data, tmp_path, monkeypatch, capsys):
    """Run a configuration below the data's folder; return exit code and error lines."""
    monkeypatch.chdir(data)

    def run(values, *words, output=tmp_path / "run"):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values))
        capsys.readouterr()
        code = cli.main(["train", "--config", str(file), "--output", str(output), *words])
        return code, capsys.readouterr().err.splitlines()

    return run


def leaves(model):
    return jax.tree.leaves([model.transformer, model.vae, model.text_encoder])


def assert_equal(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_every_stage_makes_a_checkpoint_that_loads(stage, train, tmp_path):
    code, lines = train(RUN | STAGES[stage] | {"stage": stage})
    assert code == 0, lines
    assert re.match(rf"{stage}: .* parameters; 2 steps of 2 on 1 x cpu", lines[0])
    assert lines[-1].startswith(f"{tmp_path / 'run' / 'model'} after ")
    before, after = load("start"), load(tmp_path / "run" / "model")
    changed = {
        name
        for name in ("transformer", "vae", "text_encoder")
        if any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True)
        )
    }
    assert changed == {"vae": {"vae"}, "teacher": {"transformer", "text_encoder"}}.get(stage, {"transformer"})
    assert after.tokenizer is not None
    if stage == "vae":  # its latents have unit variance by their own statistics
        assert after.config.vae is not None
        assert after.config.vae.latent_std != (1.0,) * 4
    if "sample" in STAGES[stage]:
        video = next((tmp_path / "run" / "samples").glob("*.mp4"))
        assert sum(1 for _ in read_frames(video)) == 9


def _start(config: Path, output: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "rfjax.cli", "train", "--config", str(config), "--output", str(output)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def _wait_for(folder: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 240
    while not folder.exists() and process.poll() is None:
        assert time.monotonic() < until, "no checkpoint in four minutes"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_is_killed_and_one_that_is_told_to_leave_end_as_if_nothing_had_happened(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(RUN | STAGES["vae"] | {"stage": "vae", "steps": 40, "sample": None}))
    assert cli.main(["train", "--config", str(config), "--output", str(tmp_path / "whole")]) == 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = _start(config, tmp_path / "parts")
        _wait_for(tmp_path / "parts" / "checkpoints" / f"{4 if number == signal.SIGKILL else 12:08d}", process)
        process.send_signal(number)
        _, printed = process.communicate(timeout=120)
        if number == signal.SIGTERM:
            assert process.returncode == 0, printed
            assert re.search(r"stopped after step \d+ of 40, which is saved; the same command goes on", printed)
    assert not (tmp_path / "parts" / "model").exists()
    assert cli.main(["train", "--config", str(config), "--output", str(tmp_path / "parts")]) == 0
    for a, b in zip(
        leaves(load(tmp_path / "whole" / "model")), leaves(load(tmp_path / "parts" / "model")), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_two_processes_learn_what_two_devices_of_one_do(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    config = tmp_path / "run.yaml"
    values = RUN | STAGES["teacher"] | {"stage": "teacher", "mesh": {"fsdp": 2}, "sample": None, "ema": {"decay": 0.5}}
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "rfjax.cli", "train", "--config", str(config), "--output"]
    subprocess.run([*command, str(tmp_path / "one")], env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, check=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [*command, str(tmp_path / "two"), "--processes", f"{where},2,{index}"],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "2 steps of 2 on 2 x cpu" in said[0]
    assert "steps" not in said[1]  # the first speaks for all
    one, two = (leaves(load(tmp_path / name / "model")) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ({"stage": "vae"}, [], "run.yaml.data.path is missing"),
        ({"stage": "vae", "data": {"path": "none"}}, [], "the dataset none does not exist"),
        ({"stage": "vae", "data": {"path": "latents"}}, [], "reads 'video', but the examples of latents have"),
        (
            {"stage": "vae", "data": {"path": "pixels", "frames": 81}},
            [],
            "has 9 frames of video, fewer than the window",
        ),
        ({"stage": "vae", "data": {"path": "pixels", "split": "valid"}}, [], "has no split 'valid'"),
        ({"stage": "vae", "data": {"path": "pixels"}, "init": "gone"}, [], "the checkpoint folder gone does not exist"),
        ({"stage": "vae", "data": {"path": "pixels"}}, ["--set", "mesh.data=3"], "which does not make 1 devices"),
        ({"stage": "vae", "data": {"path": "pixels"}}, ["--set", "stps=3"], "stps is not a known setting.*'steps'"),
        (
            {"stage": "vae", "data": {"path": "pixels"}},
            ["--set", "steps"],
            "'steps' is not KEY=VALUE, such as optimizer",
        ),
        (
            {"stage": "causal", "data": {"path": "latents"}, "sample": {"prompts": ["a"], "latent_frames": 4}},
            [],
            "sample.latent_frames is 4; stage causal makes videos in chunks of 3",
        ),
        (
            {
                "stage": "self_forcing",
                "data": {"path": "prompts.txt", "split": "trian"},
                "self_forcing": {"teacher": "start"},
            },
            [],
            "data.split is 'trian', but prompts.txt is a text file, which has no splits",
        ),
        (
            {"stage": "teacher", "data": {"path": "embedded"}, "teacher": {"train_text_encoder": True}},
            [],
            "teacher.train_text_encoder is true, but embedded has the prompts' embeddings already",
        ),
        (
            {
                "stage": "self_forcing",
                "init": "wide",
                "data": {"path": "embedded"},
                "self_forcing": {"teacher": "wide"},
            },
            [],
            "the prompt_embeds of embedded have 8 channels, but the transformer of wide takes 12",
        ),
        (
            {"stage": "teacher", "init": "short", "data": {"path": "embedded"}},
            [],
            "the prompt_embeds of embedded have 24 tokens, but the transformer of short takes 16",
        ),
        (
            {"stage": "self_forcing", "data": {"path": "prompts.txt"}},
            [],
            "self_forcing.teacher is missing; name the checkpoint folder of the real score",
        ),
        (
            {"stage": "self_forcing", "data": {"path": "prompts.txt"}, "self_forcing": {"policy": "relaxed"}},
            [],
            "relaxed",
        ),
    ],
)
def test_mistakes_are_one_line(values, words, message, train, tmp_path):
    code, lines = train({"init": "start"} | values, *words)
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_of_something_else_is_left_alone(train, data):
    code, lines = train(RUN | STAGES["causal"] | {"stage": "causal"}, output=data / "pixels")
    assert code == 2
    assert "pixels holds dataset_info.json but no run; an empty folder is needed" in lines[-1]
    assert not (data / "pixels" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("option", "size", "message"),
    [
        (
            "teacher",
            {"text_dim": 12},
            "text_dim 12, but the generator start has 8; a teacher of the same ",
        ),
        (
            "weak_teacher",
            {"in_dim": 8},
            "in_dim 8, but the generator start has 4; a teacher of the same ",
        ),
        (
            "critic_init",
            {"ffn_dim": 48},
            "ffn_dim 48, but the generator start has 32; name a checkpoint",
        ),
    ],
)
def test_a_score_that_does_not_fit_is_named(option, size, message, train, data, tmp_path):
    make_tiny_checkpoint(tmp_path / "other", sized(**size))
    values = STAGES["self_forcing"] | {"init": "start", "stage": "self_forcing"}
    code, lines = train(values, "--set", f"self_forcing.{option}={tmp_path / 'other'}")
    assert code == 2
    assert f"self_forcing.{option} {tmp_path / 'other'} has transformer.{message}" in lines[0]


def test_a_teacher_of_other_sizes_needs_a_critic_to_begin_with(train, data):
    values = STAGES["self_forcing"] | {"init": "start", "stage": "self_forcing"}
    code, lines = train(values, "--set", "self_forcing.critic_init=''")
    assert code == 2
    assert "self_forcing.teacher large has transformer.dim 24, but the generator start has 16; name a" in lines[0]
    assert lines[0].endswith("in self_forcing.critic_init, for the critic to begin as")


def test_a_folder_in_use_is_refused_and_left_as_it_is(train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with owning(folder):
        code, lines = train(RUN | STAGES["causal"] | {"stage": "causal"})
    assert code == 2
    assert f"{folder} is in use by process {os.getpid()} on " in lines[-1]
    assert list(folder.iterdir()) == []


def test_inputs_may_lie_at_addresses(data, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("start", "large", "prompts.txt"):
        fsspec.filesystem("memory").put(str(data / name), f"/{name}", recursive=True)
    values = {"init": "memory://start", "stage": "self_forcing", "data": {"path": "memory://prompts.txt"}}
    scores = {"teacher": "memory://large", "critic_init": "memory://start"}
    setup = prepare(TrainConfig.from_dict(values | {"self_forcing": scores}))
    assert setup.source[0]["caption"] == "a red circle"
    assert_equal(setup.frozen["teacher"], load(data / "large").transformer)


@pytest.mark.parametrize(
    ("platforms", "wanted"), [("cuda", "cuda,cpu"), ("tpu,cpu", "tpu,cpu"), ("", ""), (None, None)]
)
def test_a_run_has_the_cpu_beside_the_devices_that_jax_is_told_to_use(platforms, wanted):
    before = jax.config.values["jax_platforms"]
    try:
        jax.config.update("jax_platforms", platforms)
        training._keep_cpu()
        assert jax.config.values["jax_platforms"] == wanted
    finally:
        jax.config.update("jax_platforms", before)


def test_the_model_of_a_run_is_replaced_as_a_whole(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    config = TrainConfig.from_dict({"init": "start", "stage": "causal", "data": {"path": "latents"}})
    setup, folder = prepare(config), tmp_path / "run" / "model"
    networks = {"transformer": setup.params["model"]["transformer"]}
    (tmp_path / "run" / ".rfjax-000000000000.part").mkdir(parents=True)  # of a process that was killed

    def full(*_, **__):
        raise UserError("no space left on the disk")

    export(config, setup, networks, folder)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "save", full)
        with pytest.raises(UserError, match="no space"):
            export(config, setup, networks, folder)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, networks)
    assert_equal(load(folder).transformer, networks["transformer"])
    export(config, setup, doubled, folder)
    assert_equal(load(folder).transformer, doubled["transformer"])
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    shutil.rmtree(folder)
    folder.write_text("of somebody else")
    with pytest.raises(UserError, match=r"cannot write .*model: Not a directory"):
        export(config, setup, networks, folder)
    assert folder.read_text() == "of somebody else"


@pytest.mark.slow
def test_a_run_of_other_sizes_is_named(train, tmp_path):
    assert TINY.vae is not None
    values = RUN | STAGES["vae"] | {"stage": "vae", "steps": 1, "sample": None, "init": str(tmp_path / "init")}
    make_tiny_checkpoint(tmp_path / "init")
    assert train(values)[0] == 0
    shutil.rmtree(tmp_path / "init")
    make_tiny_checkpoint(tmp_path / "init", dataclasses.replace(TINY, vae=dataclasses.replace(TINY.vae, dim=8)))
    code, lines = train(values)
    assert code == 2
    assert re.search(r"has .*vae.* as float32\[.*\]; this run needs float32\[", lines[-1])
