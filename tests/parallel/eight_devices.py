"""Training on a mesh of eight devices; `test_mesh.py` runs this file in a process that has them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from rfjax.config import TransformerConfig
from rfjax.errors import UserError
from rfjax.models import attention as attention_module
from rfjax.models.attention import Implementation, attention
from rfjax.models.functional import bind, init_params
from rfjax.models.transformer import WanTransformer
from rfjax.parallel.mesh import batch_sharding, check_batch, global_batch, make_mesh, parameter_sharding, place

LAYERS = 3
CONFIG = TransformerConfig(
    dim=128, ffn_dim=384, freq_dim=64, text_dim=32, text_len=8, num_heads=2, num_layers=LAYERS, in_dim=4, out_dim=4
)
OPTIMIZER = optax.adamw(1e-3, eps=1e-3)
MESHES = {"8x1": (8, 1), "1x8": (1, 8), "2x4": (2, 4)}


def update(params, moments, batch):
    """Flow matching, as a stage does it."""

    def loss(params):
        network = bind(WanTransformer, CONFIG, params)
        noise = jax.random.normal(jax.random.key(7), batch["latents"].shape)
        sigma = batch["sigma"][:, :, None, None, None]
        noisy = (1 - sigma) * batch["latents"] + sigma * noise
        text = network.embed_text(batch["prompt_embeds"])
        flow, _ = network(noisy, 1000 * batch["sigma"], text, remat=True)
        return jnp.square(flow - (noise - batch["latents"])).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, moments = OPTIMIZER.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value, gradient


@functools.cache
def start():
    """Parameters and a batch, on the host."""
    rng = np.random.default_rng(0)
    params = init_params(WanTransformer, CONFIG, jax.random.key(0))
    batch = {
        "latents": rng.normal(size=(8, 2, 4, 4, 4)).astype(np.float32),
        "sigma": rng.uniform(0.1, 0.9, size=(8, 2)).astype(np.float32),
        "prompt_embeds": rng.normal(size=(8, 8, 32)).astype(np.float32),
    }
    return jax.device_get(params), batch


def compiled_update(mesh, params, batch):
    moments = OPTIMIZER.init(params)
    shardings = parameter_sharding(mesh, params), parameter_sharding(mesh, moments)
    params, moments = place(params, shardings[0]), place(moments, shardings[1])
    whole = jax.NamedSharding(mesh, PartitionSpec())
    step = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*shardings, whole, shardings[0]))
    batch = global_batch(mesh, batch)
    return step.lower(params, moments, batch).compile(), params, moments, batch


@functools.cache
def train(data, fsdp):
    """Two steps: what came out, the optimizer's state and the compiled step."""
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    params, batch = start()
    with jax.set_mesh(mesh):
        step, params, moments, batch = compiled_update(mesh, params, batch)
        params, moments, first, _ = step(params, moments, batch)
        params, moments, second, gradient = step(params, moments, batch)
        losses = [float(first), float(second)]
    return {"loss": losses, "params": params, "gradient": gradient}, moments, step


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_training_is_that_of_one_device(shape):
    on_one_device = jax.device_get(train(1, 1)[0])
    got, moments, _ = train(*shape)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(compare, jax.device_get(got), on_one_device)
    assert on_one_device["loss"][1] < on_one_device["loss"][0]
    for tree in (got["params"], moments[0].mu, moments[0].nu):
        for leaf in jax.tree.leaves(tree):
            held = leaf.addressable_shards[0].data.size
            assert held == (leaf.size // shape[1] if leaf.size >= 2**14 else leaf.size)


def test_layers_are_gathered_one_by_one_and_activations_stay_where_they_are():
    _, _, step = train(1, 8)
    collectives = re.findall(r"= \w+\[([\d,]+)\]\S* (all-gather|all-to-all|collective-permute)\(", step.as_text() or "")
    assert {kind for _, kind in collectives} == {"all-gather"}
    shapes = {tuple(map(int, shape.split(","))) for shape, _ in collectives}
    # Kernels of one layer, and of what is no layer: nothing of all layers, and no activations.
    assert shapes == {(1, 128, 128), (1, 128, 384), (1, 384, 128), (128, 128), (128, 768)}


def test_batch_lies_spread_and_is_what_was_given():
    mesh, given = make_mesh(2, 4), start()[1]
    batch = global_batch(mesh, given)
    assert batch["latents"].sharding.is_equivalent_to(batch_sharding(mesh), 5)
    assert {shard.data.shape[0] for shard in batch["latents"].addressable_shards} == {1}
    np.testing.assert_array_equal(batch["latents"], given["latents"])


def test_placed_arrays_may_be_donated():
    params = start()[0]
    shardings = parameter_sharding(make_mesh(8, 1), params)
    first = place(params, shardings)
    second = place(first, shardings)
    jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(second)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), params)


def test_mesh_takes_all_devices():
    assert make_mesh().shape == {"data": 8, "fsdp": 1}
    assert make_mesh(fsdp=4).shape == {"data": 2, "fsdp": 4}
    assert make_mesh().axis_types == (jax.sharding.AxisType.Auto,) * 2


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ((3, 2), "data 3 x fsdp 2"),
        ((0, 3), "fsdp 3"),
        ((4, 1), "data 4 x fsdp 1"),
        ((0, 16), "fsdp 16"),
        ((8, 0), "fsdp 0"),
    ],
)
def test_sizes_that_do_not_make_the_devices_are_named(sizes, given):
    with pytest.raises(UserError, match=rf"{given}, .* 8 devices; .*8 x 1, 4 x 2, 2 x 4, 1 x 8"):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("batch", "accumulate", "fitting"), [(12, 1, "8 or 16"), (24, 2, "16 or 32"), (4, 1, "8 or 16"), (0, 1, "8 or 16")]
)
def test_batch_that_does_not_divide_is_named(batch, accumulate, fitting):
    check_batch(32, make_mesh(), accumulate, 1)
    with pytest.raises(UserError, match=rf"batch_size {batch} does not divide among 8 devices.*; {fitting} would"):
        check_batch(batch, make_mesh(), accumulate, 1)


def test_splash_has_the_same_gradient_on_a_mesh(monkeypatch):
    """The TPU kernels, interpreted."""
    kernel = functools.partial(attention_module._splash_kernel, interpret=True)
    monkeypatch.setattr(attention_module, "_splash_kernel", kernel)
    mesh = make_mesh(1, 2, jax.devices()[:2])
    q, k, v = (jax.random.normal(jax.random.key(i), (2, size, 1, 8)) for i, size in enumerate((24, 60, 60)))
    length, weights = jnp.asarray([60, 17]), jax.random.normal(jax.random.key(9), q.shape)

    def gradient(implementation: Implementation):
        return jax.grad(lambda q, k, v: (attention(q, k, v, length, implementation) * weights).sum(), (0, 1, 2))

    want = gradient("xla")(q, k, v)
    with jax.set_mesh(mesh):
        got = jax.jit(gradient("splash"))(*jax.device_put((q, k, v), batch_sharding(mesh)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), got, want)


@pytest.mark.parametrize(("batch", "on_each"), [(16, 2), (3, 3)], ids=["divided", "indivisible"])
def test_splash_lowers_for_a_tpu_mesh(batch, on_each):
    """A batch that does not divide, such as that of sample videos, is computed on every device."""
    q, k = (jax.ShapeDtypeStruct((batch, tokens, 2, 128), jnp.bfloat16) for tokens in (512, 1024))
    with jax.set_mesh(make_mesh(2, 4)):
        splash = jax.jit(lambda q, k, v: attention(q, k, v, None, "splash"))
        program = jax.export.export(splash, platforms=["tpu"])(q, k, k).mlir_module()
    (kernel,) = (line for line in program.splitlines() if "@tpu_custom_call" in line)
    assert f"tensor<{on_each}x2x512x128xbf16>" in kernel


def test_training_lowers_for_a_tpu_mesh(monkeypatch):
    """Mosaic kernels must be divided by hand: without, lowering for TPU raises."""
    monkeypatch.setattr(attention_module, "default_implementation", lambda dtype, head_dim: "splash")
    mesh = make_mesh(2, 4)
    params, batch = start()
    moments = OPTIMIZER.init(params)
    shardings = parameter_sharding(mesh, params), parameter_sharding(mesh, moments)

    def abstract(tree, shardings):
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

    with jax.set_mesh(mesh):
        batch = abstract(batch, dict.fromkeys(batch, batch_sharding(mesh)))
        arguments = abstract(params, shardings[0]), abstract(moments, shardings[1]), batch
        program = jax.export.export(jax.jit(lambda *given: update(*given)), platforms=["tpu"])(*arguments).mlir_module()
    assert program.count("@tpu_custom_call") >= 3  # forward, and two kernels backward
