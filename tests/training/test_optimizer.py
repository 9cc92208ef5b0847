import dataclasses
from typing import Any

import jax
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


def test_muon_orthogonalises_the_layers_matrices_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    config = OptimizerConfig(name="muon", learning_rate=0.1, betas=(0.0, 0.9), weight_decay=0.01)

    def drawn() -> Any:
        shapes = {"blocks": {"ffn": {"kernel": (2, 8, 32), "bias": (2, 32)}}, "head": {"kernel": (8, 4)}}
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape)), shapes, is_leaf=lambda x: type(x) is tuple
        )

    weights, gradient = drawn(), drawn()
    optimizer = make_optimizer(config, 10)
    changes: Any
    changes, _ = optimizer.update(gradient, optimizer.init(weights), weights)
    adamw: Any
    plain = make_optimizer(dataclasses.replace(config, name="adamw"), 10)
    adamw, _ = plain.update(gradient, plain.init(weights), weights)
    np.testing.assert_allclose(changes["blocks"]["ffn"]["bias"], adamw["blocks"]["ffn"]["bias"], rtol=1e-5)
    np.testing.assert_allclose(changes["head"]["kernel"], adamw["head"]["kernel"], rtol=1e-5)
    for layer in range(2):
        matrix = weights["blocks"]["ffn"]["kernel"][layer]
        step = -(np.asarray(changes["blocks"]["ffn"]["kernel"][layer]) / 0.1 + 0.01 * np.asarray(matrix))
        # 0.2 of AdamW's root mean square: an orthogonal matrix of 8 rows and 32 columns times 0.2 sqrt(32).
        singular = np.linalg.svd(step / (0.2 * np.sqrt(32)), compute_uv=False)
        assert singular.min() > 0.6
        assert singular.max() < 1.3
        ours, _, theirs = np.linalg.svd(np.asarray(gradient["blocks"]["ffn"]["kernel"][layer]), full_matrices=False)
        assert np.sum(step * (ours @ theirs)) > 0.95 * np.linalg.norm(step) * np.linalg.norm(ours @ theirs)
