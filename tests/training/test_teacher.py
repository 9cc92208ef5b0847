import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_fakes import FakeNetwork
from toy_runs import MODEL

from rfjax.sampling.schedule import STEPS, timesteps
from rfjax.training.config import TeacherOptions
from rfjax.training.stages import teacher
from rfjax.training.stages.teacher import TeacherStage, draw_steps

SAMPLES = 2000


@pytest.fixture
def asked(monkeypatch):
    """What the network is asked in a step, where its answer is 0."""
    fake = FakeNetwork(lambda noisy, timestep: jnp.zeros_like(noisy)).replace_in(teacher, monkeypatch)
    batch = {"latents": jnp.ones((SAMPLES, 3, 1, 1, 4)), "prompt_embeds": jnp.ones((SAMPLES, 2, 8))}
    stage = TeacherStage(MODEL, TeacherOptions())
    loss, _ = stage.loss(
        "model", {"model": {"transformer": {}}}, {"negative_embeds": -jnp.ones((1, 2, 8))}, batch, jax.random.key(0)
    )
    return fake.asked | {"loss": float(loss)}


def test_a_tenth_of_the_prompts_is_dropped_whole(asked):
    dropped = np.asarray(asked["text"] == -1)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped[:, 0, 0].mean() == pytest.approx(0.1, abs=0.03)


def test_all_frames_of_a_video_have_one_timestep_of_the_shifted_grid(asked):
    chosen = np.asarray(asked["timestep"])
    assert (chosen == chosen[:, :1]).all()
    grid = np.asarray(timesteps(MODEL.timestep_shift))
    ranks = np.searchsorted(np.sort(grid), chosen[:, 0])
    np.testing.assert_allclose(np.sort(grid)[ranks], chosen[:, 0])
    assert ranks.mean() == pytest.approx(STEPS / 2, rel=0.05)


def test_the_loss_is_the_squared_error_of_the_flow(asked):
    assert asked["loss"] == pytest.approx(2.0, rel=0.05)  # of noise - 1 to 0


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.4, 1.0), (-1.0, 0.3)])
def test_timesteps_may_be_drawn_with_a_normal_logit(mean, deviation):
    chosen = np.asarray(draw_steps(jax.random.key(0), 20_000, (mean, deviation)))
    share = timesteps(1.0)[chosen] / STEPS - 0.5 / STEPS  # 0 is clean; the middle of each place on the grid
    logit = np.log(share / (1 - share))
    assert logit.mean() == pytest.approx(mean, abs=0.03)
    assert logit.std() == pytest.approx(deviation, rel=0.03)


def test_timesteps_of_any_logit_are_on_the_grid():
    for mean in (-100.0, 100.0):
        chosen = np.asarray(draw_steps(jax.random.key(0), 100, (mean, 1.0)))
        assert ((chosen >= 0) & (chosen < STEPS)).all()


def test_the_stage_draws_as_its_options_say(monkeypatch):
    fake = FakeNetwork(lambda noisy, timestep: jnp.zeros_like(noisy)).replace_in(teacher, monkeypatch)
    batch = {"latents": jnp.ones((SAMPLES, 3, 1, 1, 4)), "prompt_embeds": jnp.ones((SAMPLES, 2, 8))}
    stage = TeacherStage(MODEL, TeacherOptions(logit_normal=(0.0, 0.01)))
    frozen = {"negative_embeds": jnp.ones((1, 2, 8))}
    stage.loss("model", {"model": {"transformer": {}}}, frozen, batch, jax.random.key(0))
    middle = timesteps(MODEL.timestep_shift)[STEPS // 2]
    np.testing.assert_allclose(np.asarray(fake.asked["timestep"]), middle, rtol=0.05)
