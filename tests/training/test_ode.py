import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_fakes import FakeNetwork
from toy_runs import MODEL

from rfjax.errors import UserError
from rfjax.sampling.schedule import few_steps
from rfjax.training.stage import Stage
from rfjax.training.stages import ode as module
from rfjax.training.stages.ode import ODEStage

PARAMS, KEY = {"model": {"transformer": {}}}, jax.random.key(0)
STEPS = few_steps(MODEL)


def batch(samples=2, states=5, frames=6):
    trajectory = np.random.default_rng(0).normal(size=(samples, states, frames, 4, 4, 4)).astype(np.float32)
    return {"trajectory": jnp.asarray(trajectory), "prompt_embeds": jnp.ones((samples, 4, 8))}


def spread(x):
    return x[..., None, None, None]


def test_the_flow_that_leads_to_the_end_has_no_loss(monkeypatch):
    data = batch()
    clean = data["trajectory"][:, -1]
    fake = FakeNetwork(lambda noisy, timestep: (noisy - clean) / spread(timestep / 1000)).replace_in(
        module, monkeypatch
    )
    loss, _ = ODEStage(MODEL, remat=True).loss("model", PARAMS, {}, data, KEY)
    assert loss == pytest.approx(0, abs=1e-9)
    assert (fake.asked["chunk_frames"], fake.asked["remat"]) == (3, True)
    np.testing.assert_array_equal(fake.asked["text"], data["prompt_embeds"])


def test_each_chunk_is_at_a_step_of_its_own_never_at_the_end(monkeypatch):
    data = batch(samples=400)
    fake = FakeNetwork(lambda noisy, timestep: jnp.zeros_like(noisy)).replace_in(module, monkeypatch)
    loss, _ = ODEStage(MODEL).loss("model", PARAMS, {}, data, KEY)
    timestep, noisy = np.asarray(fake.asked["timestep"]), np.asarray(fake.asked["noisy"])
    chunks = timestep.reshape(400, 2, 3)
    assert (chunks == chunks[:, :, :1]).all()
    chosen = np.searchsorted(-STEPS, -timestep)
    np.testing.assert_array_equal(STEPS[chosen], timestep)
    shares = [(chosen[:, ::3] == i).mean() for i in range(4)]
    np.testing.assert_allclose(shares, 0.25, atol=0.06)
    assert abs(np.corrcoef(chosen[:, 0], chosen[:, 3])[0, 1]) < 0.15
    trajectory = np.asarray(data["trajectory"])
    want = np.stack([trajectory[i, chosen[i], np.arange(6)] for i in range(400)])
    np.testing.assert_array_equal(noisy, want)
    assert loss == pytest.approx(np.square(want - trajectory[:, -1]).mean(), rel=1e-5)


def test_what_does_not_fit_is_named():
    stage = ODEStage(MODEL)
    assert isinstance(stage, Stage)
    with pytest.raises(UserError, match="a trajectory has 4 states; the model's 4 denoising steps need 5"):
        stage.loss("model", PARAMS, {}, batch(states=4), KEY)
    with pytest.raises(UserError, match="a clip has 5 latent frames"):
        stage.loss("model", PARAMS, {}, batch(frames=5), KEY)
