import jax.numpy as jnp
import numpy as np
from conftest import GOLDEN, golden

from rfjax.sampling.schedule import add_noise, sigma_at, timesteps, warp


def test_grid_matches_pytorch():
    data = golden("schedule")
    np.testing.assert_allclose(timesteps(5.0), data["timesteps"], rtol=1e-6)
    np.testing.assert_allclose(sigma_at(jnp.asarray(data["timesteps"]), 5.0), data["sigmas"], rtol=1e-6)


def test_forward_process_matches_pytorch():
    with np.load(GOLDEN / "schedule.npz") as data:
        sigma = sigma_at(jnp.asarray(data["query_timesteps"]), 5.0)[:, None, None, None]
        np.testing.assert_allclose(
            add_noise(jnp.asarray(data["x0"]), jnp.asarray(data["noise"]), sigma), data["noised"], atol=1e-6
        )


def test_warped_steps():
    np.testing.assert_allclose(warp((1000, 750, 500, 250), 5.0), golden("rollout_dense")["denoising_timesteps"])
