import dataclasses

import jax.numpy as jnp
import numpy as np
from conftest import GOLDEN, golden

from rfjax.config import ModelConfig, preset_path, read_mapping
from rfjax.sampling.schedule import add_noise, few_steps, sigma_at, timesteps, warp


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


def test_causvid_lists_timesteps_as_they_are():
    """Of CausVid's three steps the nearest sigmas are those of its own grid (shift 8)."""
    settings = read_mapping(preset_path("convert", "causvid"))
    config = ModelConfig.from_dict({key: value for key, value in settings.items() if key != "transformer_key"})
    np.testing.assert_array_equal(few_steps(config), np.asarray([1000, 757, 522], np.float32))
    np.testing.assert_allclose(sigma_at(jnp.asarray(few_steps(config)), 8.0), [1.0, 0.7567568, 0.5217391], atol=1e-6)
    warped = dataclasses.replace(config, denoising_steps=(1000, 750, 500, 250), warp_denoising_steps=True)
    np.testing.assert_allclose(few_steps(warped), [1000, 960, 888.8889, 727.27277], atol=1e-3)
