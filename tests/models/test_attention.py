import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax.errors import UserError
from rfjax.models import attention as module
from rfjax.models.attention import attention, causal_attention


def slow(q, k, v, length):
    """One query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                scores = k[b, : length[b], h] @ q[b, i, h] / np.sqrt(q.shape[-1])
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights / weights.sum() @ v[b, : length[b], h]
    return out


def operands(queries, keys, seed=0):
    parts = jax.random.split(jax.random.key(seed), 3)
    sizes = (queries, keys, keys)
    return [jax.random.normal(part, (2, size, 3, 8)) for part, size in zip(parts, sizes, strict=True)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), length=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_attends_to_the_valid_keys_alone(seed, length):
    q, k, v = operands(5, 9, seed)
    k = k.at[:, max(length) :].set(jnp.nan)
    got = attention(q, k, v, jnp.asarray(length))
    np.testing.assert_allclose(got, slow(q, k, v, length), atol=1e-5)


def test_no_length_means_all_keys():
    q, k, v = operands(5, 7)
    np.testing.assert_allclose(attention(q, k, v), slow(q, k, v, [7, 7]), atol=1e-5)


def test_blocks_of_queries_change_nothing(monkeypatch):
    q, k, v = operands(12, 20)
    whole = attention(q, k, v, jnp.asarray([20, 3]))
    monkeypatch.setattr(module, "SCORE_BYTES", 2 * 3 * 20 * 4 * 5)
    assert module._query_blocks(12, 2 * 3 * 20 * 4) == 3
    np.testing.assert_allclose(attention(q, k, v, jnp.asarray([20, 3])), whole, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = operands(4, 6)
    assert np.isfinite(attention(q * 1e4, k * 1e4, v)).all()


def test_cudnn_refuses_what_it_cannot_do():
    q, k, v = operands(4, 6)
    with pytest.raises(UserError, match="'cudnn' got float32 with head dimension 8"):
        attention(q, k, v, implementation="cudnn")


def test_splash_lowers_for_tpu():
    q = jax.ShapeDtypeStruct((1, 4680, 12, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 7 * 1560, 12, 128), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    splash = jax.jit(lambda q, k, v, n: attention(q, k, v, n, "splash"))
    assert "tpu_custom_call" in jax.export.export(splash, platforms=["tpu"])(q, k, k, length).mlir_module()


def test_splash_gives_the_same_numbers(monkeypatch):
    """The TPU kernel, interpreted: padding of queries, keys and channels must not show."""
    monkeypatch.setattr(module, "_splash_kernel", functools.partial(module._splash_kernel, interpret=True))
    q, k, v = operands(24, 60)
    length = jnp.asarray([60, 17])
    np.testing.assert_allclose(attention(q, k, v, length, "splash"), slow(q, k, v, [60, 17]), atol=1e-5)


def masked(q, k, v, chunk, clean):
    """Causal attention as a mask over all tokens says it."""
    time = np.arange(q.shape[1])
    number, is_clean = time % (clean or q.shape[1]) // chunk, time < clean
    sees = np.where(
        is_clean[:, None] | (not clean),
        (number[None] <= number[:, None]) & (is_clean[None] | (not clean)),
        np.where(is_clean[None], number[None] < number[:, None], number[None] == number[:, None]),
    )
    scores = jnp.where(sees, jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize(("chunk", "clean"), [(4, 0), (4, 12), (24, 0)])
def test_causal_attention_is_what_its_mask_says_with_its_gradient(chunk, clean):
    weights = jax.random.normal(jax.random.key(1), (2, 24, 3, 8))
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(weighted, attend, weights), argnums=(0, 1, 2)))(*operands(24, 24))
        for attend in (
            lambda q, k, v: causal_attention(q, k, v, chunk, clean),
            lambda q, k, v: masked(q, k, v, chunk, clean),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def weighted(attend, weights, q, k, v):
    return (attend(q, k, v) * weights).sum()


def test_splash_gradient_lowers_for_tpu():
    q = jax.ShapeDtypeStruct((1, 4680, 12, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 7 * 1560, 12, 128), jnp.bfloat16)
    loss = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, None, "splash").astype(jnp.float32).sum(), (0, 1, 2)))
    program = jax.export.export(loss, platforms=["tpu"])(q, k, k).mlir_module()
    assert program.count("tpu_custom_call") >= 3  # forward, and two kernels backward


def test_splash_gives_the_same_gradient(monkeypatch):
    """The TPU kernels, interpreted: nothing flows through padding."""
    monkeypatch.setattr(module, "_splash_kernel", functools.partial(module._splash_kernel, interpret=True))
    q, k, v = operands(24, 60)
    length, weights = jnp.asarray([60, 17]), jax.random.normal(jax.random.key(1), q.shape)

    def gradient(implementation):
        attend = functools.partial(attention, kv_length=length, implementation=implementation)
        return jax.jit(jax.grad(functools.partial(weighted, attend, weights), (0, 1, 2)))(q, k, v)

    for got, want in zip(gradient("splash"), gradient("xla"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
