import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from golden_weights import golden_params

from rfjax.models.functional import abstract_params, bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.schedule import sigma_at
from rfjax.training.losses import (
    distribution_matching_loss,
    draw_timestep,
    flow_matching_loss,
    match_distributions,
    training_timestep,
)


@pytest.fixture(scope="module")
def scores(golden_config):
    """Fake and real score as functions of a prompt."""
    config = golden_config.transformer
    expected = abstract_params(WanTransformer, config)

    def score(file):
        params = golden_params(file, "transformer", expected)

        def under(prompt):
            @jax.jit
            def flow(x, timestep):
                network = bind(WanTransformer, config, params)
                return network(x, timestep, network.embed_text(prompt))[0]

            return flow

        return under

    return score("fake_score_tiny.pth"), score("wan_bidirectional_tiny.pth")


@pytest.fixture(scope="module")
def data():
    return {name: jnp.asarray(value) for name, value in golden("dmd").items()}


@pytest.fixture(scope="module")
def matching(scores, data):
    fake, real = scores
    flows = fake(data["context"]), real(data["context"]), real(data["negative_context"])
    return match_distributions(*flows, data["x"], data["noise"], data["timestep"], 5.0, float(data["guidance"]))


def test_timesteps_of_pytorch(data):
    given = data["raw_timestep"].astype(jnp.float32)
    np.testing.assert_allclose(training_timestep(given, 5.0), data["timestep"], rtol=1e-6)
    ends = training_timestep(jnp.asarray([0.0, 4.0, 908.0, 999.0]), 5.0)
    np.testing.assert_allclose(ends, [20, 20, 980, 980])


def test_timesteps_are_drawn_uniformly_before_the_shift():
    drawn = np.asarray(draw_timestep(jax.random.key(0), 20_000, 2, 5.0))
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    raw = drawn[:, 0] / (5000 - 4 * drawn[:, 0])
    inner = raw[(raw > 0.005) & (raw < 0.9)]
    assert abs(inner.mean() - 0.4525) < 0.01
    assert (drawn == 20).mean() == pytest.approx(0.005, abs=0.003)
    assert (drawn == 980).mean() == pytest.approx(0.093, abs=0.01)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("noisy", "noisy"),
        ("fake", "fake_x0"),
        ("real_cond", "real_x0_cond"),
        ("real_uncond", "real_x0_uncond"),
        ("gradient", "gradient"),
    ],
)
def test_every_intermediate_of_pytorch(matching, data, ours, theirs):
    np.testing.assert_allclose(getattr(matching, ours), data[theirs], atol=5e-5)


def test_generator_loss_of_pytorch(matching, data):
    loss, by_x = jax.value_and_grad(distribution_matching_loss)(data["x"], matching.gradient)
    assert float(loss) == pytest.approx(float(data["loss"]), abs=5e-5)
    np.testing.assert_allclose(by_x * by_x.size, data["dloss_dx"] * by_x.size, atol=5e-5)


def test_critic_loss_of_pytorch(scores, data):
    flow = scores[0](data["context"])
    loss = flow_matching_loss(flow, data["x"], data["noise"], data["timestep"], 5.0)
    assert float(loss) == pytest.approx(float(data["critic_loss"]), abs=5e-5)


def test_nothing_flows_through_the_scores(scores, data):
    fake, real = scores
    flows = fake(data["context"]), real(data["context"]), real(data["negative_context"])

    def gradient_sum(x):
        return match_distributions(*flows, x, data["noise"], data["timestep"], 5.0, 3.0).gradient.sum()

    assert not jax.grad(gradient_sum)(data["x"]).any()


def test_a_sample_that_is_real_already_stays():
    """Where both scores predict x itself, 0 / 0 is no direction, and the other samples keep theirs."""
    x = jnp.zeros((2, 1, 2, 2, 1)).at[1].set(2)

    def fake(noisy, timestep):
        return noisy

    def real(noisy, timestep):
        return jnp.zeros_like(noisy)

    found = match_distributions(fake, real, real, x, jnp.zeros_like(x), jnp.full((2, 1), 500.0), 5.0, 3.0)
    assert not found.gradient[0].any()
    # noisy = 2 (1 - sigma), so fake - real = -sigma noisy and |x - real| = 2 sigma
    np.testing.assert_allclose(found.gradient[1], sigma_at(jnp.asarray(500.0), 5.0) - 1, rtol=1e-5)


@pytest.mark.parametrize("weak_guidance", [0.0, 0.5])
def test_the_real_score_is_led_away_from_a_worse_one(scores, data, weak_guidance):
    fake, real = scores
    cond, uncond, weak = real(data["context"]), real(data["negative_context"]), fake(data["negative_context"])
    x, noise, timestep = data["x"], data["noise"], data["timestep"]
    found = match_distributions(
        fake(data["context"]), cond, uncond, x, noise, timestep, 5.0, 3.0, weak_cond=weak, weak_guidance=weak_guidance
    )
    sigma = np.asarray(sigma_at(timestep, 5.0))[:, :, None, None, None]
    noisy = (1 - sigma) * x + sigma * noise
    denoised = [
        np.asarray(noisy - sigma * flow(noisy, timestep)) for flow in (fake(data["context"]), cond, uncond, weak)
    ]
    target = denoised[1] + 3 * (denoised[1] - denoised[2]) + weak_guidance * (denoised[1] - denoised[3])
    size = np.abs(x - target).mean(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(found.gradient, (denoised[0] - target) / size, atol=2e-4)


def test_flow_matching_takes_a_timestep_a_frame():
    """A network that knows x0 = 0 and reads its noise off x_t has no error, at any noise level of any frame."""
    noise = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))
    timestep = jnp.asarray([[1000.0, 833.3, 0.5], [20.0, 980.0, 500.0]])

    def flow(noisy, t):
        return noisy / sigma_at(t, 5.0)[:, :, None, None, None]

    assert float(flow_matching_loss(flow, jnp.zeros_like(noise), noise, timestep, 5.0)) < 1e-10
    wrong = flow_matching_loss(lambda x, t: flow(x, t[:, ::-1]), jnp.zeros_like(noise), noise, timestep, 5.0)
    assert float(wrong) > 0.1
