import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden

from rfjax.rope import rotate, rotation


@pytest.mark.parametrize("start", [0, 18, 900])
def test_matches_pytorch(start):
    data = golden("rope")
    cos, sin = rotation(start + jnp.arange(3)[None, :, None], 3, 4, 32)
    turned = rotate(jnp.asarray(data["x"]).reshape(1, 3, 12, 2, 32), cos, sin).reshape(1, 36, 2, 32)
    np.testing.assert_allclose(turned, data[f"start_frame_{start}"], atol=1e-5)


def test_tokens_with_places_of_their_own():
    """A token turned to a place and a time is turned as that place of a whole frame at that time."""
    rng = np.random.default_rng(0)
    places, times = rng.integers(0, 12, (1, 2, 12)), rng.integers(-9, 9, (1, 2, 12))
    own = rotation(jnp.asarray(times), 3, 4, 32, jnp.asarray(places))
    for time in range(-9, 9):
        whole = rotation(jnp.full((1, 1, 1), time), 3, 4, 32)
        for got, want in zip(own, whole, strict=True):
            np.testing.assert_array_equal(got[times == time], want[0, 0][places[times == time]])


@pytest.mark.parametrize("position", [-58, -1, 0, 1, 1023, 1024, 50_000])
def test_time_phase_is_exact_at_any_distance(position):
    """Upstream's table ends at 1024 frames and float32 products lose 5e-4 at 10,000; ours neither ends nor drifts."""
    cos, sin = rotation(jnp.asarray([[[position]]]), 1, 1, 128)
    pairs = 64 - 2 * (64 // 3)
    angles = position * 10_000.0 ** (-np.arange(pairs) / pairs)
    np.testing.assert_allclose(cos[0, 0, 0, 0, :pairs], np.cos(angles), atol=5e-5)
    np.testing.assert_allclose(sin[0, 0, 0, 0, :pairs], np.sin(angles), atol=5e-5)
