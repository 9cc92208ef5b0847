"""The golden checkpoints as parameter trees, for tests of single networks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.matching import Matched, match, rule_for, to_rfjax
from checkpoints_convert.networks import NETWORKS
from checkpoints_convert.sources import Source, open_source
from rfjax.config import ModelConfig, load_model_config
from rfjax.models.functional import Params

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_config() -> ModelConfig:
    return load_model_config(GOLDEN / "config.json")


def golden_params(file: str, network: str, expected: Params) -> Params:
    """Fill the tree `expected` from a golden file; `network` is `transformer`, `vae` or `text_encoder`."""
    source = open_source(GOLDEN / file, network)
    matched = match(source.label, NETWORKS[network], source.tensors)
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: _parameter(source, matched, keys, leaf), expected)


def _parameter(source: Source, matched: Matched, keys: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    path = ".".join(str(key.key) for key in keys)
    rule, _ = rule_for(path, matched.rules)
    layers = range(leaf.shape[0]) if rule.stacked else [0]
    tensors = [to_rfjax(source.tensors[matched.slots[path, i][0]].load(), rule.pattern) for i in layers]
    values = jnp.asarray(np.stack(tensors) if rule.stacked else tensors[0], leaf.dtype)
    assert values.shape == leaf.shape, path
    return values
