"""Clips that a student redraws, and what its decoder reads of them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_data import TINY, make_tiny_checkpoint

from rfjax.config import VAEConfig
from rfjax.data import moving_shapes
from rfjax.data.latents import RedrawnConfig, build_redrawn
from rfjax.data.reading import Example, batches, open_dataset
from rfjax.data.redrawing import redraw
from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.memory import create
from rfjax.models.functional import bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.codec import decode, encode, encode_prompt, to_unit
from rfjax.sampling.schedule import few_steps
from rfjax.training.config import DataConfig, OptimizerConfig, TrainConfig, VAEOptions
from rfjax.training.setup import Setup, prepare

STEPS = len(TINY.denoising_steps)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    sizes = moving_shapes.MovingShapesConfig(train=STEPS + 1, test=1, frames=9, height=16, width=32)
    moving_shapes.build(folder, sizes)
    return folder


@pytest.fixture(scope="module")
def redrawn(checkpoint, clips) -> Path:
    folder = clips.with_name("redrawn")
    build_redrawn(folder, RedrawnConfig(clips, checkpoint, batch_size=1, seed=3), lambda *numbers: None)
    return folder


def test_the_first_chunk_is_denoised_from_what_the_noise_left(checkpoint):
    model, key = load(checkpoint), jax.random.key(4)
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 4, 4)), jnp.float32)
    embeds = encode_prompt(model, ["a red circle"])
    made = redraw(model, create("self_forcing"), latents, embeds, STEPS - 1, key[None])
    timestep = float(few_steps(TINY)[-1])  # the last step alone: nothing is added later
    level = timestep / 1000
    noise = jax.random.normal(jax.random.split(key)[0], latents.shape[1:])
    noisy = (1 - level) * latents + level * noise
    network = bind(WanTransformer, TINY.transformer, model.transformer)
    flow, _ = network(noisy, jnp.full((1, 3), timestep), network.embed_text(embeds))
    np.testing.assert_allclose(made, noisy - level * flow, rtol=2e-5, atol=2e-5)


def test_the_later_it_begins_the_less_is_changed_and_each_sample_has_its_own_noise(checkpoint):
    model, keys = load(checkpoint), jax.random.split(jax.random.key(1), 2)
    still = {**model.transformer, "head": jax.tree.map(jnp.zeros_like, model.transformer["head"])}
    model = dataclasses.replace(model, transformer=still)  # predicts no flow: what it is given stays
    latents, embeds = jnp.zeros((2, 6, 2, 4, 4)), encode_prompt(model, ["a red circle"] * 2)
    made = [redraw(model, create("self_forcing"), latents, embeds, step, keys) for step in (1, STEPS - 1)]
    changes = [float(jnp.square(each).mean()) for each in made]
    assert changes[0] > changes[-1]
    assert changes[-1] == pytest.approx(float(few_steps(TINY)[-1] / 1000) ** 2, rel=0.3)
    assert abs(np.corrcoef(made[-1].reshape(2, -1))[0, 1]) < 0.3
    alone = redraw(model, create("self_forcing"), latents[1:], embeds[1:], STEPS - 1, keys[1:])
    np.testing.assert_allclose(alone[0], made[-1][1], rtol=1e-5, atol=1e-5)


def test_batches_take_turns_from_the_encoders_own_latents_on(checkpoint, clips, redrawn):
    model = load(checkpoint)
    for split, count in (("train", STEPS + 1), ("test", 1)):
        made, source = open_dataset(redrawn, split), open_dataset(clips, split)
        assert len(made) == count
        for index in range(count):
            example, clip = made[index], source[index]
            assert example.keys() == {"video", "latents", "caption", "scene"}
            assert (example["caption"], example["scene"]) == (clip["caption"], clip["scene"])
            np.testing.assert_array_equal(example["video"], clip["video"])
            wanted = encode(model, to_unit(clip["video"][None]))
            if step := (0, 2, 3)[index % 3]:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), split == "test"), index)
                embeds, policy = encode_prompt(model, [clip["caption"]]), create("self_forcing", window_frames=21)
                wanted = redraw(model, policy, wanted, embeds, step, key[None])
            np.testing.assert_allclose(example["latents"], wanted[0], rtol=2e-3, atol=2e-3)


def test_what_cannot_be_redrawn_is_refused(checkpoint, clips, tmp_path):
    config = RedrawnConfig(clips, checkpoint, frames=5)
    with pytest.raises(UserError, match=r"5 frames have 2 latent frames, .* chunks of 3; 9 frames, for one, would do"):
        build_redrawn(tmp_path / "out", config, lambda *numbers: None)
    hasty = make_tiny_checkpoint(tmp_path / "hasty", dataclasses.replace(TINY, denoising_steps=(1000,)))
    with pytest.raises(UserError, match="denoises in one step, which sees nothing of a clip"):
        build_redrawn(tmp_path / "out", RedrawnConfig(clips, hasty), lambda *numbers: None)
    assert not (tmp_path / "out.parts").exists()


def vae_run(checkpoint: Path, data: Path, decoder_only: bool = True, **changes) -> TrainConfig:
    return TrainConfig(
        stage="vae",
        init=str(checkpoint),
        data=DataConfig(path=str(data), **changes),
        optimizer=OptimizerConfig(weight_decay=0.0),
        vae=VAEOptions(decoder_only=decoder_only),
    )


def read(setup: Setup, count: int) -> Example:
    batch = next(batches(setup.source, batch_size=count, seed=0, transforms=setup.transforms))
    return {name: jnp.asarray(rows) for name, rows in batch.items()}


def test_a_decoder_reads_windows_of_clips_and_the_latents_behind_them(checkpoint, redrawn):
    setup = prepare(vae_run(checkpoint, redrawn, frames=5))
    batch = read(setup, 4)
    assert batch.keys() == {"video", "latents"}
    clips = [open_dataset(redrawn, "train")[number] for number in range(STEPS + 1)]
    for video, latents in zip(batch["video"], batch["latents"], strict=True):
        (clip,) = [clip for clip in clips if np.array_equal(clip["video"][:5], video)]
        np.testing.assert_array_equal(latents, clip["latents"][:2])


@pytest.mark.slow
def test_a_decoder_learns_from_the_latents_beside_its_clips_alone(checkpoint, redrawn):
    setup = prepare(vae_run(checkpoint, redrawn))
    batch = read(setup, 2)

    def loss(params, batch):
        return setup.stage.loss("model", params, {}, batch, jax.random.key(0))

    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(setup.params, batch)
    assert metrics.keys() == {"error", "psnr"}
    largest = {
        name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        for name, tree in gradient["model"]["vae"].items()
    }
    assert largest["encoder"] == largest["quant_conv"] == 0
    assert min(largest["decoder"], largest["post_quant_conv"]) > 0
    shown = decode(load(checkpoint), batch["latents"])
    psnr = 10 * np.log10(4 / float(jnp.square(shown - to_unit(batch["video"])).mean()))
    assert float(metrics["psnr"]) == pytest.approx(psnr, abs=1e-3)


def test_pairs_that_do_not_fit_are_refused(checkpoint, redrawn, tmp_path):
    with pytest.raises(UserError, match=r"latents beside them, from which the decoder alone .* vae.decoder_only"):
        prepare(vae_run(checkpoint, redrawn, decoder_only=False))
    wide = dataclasses.replace(
        TINY,
        vae=VAEConfig(dim=4, num_res_blocks=1, z_dim=8, latent_mean=(0.0,) * 8, latent_std=(1.0,) * 8),
        transformer=dataclasses.replace(TINY.transformer, in_dim=8, out_dim=8),
    )
    other = make_tiny_checkpoint(tmp_path / "wide", wide)
    with pytest.raises(UserError, match=r"latents of .*redrawn have 4 channels, but the autoencoder of .*wide takes 8"):
        prepare(vae_run(other, redrawn))
    with pytest.raises(UserError, match=r"data.crop is \[8, 16\], but the latents of .*redrawn are of whole pictures"):
        prepare(vae_run(checkpoint, redrawn, crop=(8, 16)))
    setup = prepare(vae_run(checkpoint, redrawn, frames=4))
    batch = read(setup, 1)
    with pytest.raises(UserError, match=r"data.frames has to be 1 plus a multiple of 4"):
        setup.stage.loss("model", setup.params, {}, batch, jax.random.key(0))
