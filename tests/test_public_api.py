import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, golden

import rfjax
from rfjax.commands.plan import SHIPPED
from rfjax.errors import UserError


def test_every_public_name_is_there():
    for name in rfjax.__all__:
        assert getattr(rfjax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'rolout'"):
        _ = rfjax.rolout  # pyright: ignore[reportAttributeAccessIssue]


def test_help_does_not_wait_for_jax():
    code = "import sys, rfjax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_encode_tokens_matches_pytorch(tiny_model):
    data = golden("umt5")
    got = rfjax.encode_tokens(tiny_model, data["ids"], data["mask"])
    np.testing.assert_allclose(got, data["prompt_embeds"], atol=1e-5 * np.ptp(data["prompt_embeds"]))


def test_decode_and_encode_match_pytorch(tiny_model):
    with np.load(GOLDEN / "vae.npz") as data:
        last = {key: np.moveaxis(data[key], 1, -1) for key in ("z", "decoded", "video", "latents")}
    decoded = np.clip(last["decoded"], -1, 1)
    np.testing.assert_allclose(rfjax.decode(tiny_model, last["z"]), decoded, atol=1e-4)
    np.testing.assert_allclose(rfjax.encode(tiny_model, last["video"]), last["latents"], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: rfjax.decode(m, np.zeros((1, 3, 4, 6, 16), np.float32)), "latents have 16 channels; .* takes 4"),
        (
            lambda m: rfjax.encode(m, np.zeros((1, 12, 32, 48, 3), np.float32)),
            "the video has 12 frames; the autoencoder needs 1 plus",
        ),
        (
            lambda m: rfjax.encode(m, np.zeros((1, 13, 30, 48, 3), np.float32)),
            "the video is 30x48 pixels; the autoencoder needs multiples of 8",
        ),
        (lambda m: rfjax.encode_prompt(m, ["a fox"]), "text encoder gives width 32, but its transformer takes 24"),
        (
            lambda m: rfjax.decode(dataclasses.replace(m, vae=None), np.zeros((1, 3, 4, 6, 4), np.float32)),
            "no autoencoder; convert it with --vae",
        ),
        (
            lambda m: rfjax.encode_tokens(
                dataclasses.replace(m, text_encoder=None), np.ones((1, 4), np.int32), np.ones((1, 4), np.int32)
            ),
            "no text encoder; convert it with --text-encoder",
        ),
    ],
)
def test_says_what_is_missing_or_does_not_fit(tiny_model, call, message):
    with pytest.raises(UserError, match=message):
        call(tiny_model)


def test_a_prompt_becomes_a_video(tmp_path):
    """The docstring's example on the shipped model."""
    import jax

    from rfjax.commands.plan import SHIPPED

    model = rfjax.load(SHIPPED)
    embeds = rfjax.encode_prompt(model, ["a red fox runs through fresh snow", "waves"])
    result = rfjax.rollout(model, rfjax.memory.create("relax_forcing"), embeds, (2, 6, 4, 6, 8), key=jax.random.key(0))
    video = rfjax.decode(model, result.latents)
    assert video.shape == (2, 21, 32, 48, 3)
    assert np.isfinite(video).all()
    assert np.abs(video).max() <= 1


def test_the_model_inside_the_package_is_small():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert 6e6 < sum(path.stat().st_size for path in files) < 12e6
