"""Datasets that a checkpoint's networks make: exact, resumable, refused where they could not be used."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_data import TINY, make_tiny_checkpoint

from rfjax.data import latents, moving_shapes
from rfjax.data.latents import LatentsConfig, TrajectoriesConfig, build_latents, build_trajectories
from rfjax.data.reading import open_dataset
from rfjax.data.trajectories import make_trajectories
from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.sampling.codec import encode, encode_prompt, encode_tokens

PROMPTS = ["a red circle", "a blue star", "a star"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    moving_shapes.build(folder, shapes(frames=5))
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def shapes(**sizes) -> moving_shapes.MovingShapesConfig:
    return moving_shapes.MovingShapesConfig(**{"train": 5, "test": 1, "height": 16, "width": 24, **sizes})


def say_nothing(kept: int, done: int, total: int) -> None:
    pass


def same(folder: Path, other: Path, splits=("train", "test")) -> bool:
    def examples(path):
        return [open_dataset(path, split)[i] for split in splits for i in range(len(open_dataset(path, split)))]

    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(examples(folder), examples(other), strict=True)
    )


def test_latents_are_those_of_the_autoencoder_with_captions_scenes_and_embeddings(checkpoint, clips, tmp_path):
    told = []
    config = LatentsConfig(clips, checkpoint, embed_prompts=True, batch_size=2)
    build_latents(tmp_path / "latents", config, lambda *numbers: told.append(numbers))
    assert told == [(0, 2, 6), (0, 4, 6), (0, 5, 6), (0, 6, 6)]
    assert not (tmp_path / "latents.parts").exists()
    model = load(checkpoint)
    for split, count in (("train", 5), ("test", 1)):
        made, source = open_dataset(tmp_path / "latents", split), open_dataset(clips, split)
        assert len(made) == count
        for index in range(count):
            example, clip = made[index], source[index]
            assert example.keys() == {"latents", "caption", "scene", "prompt_embeds"}
            assert (example["caption"], example["scene"]) == (clip["caption"], clip["scene"])
            wanted = encode(model, clip["video"][None].astype(np.float32) / 127.5 - 1)[0]
            assert example["latents"].shape == (2, 2, 3, 4)
            np.testing.assert_allclose(example["latents"], wanted, rtol=2e-3, atol=2e-3)
            embeds = encode_prompt(model, [clip["caption"]])[0]
            np.testing.assert_allclose(example["prompt_embeds"], embeds, rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(example["prompt_embeds"] == 0, embeds == 0)


def test_first_frames_alone(checkpoint, tmp_path):
    moving_shapes.build(tmp_path / "clips", shapes(train=1, frames=7))
    config = LatentsConfig(tmp_path / "clips", checkpoint, batch_size=1)
    with pytest.raises(UserError, match=r"1 plus a multiple of 4 frames, not 7; .*--frames 5"):
        build_latents(tmp_path / "latents", config, say_nothing)
    build_latents(tmp_path / "latents", dataclasses.replace(config, frames=5), say_nothing)
    video = open_dataset(tmp_path / "clips", "train")[0]["video"][None, :5]
    wanted = encode(load(checkpoint), video.astype(np.float32) / 127.5 - 1)[0]
    made = open_dataset(tmp_path / "latents", "train")[0]
    assert made.keys() == {"latents", "caption", "scene"}
    np.testing.assert_allclose(made["latents"], wanted, rtol=2e-3, atol=2e-3)


def test_a_stopped_build_goes_on_where_it_was_and_gives_the_same(checkpoint, clips, tmp_path, monkeypatch):
    config = LatentsConfig(clips, checkpoint, batch_size=2)
    build_latents(tmp_path / "whole", config, say_nothing)
    folder = tmp_path / "stopped"

    def stop(kept, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_latents(folder, config, stop)
    assert not folder.exists()
    with pytest.raises(UserError, match="does not exist"):
        open_dataset(folder, "train")
    with pytest.raises(UserError, match=r"stopped\.parts holds parts of a build with batch_size 2, this one has 3"):
        build_latents(folder, dataclasses.replace(config, batch_size=3), say_nothing)
    told = []
    build_latents(folder, config, lambda *numbers: told.append(numbers))
    assert told == [(4, 4, 6), (4, 5, 6), (4, 6, 6)]
    assert same(folder, tmp_path / "whole")


def test_parts_of_another_checkpoint_in_the_same_place_are_refused(clips, tmp_path):
    def stop(kept, done, total):
        raise KeyboardInterrupt

    make_tiny_checkpoint(tmp_path / "tiny")
    config = LatentsConfig(clips, tmp_path / "tiny", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        build_latents(tmp_path / "latents", config, stop)
    (tmp_path / "tiny").rename(tmp_path / "older")
    make_tiny_checkpoint(tmp_path / "tiny", seed=1)
    with pytest.raises(UserError, match=r"parts of a build with checkpoint \w+, this one has \w+; delete it"):
        build_latents(tmp_path / "latents", config, say_nothing)


def test_latents_that_are_not_finite_are_refused(checkpoint, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "_encode", lambda config, params, video: jnp.full((len(video), 2, 2, 3, 4), 1e6))
    with pytest.raises(UserError, match="latents of example 0 of train has numbers that are not finite"):
        build_latents(tmp_path / "latents", LatentsConfig(clips, checkpoint), say_nothing)
    assert not (tmp_path / "latents").exists()


def test_what_cannot_be_encoded_is_refused_before_any_work(checkpoint, clips, prompts, tmp_path):
    def refused(match: str, dataset: Path = clips, checkpoint: Path = checkpoint, output: str = "out", **changes):
        with pytest.raises(UserError, match=match) as caught:
            build_latents(tmp_path / output, LatentsConfig(dataset, checkpoint, **changes), say_nothing)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.parts").exists()

    refused("does not exist", tmp_path / "nothing")
    refused("no videos to encode, only caption", prompts)
    refused("has 5 frames of video, fewer than the window of 9", frames=9)
    moving_shapes.build(tmp_path / "odd", shapes(train=1, frames=5, width=20))
    refused("16x20 pixels; multiples of 8", tmp_path / "odd")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("already holds files", output="full")
    bare = make_tiny_checkpoint(tmp_path / "bare", dataclasses.replace(TINY, vae=None, umt5=None))
    refused("has no autoencoder", checkpoint=bare)
    silent = make_tiny_checkpoint(tmp_path / "silent", dataclasses.replace(TINY, umt5=None))
    refused("lacks a text encoder", checkpoint=silent, embed_prompts=True)


def test_trajectories_are_the_teacher_s_and_each_has_its_own_noise(checkpoint, prompts, tmp_path):
    config = TrajectoriesConfig(prompts, checkpoint, count=5, solver_steps=4, latent_frames=3, batch_size=2, seed=7)
    build_trajectories(tmp_path / "made", config, say_nothing)
    made = open_dataset(tmp_path / "made", "train")
    assert [made[i]["caption"] for i in range(5)] == [*PROMPTS, *PROMPTS[:2]]
    model = load(checkpoint)
    follow = make_trajectories(TINY, model.transformer, (3, 2, 4, 4), 4, 3.0)
    ids, mask = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
    ids[0, 0] = mask[0, 0] = 1
    for index in (0, 4):
        key = jax.random.fold_in(jax.random.key(7), index)
        prompt = encode_prompt(model, [PROMPTS[index % 3]])
        wanted = follow(prompt, encode_tokens(model, ids, mask), key[None])[0]
        assert made[index]["trajectory"].shape == (5, 3, 2, 4, 4)
        np.testing.assert_allclose(made[index]["trajectory"], wanted, rtol=3e-3, atol=3e-3)
    noises = np.stack([made[i]["trajectory"][0] for i in range(5)])
    assert abs(np.corrcoef(noises.reshape(5, -1)) - np.eye(5)).max() < 0.5


def test_trajectories_take_a_dataset_s_captions(checkpoint, clips, tmp_path):
    config = TrajectoriesConfig(clips, checkpoint, count=2, solver_steps=4, latent_frames=3, batch_size=2)
    build_trajectories(tmp_path / "made", config, say_nothing)
    for index in range(2):
        wanted = open_dataset(clips, "train")[index]["caption"]
        assert open_dataset(tmp_path / "made", "train")[index]["caption"] == wanted


def test_trajectories_that_cannot_be_are_refused(checkpoint, prompts, tmp_path):
    config = TrajectoriesConfig(prompts, checkpoint, count=1)
    for changes, match in (
        ({"latent_frames": 4}, "4 latent frames; a multiple of the chunk's 3"),
        ({"solver_steps": 6}, "solver has 6 steps; a multiple of the 4"),
        ({"prompts": tmp_path / "nothing"}, "does not exist"),
    ):
        with pytest.raises(UserError, match=match):
            build_trajectories(tmp_path / "out", dataclasses.replace(config, **changes), say_nothing)
        assert not (tmp_path / "out.parts").exists()
