import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from rfjax.models import convolution
from rfjax.models.convolution import convolve


def plain(frames, kernel):
    """The same convolution as XLA's own, in three dimensions."""
    return lax.conv_general_dilated(
        frames, kernel, (1, 1, 1), [(0, 0), (1, 1), (1, 1)], dimension_numbers=("NTHWC", "THWIO", "NTHWC")
    )


def value_and_gradients(function, arguments):
    @jax.jit
    def run(frames, kernel, weights):
        value, transpose = jax.vjp(function, frames, kernel)
        return value, *transpose(weights)

    return run(*arguments)


def draw(sizes, taps, seed=0):
    """Frames, a kernel and a gradient of the result; sizes are those of the result and then its channels."""
    B, T, H, W, inputs, outputs = sizes
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, T + taps - 1, H, W, inputs), (taps, 3, 3, inputs, outputs), (B, T, H, W, outputs))
    return [jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes, strict=True)]


@settings(max_examples=3, deadline=None)
@given(sizes=st.tuples(*(st.integers(1, most) for most in (3, 5, 6, 7, 4, 4))), taps=st.sampled_from([1, 3]))
def test_convolution_and_gradients_are_those_of_xla(sizes, taps):
    with jax.enable_x64(True):
        arguments = draw(sizes, taps)
        for ours, theirs in zip(
            value_and_gradients(convolve, arguments), value_and_gradients(plain, arguments), strict=True
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * max(1, float(jnp.max(jnp.abs(theirs)))))


@pytest.mark.parametrize("piece", [1, 2 * 4 * 6 * 3, 3 * 4 * 6 * 3, 10**9])
def test_pieces_do_not_change_the_kernel_gradient(monkeypatch, piece):
    monkeypatch.setattr(convolution, "PIECE_SIZE", piece)
    with jax.enable_x64(True):
        arguments = draw((2, 5, 4, 6, 3, 2), 3)
        gradient = value_and_gradients(convolve, arguments)[2]
        np.testing.assert_allclose(gradient, value_and_gradients(plain, arguments)[2], rtol=0, atol=1e-11)


def test_bfloat16_gradients_stay_bfloat16():
    with jax.enable_x64(True):
        arguments = [x.astype(jnp.bfloat16) for x in draw((1, 2, 4, 6, 3, 2), 3)]
    assert {x.dtype for x in value_and_gradients(convolve, arguments)} == {jnp.dtype(jnp.bfloat16)}


def test_halving_sees_zeros_after_the_last_rows_and_columns_only():
    layer = convolution.SpatialConv(1, 1, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.arange(1.0, 10.0).reshape(3, 3, 1, 1))
    image = jax.random.normal(jax.random.key(1), (4, 6))
    padded = np.pad(image, ((0, 1), (0, 1)))
    expected = [
        [np.sum(padded[i : i + 3, j : j + 3] * np.arange(1, 10).reshape(3, 3)) for j in range(0, 6, 2)]
        for i in range(0, 4, 2)
    ]
    np.testing.assert_allclose(layer.halve(image[None, None, ..., None])[0, 0, ..., 0], expected, rtol=1e-4, atol=1e-4)


def test_time_convolution_by_steps_of_two_is_every_second_frame():
    layer = convolution.TimeConv(3, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 7, 2, 2, 3))
    np.testing.assert_allclose(layer(x, stride=2), layer(x)[:, ::2], rtol=1e-5, atol=1e-5)
    assert layer(x[:, :1], stride=2).shape == (1, 0, 2, 2, 2)
