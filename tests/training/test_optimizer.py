from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rfjax.training.config import OptimizerConfig
from rfjax.training.optimizer import learning_rate, make_optimizer


def number(value):
    return float(jnp.asarray(value))


def test_learning_rate_rises_to_its_highest_value_and_falls_to_a_hundredth():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=4), 104)
    assert [number(rate(step)) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert number(rate(4)) == pytest.approx(1.0)
    assert number(rate(54)) == pytest.approx(0.505)
    assert number(rate(104)) == pytest.approx(0.01)


@pytest.mark.parametrize("warmup", [None, 1])
def test_constant_learning_rate_is_constant(warmup):
    rate = learning_rate(OptimizerConfig(learning_rate=0.5, warmup_steps=warmup), 10)
    assert [number(rate(step)) for step in (0, 1, 5, 20)] == [0.5] * 4


def test_adamw_by_hand():
    config = OptimizerConfig(learning_rate=0.1, betas=(0.0, 0.9), weight_decay=0.01, clip_norm=1.0)
    optimizer = make_optimizer(config, 10)
    weight = {"w": jnp.array([3.0, -1.0])}
    gradient = {"w": jnp.array([30.0, 40.0])}  # of length 50: clipped to [0.6, 0.8]
    changes: Any
    changes, _ = optimizer.update(gradient, optimizer.init(weight), weight)
    moved = weight["w"] + jnp.asarray(changes["w"])
    expected = np.array([3.0, -1.0]) - 0.1 * (np.array([1.0, 1.0]) + 0.01 * np.array([3.0, -1.0]))
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
