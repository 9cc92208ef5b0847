"""scripts/grow_checkpoint.py: more layers, the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import script
from tiny_data import TINY, make_tiny_checkpoint

from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.models.functional import bind
from rfjax.models.model import Model
from rfjax.models.transformer import WanTransformer

THREE_LAYERS = dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, num_layers=3))


@pytest.fixture
def grow(tmp_path):
    """Grow a checkpoint of three layers; return it before and after."""

    def run(every: int) -> tuple[Model, Model]:
        small = make_tiny_checkpoint(tmp_path / "small", THREE_LAYERS)
        script("grow_checkpoint").main([str(small), str(tmp_path / "grown"), str(every)])
        return load(small, dtype="float32"), load(tmp_path / "grown", dtype="float32")

    return run


def flow(model: Model):
    """Flow of fixed latents, and its gradient in the parameters."""
    sizes = model.config.transformer
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 4, sizes.in_dim))
    embeds = jax.random.normal(jax.random.key(1), (2, 5, sizes.text_dim))

    def run(params):
        network = bind(WanTransformer, sizes, params)
        return network(x, jnp.full((2, 3), 500.0), network.embed_text(embeds))[0]

    return run(model.transformer), jax.grad(lambda params: jnp.sum(run(params) ** 2))(model.transformer)


@pytest.mark.parametrize(
    ("every", "layers", "new"),
    [
        pytest.param(1, 6, [1, 3, 5], marks=pytest.mark.slow),
        pytest.param(2, 4, [2], marks=pytest.mark.slow),
        (3, 4, [3]),
    ],
)
def test_says_the_same_and_all_its_layers_learn(every, layers, new, grow):
    small, grown = grow(every)
    assert grown.config.transformer.num_layers == layers
    before, (after, gradient) = flow(small)[0], flow(grown)
    np.testing.assert_allclose(after, before, atol=1e-5)
    for number in new:
        kernel = grown.transformer["blocks"]["ffn"]["fc1"]["kernel"]
        np.testing.assert_array_equal(kernel[number], kernel[number - 1])
        for part, name in (("self_attn", "o"), ("cross_attn", "o"), ("ffn", "fc2")):
            assert not jnp.any(grown.transformer["blocks"][part][name]["kernel"][number])
            assert jnp.any(gradient["blocks"][part][name]["kernel"][number])
    for name in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, getattr(small, name), getattr(grown, name))
    assert grown.tokenizer is not None


def test_mistakes_are_named_and_write_nothing(grow, tmp_path):
    with pytest.raises(UserError, match=r"EVERY is 4; 1 to 3 are possible, as the transformer has 3 layers"):
        grow(4)
    assert not (tmp_path / "grown").exists()
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "mine").touch()
    with pytest.raises(UserError, match="already holds files"):
        grow(1)
