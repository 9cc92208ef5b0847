"""The 1.3B network at 480x832: lowered, compiled and exported without allocating anything."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from rfjax.config import load_model_config, preset_path
from rfjax.memory import create, footprint
from rfjax.models import attention
from rfjax.models.functional import abstract_params, bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.request import ChunkNoise
from rfjax.sampling.rollout import chunk_step, step
from rfjax.sampling.state import empty_state, memory_shape

CONFIG = load_model_config(preset_path("models", "wan_1_3b"))
SIZE = (CONFIG.latent_height, CONFIG.latent_width)
SHAPE = memory_shape(CONFIG, 1, SIZE)
GB = 1e9


def abstract_arguments(policy, dtype):
    """What `chunk_step` takes after its static arguments, as shapes."""
    network = CONFIG.transformer
    params = abstract_params(WanTransformer, network, dtype)

    def make(params):
        text = bind(WanTransformer, network, params).embed_text(jnp.zeros((1, network.text_len, network.text_dim)))
        state = empty_state(policy, SHAPE, 120, dtype, (*SIZE, network.in_dim))
        return text, state, ChunkNoise(jax.random.split(jax.random.key(0), 1), None, None)

    return policy, params, *jax.eval_shape(make, params)


def test_memory_of_relax_forcing_does_not_grow_and_fits_beside_the_weights():
    """In bfloat16: 47 stored frames of 287.5 MB and a view of 4."""
    short, long = (footprint(create("relax_forcing"), SHAPE, frames, jnp.bfloat16) for frames in (120, 12000))
    assert short == long
    assert short.attended_frames == 7
    assert short.state_bytes == pytest.approx(47 * 287.5e6, rel=1e-3)
    assert short.view_bytes == pytest.approx(4 * 287.5e6, rel=1e-3)


@pytest.mark.parametrize(
    ("policy", "temporary"),
    [(create("relax_forcing"), 5.5), (create("self_forcing", window_frames=21), 12.5)],
)
def test_a_chunk_compiles_with_bounded_memory(policy, temporary):
    """In float32, since XLA's CPU compiler widens bfloat16 with copies that no accelerator makes.

    Temporaries of Relax Forcing: the gathered view (2.3 GB), its rotated keys (1.15), the chunk's keys and values of
    all layers (1.7) and one layer's activations. The store is updated in place. The dense window's are its rotated keys
    (5.2), the chunk's keys and values, and a copy of the stored values (5.2).
    """
    arguments = abstract_arguments(policy, jnp.float32)
    plan = step.lower(CONFIG, SIZE, *arguments).compile().memory_analysis()
    assert plan is not None
    state = footprint(policy, SHAPE, 120, jnp.float32).state_bytes
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(arguments[1]))
    assert weights == pytest.approx(5.68 * GB, rel=1e-2)
    text = 2 * 30 * 512 * 1536 * 4
    # The 11 % of the weights that make the text's context are not the step's.
    assert plan.argument_size_in_bytes == pytest.approx(state + 0.894 * weights + text, rel=0.001)
    assert state <= plan.alias_size_in_bytes <= plan.output_size_in_bytes
    assert plan.output_size_in_bytes - plan.alias_size_in_bytes < 0.01 * GB
    assert plan.temp_size_in_bytes < temporary * GB


def test_a_chunk_is_exported_for_tpu_with_its_attention_kernel(monkeypatch):
    monkeypatch.setattr(attention, "default_implementation", lambda dtype, head_dim: "splash")
    chunk = jax.jit(functools.partial(chunk_step, CONFIG, SIZE), donate_argnames="state")
    policy = create("relax_forcing")
    exported = export.export(chunk, platforms=["tpu"])(*abstract_arguments(policy, jnp.bfloat16))
    assert exported.platforms == ("tpu",)
    text = exported.mlir_module()
    assert text.count("tpu_custom_call") >= 2  # self-attention and cross-attention, however often they are run
    assert "30x1x47x1560x1536xbf16" in text
