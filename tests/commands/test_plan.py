"""Lengths and sizes asked for on the command line."""

import argparse
import shutil

import jax
import pytest

from rfjax import memory
from rfjax.commands.generate import add_arguments
from rfjax.commands.plan import SHIPPED, fingerprint, latent_frames, make_plan
from rfjax.errors import UserError
from rfjax.io.checkpoints import load, save
from rfjax.io.prompts import Request


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [
        (0.001, 16, 3),
        (9 / 16, 16, 3),  # 1 + 4 * 2 frames exactly
        (9.5 / 16, 16, 6),
        (5, 16, 21),  # 81 frames
        (5.0625, 16, 21),
        (5.1, 16, 24),
        (10, 16, 42),
        (30, 16, 123),  # 120 latent frames would be 29.8 s
        (10, 8, 21),
    ],
)
def test_seconds_become_the_fewest_whole_chunks_that_last_as_long(seconds, fps, expected):
    frames = latent_frames(3, 4, float(seconds), None, fps)
    assert frames == expected
    assert (1 + 4 * (frames - 1)) / fps >= seconds > (1 + 4 * (frames - 4)) / fps


def test_latent_frames_are_taken_as_given():
    assert latent_frames(3, 4, None, 240, 16) == 240
    with pytest.raises(UserError, match=r"--latent-frames is 2; it must be a multiple of the chunk's 3, such as 3$"):
        latent_frames(3, 4, None, 2, 16)


def test_fingerprint_follows_the_checkpoint_and_not_its_place(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(SHIPPED)


@pytest.mark.parametrize("file", ["config.json", "tokenizer/tokenizer.json"])
def test_fingerprint_tells_other_sizes_and_tokenizers(tmp_path, file):
    copy = tmp_path / "copy"
    shutil.copytree(SHIPPED, copy)
    with open(copy / file, "ab") as stored:
        stored.write(b" ")
    assert fingerprint(copy) != fingerprint(SHIPPED)


def test_fingerprint_tells_other_weights(tmp_path):
    model = load(SHIPPED)
    assert model.vae is not None
    assert model.text_encoder is not None
    other = jax.tree.map(lambda leaf: leaf + 1, model.vae)
    params = {"transformer": model.transformer, "vae": other, "text_encoder": model.text_encoder}
    save(tmp_path / "other", model.config, params, SHIPPED / "tokenizer")
    for name in ("transformer", "text_encoder"):
        shutil.rmtree(tmp_path / "other" / name)
        shutil.copytree(SHIPPED / name, tmp_path / "other" / name)
    assert (tmp_path / "other/config.json").read_text() == (SHIPPED / "config.json").read_text()
    assert fingerprint(tmp_path / "other") != fingerprint(SHIPPED)


def test_settings_tell_another_version_of_a_policys_file(tmp_path):
    """A folder of videos by one version must not take those of another."""
    path = tmp_path / "mine.py"
    source = (
        "import dataclasses\nfrom rfjax.memory import AttentionSink, register\n@register('mine')\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(AttentionSink):\n    tail_frames: int = 4\n"
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--policy", f"{path}:Mine", "--latent-frames", "3", "--output", str(tmp_path / "out")])
    recorded = []
    for ending in ("", "", "    # another rule\n"):
        path.write_text(source + ending, encoding="utf-8")
        recorded.append(make_plan(args, [Request("a fox")], []).settings["policy"])
    memory.POLICIES.pop("mine")
    assert recorded[0] == recorded[1] != recorded[2]
    known = {"name": "mine", "sink_frames": 3, "tail_frames": 4, "file": "mine.py"}
    assert recorded[0] == {**known, "code": recorded[0]["code"]}
