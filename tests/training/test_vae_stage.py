import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_runs import MODEL, run_config

from rfjax.errors import UserError
from rfjax.models.functional import init_params
from rfjax.models.vae import WanVAE
from rfjax.training.config import OptimizerConfig, VAEOptions
from rfjax.training.stages.vae import VAEStage


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
