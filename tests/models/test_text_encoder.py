import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import GOLDEN, golden_config, golden_params

from rfjax.config import TextEncoderConfig
from rfjax.models.functional import abstract_params, bind, init_params
from rfjax.models.text_encoder import UMT5Encoder, encode_tokens, relative_buckets

_umt5_config = golden_config().umt5
assert _umt5_config is not None
CONFIG: TextEncoderConfig = _umt5_config

encode = jax.jit(encode_tokens, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return golden_params("umt5_tiny.pth", "text_encoder", abstract_params(UMT5Encoder, CONFIG))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "umt5.npz") as file:
        return {name: jnp.asarray(file[name].astype(np.int32 if name in ("ids", "mask") else None)) for name in file}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * float(jnp.ptp(expected)))


def test_parameters_are_those_of_upstream():
    upstream = json.loads((GOLDEN / "upstream_keys" / "models_t5_umt5-xxl-enc-bf16.json").read_text())
    leaves = jax.tree.leaves(abstract_params(UMT5Encoder, TextEncoderConfig()))
    assert sum(leaf.size for leaf in leaves) == sum(math.prod(shape) for shape in upstream.values())


def test_golden_hidden_states(params, golden):
    close(bind(UMT5Encoder, CONFIG, params)(golden["ids"], golden["mask"].astype(bool)), golden["hidden"])


@pytest.mark.parametrize("mask_type", [jnp.int32, bool])
def test_golden_prompt_embeddings(params, golden, mask_type):
    embeddings = encode(CONFIG, params, golden["ids"], golden["mask"].astype(mask_type))
    close(embeddings, golden["prompt_embeds"])
    assert not jnp.any(embeddings[golden["mask"] == 0])


def test_padding_changes_nothing(params, golden):
    ids, mask = golden["ids"], golden["mask"]
    filled = jnp.where(mask == 1, ids, 7)
    longer = [jnp.pad(values, ((0, 0), (0, 9))) for values in (filled, mask)]
    close(encode(CONFIG, params, *longer)[:, : ids.shape[1]], golden["prompt_embeds"])


def bucket_by_integers(offset: int) -> int:
    """The bucket of key minus query for 32 buckets, without floating point: 8 log(d/8) / log(16) >= s."""
    distance = abs(offset)
    if distance >= 8:
        steps = (s for s in range(8) if distance**8 >= 8**8 * 16**s)
        bucket = 8 + max(steps)
    else:
        bucket = distance
    return bucket + (16 if offset > 0 else 0)


def test_relative_buckets_up_to_600_tokens():
    length = 601
    buckets = relative_buckets(length, 32)
    offsets = range(-(length - 1), length)
    expected = {offset: bucket_by_integers(offset) for offset in offsets}
    assert all(np.all(np.diagonal(buckets, offset) == expected[offset]) for offset in offsets)


def test_bucket_boundaries_are_those_of_pytorch():
    # where `T5RelativeEmbedding._relative_position_bucket` of upstream changes, run with PyTorch 2.13 on a CPU
    behind = relative_buckets(600, 32)[-1, ::-1]
    changes = np.flatnonzero(np.diff(behind)) + 1
    assert changes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_bfloat16_agrees_with_float32(params, golden):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    embeddings = encode(CONFIG, narrow, golden["ids"], golden["mask"])
    assert embeddings.dtype == jnp.bfloat16
    assert jnp.mean(jnp.abs(embeddings - golden["prompt_embeds"])) < 0.02 * jnp.std(golden["prompt_embeds"])


def test_bfloat16_stays_finite_beyond_the_range_of_float16():
    config = TextEncoderConfig(vocab=50, dim=256, dim_attn=256, dim_ffn=512, num_heads=4, num_layers=6)
    params = init_params(UMT5Encoder, config, jax.random.key(0), jnp.bfloat16)
    params["blocks"]["ffn"]["fc2"]["kernel"] *= 1e5  # residual
    params["blocks"]["attn"]["q"]["kernel"] *= 1e3  # logits
    ids = jax.random.randint(jax.random.key(1), (2, 64), 0, config.vocab)
    mask = jnp.ones_like(ids).at[1, 20:].set(0)
    embeddings = encode(config, params, ids, mask)
    assert jnp.all(jnp.isfinite(embeddings))
    assert jnp.std(embeddings[0].astype(jnp.float32)) > 0.5
