import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import MODEL, run_config

from rfjax.commands.plan import SHIPPED
from rfjax.data.moving_shapes import MovingShapesConfig, build
from rfjax.data.reading import batches
from rfjax.errors import UserError
from rfjax.models.functional import init_params
from rfjax.models.vae import WanVAE
from rfjax.training.config import DataConfig, OptimizerConfig, VAEOptions
from rfjax.training.setup import prepare
from rfjax.training.stages.vae import VAEStage


@pytest.mark.slow
@pytest.mark.parametrize("decoder_only", [False, True])
def test_what_learns(decoder_only):
    assert MODEL.vae is not None
    stage = VAEStage(MODEL.vae, VAEOptions(decoder_only=decoder_only))
    params = {"model": {"vae": init_params(WanVAE, MODEL.vae, jax.random.key(0))}}
    video = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 5, 16, 16, 3), np.uint8))
    gradient = jax.grad(lambda p: stage.loss("model", p, {}, {"video": video}, jax.random.key(1))[0])(params)
    largest = {
        name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        for name, tree in gradient["model"]["vae"].items()
    }
    assert (largest["encoder"] == largest["quant_conv"] == 0) == decoder_only
    assert min(largest["decoder"], largest["post_quant_conv"]) > 0


def test_parameters_that_do_not_learn_do_not_decay_either():
    options = {"vae": VAEOptions(decoder_only=True)}
    with pytest.raises(UserError, match=r"optimizer.weight_decay is 0.01; with vae.decoder_only, 0 is needed"):
        run_config("vae", **options)
    run_config("vae", **options, optimizer=OptimizerConfig(weight_decay=0.0))


def test_a_run_reads_pieces_of_its_clips_and_refuses_larger_ones(tmp_path):
    path = str(tmp_path / "clips")
    build(tmp_path / "clips", MovingShapesConfig(train=4, test=1, frames=5, height=16, width=24))
    config = run_config("vae", init=str(SHIPPED), data=DataConfig(path=path, frames=1, crop=(8, 16)))
    setup = prepare(config)
    reader = batches(setup.source, batch_size=4, seed=0, transforms=setup.transforms)
    assert next(reader)["video"].shape == (4, 1, 8, 16, 3)
    with pytest.raises(UserError, match=r"data.crop is 24x16, but the clips of .*clips are 16x24"):
        prepare(run_config("vae", init=str(SHIPPED), data=DataConfig(path=path, crop=(24, 16))))
