"""Optax chains of a run's configuration."""

import jax
import optax
import optax.contrib
from jaxtyping import PyTree

from rfjax.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates so far.

    Args:
        config: highest value, warm-up and form.
        updates: of the whole run.
    """
    warmup = config.warmup_steps or 0
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(updates - warmup, 1), alpha=0.01)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return after
    # The first update is made with 1/warmup of the rate, not with 0.
    rise = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1 or 1)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Return AdamW or Muon with decoupled weight decay, after clipping by the global norm.

    Muon's updates are scaled to the root mean square that AdamW's have (arXiv 2502.16982), so that one learning rate
    serves both kinds of parameters.
    """
    rate, (b1, b2), decay = learning_rate(config, updates), config.betas, config.weight_decay
    if config.name == "muon":
        chosen = optax.contrib.muon(
            rate,
            weight_decay=decay,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=decay,
            muon_weight_dimension_numbers=_layer_matrices,
            consistent_rms=0.2,
        )
    else:
        chosen = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, chosen)  # of one structure either way, as a run that goes on may change it


def _layer_matrices(params: PyTree) -> PyTree:
    """Say of the layers' kernels [L, in, out] which axes make a matrix; of all else, None."""

    def axes(path, leaf):
        names = [getattr(entry, "key", None) for entry in path]
        if "blocks" in names and names[-1] == "kernel" and leaf.ndim == 3:
            return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)
