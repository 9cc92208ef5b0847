import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_fakes import FakeNetwork
from toy_runs import MODEL

from rfjax.config import load_model_config, preset_path
from rfjax.errors import UserError
from rfjax.models import attention
from rfjax.models.functional import abstract_params, init_params
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.schedule import timesteps
from rfjax.training.config import CausalOptions
from rfjax.training.stage import Stage
from rfjax.training.stages import causal as module
from rfjax.training.stages.causal import CausalStage

PARAMS, KEY = {"model": {"transformer": {}}}, jax.random.key(0)
FROZEN = {"negative_embeds": jnp.full((1, 4, 8), -1.0)}


def batch(samples=2, frames=6):
    latents = np.random.default_rng(0).normal(size=(samples, frames, 4, 4, 4)).astype(np.float32)
    return {"latents": jnp.asarray(latents), "prompt_embeds": jnp.ones((samples, 4, 8))}


def spread(x):
    return x[..., None, None, None]


@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_the_right_flow_has_no_loss(forcing, monkeypatch):
    """From x_t and t alone the noise is known, and with it the target: the loss is 0 for nothing else."""
    data = batch()
    x0 = data["latents"]

    def flow(noisy, timestep):
        sigma = spread(timestep / 1000)
        return (noisy - (1 - sigma) * x0) / sigma - x0

    fake = FakeNetwork(flow).replace_in(module, monkeypatch)
    loss, _ = CausalStage(MODEL, CausalOptions(forcing=forcing), remat=True).loss("model", PARAMS, FROZEN, data, KEY)
    assert loss == pytest.approx(0, abs=1e-6)
    assert fake.asked["chunk_frames"] == 3
    assert fake.asked["remat"]
    assert (fake.asked["clean"] is x0) == (forcing == "teacher")
    assert (fake.asked["clean"] is None) == (forcing == "diffusion")


def test_a_flow_of_zero_costs_the_variance_of_noise_and_data(monkeypatch):
    data = batch(samples=64)
    FakeNetwork(lambda noisy, timestep: jnp.zeros_like(noisy)).replace_in(module, monkeypatch)
    loss, _ = CausalStage(MODEL, CausalOptions()).loss("model", PARAMS, FROZEN, data, KEY)
    assert loss == pytest.approx(1 + np.square(data["latents"]).mean(), rel=0.05)


def test_each_chunk_draws_its_timestep_from_the_grid_and_each_sample_its_prompt(monkeypatch):
    data = batch(samples=2000)
    fake = FakeNetwork(lambda noisy, timestep: noisy).replace_in(module, monkeypatch)
    CausalStage(MODEL, CausalOptions()).loss("model", PARAMS, FROZEN, data, KEY)
    drawn = np.asarray(fake.asked["timestep"]).reshape(2000, 2, 3)
    assert (drawn == drawn[:, :, :1]).all()
    first, second = (np.searchsorted(-timesteps(5.0), -drawn[:, i, 0]) for i in range(2))
    np.testing.assert_array_equal(timesteps(5.0)[first], drawn[:, 0, 0])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    for chosen in (first, second):
        assert chosen.mean() == pytest.approx(499.5, abs=30)
        assert chosen.std() == pytest.approx(1000 / np.sqrt(12), rel=0.05)
    dropped = np.asarray(fake.asked["text"] == -1)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped[:, 0, 0].mean() == pytest.approx(0.1, abs=0.03)


def test_what_does_not_fit_is_named():
    stage = CausalStage(MODEL, CausalOptions())
    assert isinstance(stage, Stage)
    with pytest.raises(UserError, match="a clip has 7 latent frames; a multiple of the chunk's 3 is needed"):
        stage.loss("model", PARAMS, FROZEN, batch(frames=7), KEY)
    with pytest.raises(UserError, match=r"causal.forcing is 'self'; teacher or diffusion is needed"):
        CausalStage(MODEL, CausalOptions(forcing="self"))


@pytest.mark.slow
def test_every_parameter_learns():
    stage, data = CausalStage(MODEL, CausalOptions()), batch()
    transformer = init_params(WanTransformer, MODEL.transformer, jax.random.key(1))
    loss = jax.jit(jax.grad(lambda p: stage.loss("model", {"model": {"transformer": p}}, FROZEN, data, KEY)[0]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(loss(transformer)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_the_gradient_at_full_size_is_exported_for_tpu_with_its_attention_kernels(monkeypatch):
    """Teacher forcing of the 1.3B network on 81 video frames at 480x832."""
    monkeypatch.setattr(attention, "default_implementation", lambda dtype, head_dim: "splash")
    config = load_model_config(preset_path("models", "wan_1_3b"))
    stage = CausalStage(config, CausalOptions(), remat=True)
    params = abstract_params(WanTransformer, config.transformer, jnp.bfloat16)
    embeds = jax.ShapeDtypeStruct((1, 512, 4096), jnp.bfloat16)
    data = {"latents": jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32), "prompt_embeds": embeds}

    def loss(params, negative, data):
        return stage.loss("model", {"model": {"transformer": params}}, {"negative_embeds": negative}, data, KEY)[0]

    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(params, embeds, data)
    # 7 lengths of what a chunk sees, and the text: forward, and two kernels backward.
    assert exported.mlir_module().count("tpu_custom_call") >= 8 * 3
