"""Optax chains of a run's configuration."""

import optax

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
    """Return AdamW with decoupled weight decay, after clipping by the global norm."""
    adamw = optax.adamw(
        learning_rate(config, updates), b1=config.betas[0], b2=config.betas[1], weight_decay=config.weight_decay
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
