"""One player's learning step, compiled: gradient over the parts of a batch, optimizer, running average."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Int, PyTree

from rfjax.config import ModelConfig
from rfjax.models.text_encoder import encode_tokens
from rfjax.training.config import EMAConfig, TrainConfig
from rfjax.training.stage import Batch, Metrics, Stage, cast
from rfjax.training.state import TrainState

Update = Callable[[TrainState, Mapping[str, Any], Batch, int], tuple[TrainState, Metrics]]


def make_update(
    stage: Stage,
    player: str,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    model: ModelConfig,
    shardings: PyTree | None = None,
) -> Update:
    """Return the compiled function `(state, frozen, batch, step) -> (state, metrics)`; the state given is consumed.

    Args:
        stage: whose loss is lowered.
        player: who learns.
        optimizer: of that player.
        config: of the run.
        model: sizes of the text encoder, where captions come as tokens.
        shardings: of the state; None leaves them to the compiler.
    """
    number = stage.players.index(player)

    def loss(trained, params, frozen, batch, key):
        everyone = cast({**params, player: trained}, config.dtype)
        value, metrics = stage.loss(player, everyone, frozen, _with_embeds(model, frozen, batch), key)
        return value, {"loss": value, **metrics}

    def update(state: TrainState, frozen: Mapping[str, Any], batch: Batch, step: Int[Array, ""]):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), number)
        trained = state.params[player]
        gradient = functools.partial(jax.grad(loss, has_aux=True), trained, state.params, frozen)
        gradients, metrics = _mean_over_parts(gradient, batch, key, config.accumulate)
        changes, opt_state = optimizer.update(gradients, state.opt_state[player], trained)
        trained = jax.tree.map(lambda parameter, change: parameter + change, trained, changes)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        average = state.ema if number or config.ema is None else _average(config.ema, state.ema, trained, step + 1)
        state = TrainState(
            step=step + 1,
            params={**state.params, player: trained},
            opt_state={**state.opt_state, player: opt_state},
            ema=average,
        )
        return state, {f"{player}/{name}": value for name, value in metrics.items()}

    compiled = jax.jit(update, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    return lambda state, frozen, batch, step: compiled(state, frozen, batch, jnp.asarray(step, jnp.int32))


def _with_embeds(model: ModelConfig, frozen: Mapping[str, Any], batch: Batch) -> Batch:
    """Add the embeddings of captions given as tokens, where a frozen text encoder is there to make them."""
    if "ids" not in batch or "text_encoder" not in frozen or model.umt5 is None:
        return batch
    return {**batch, "prompt_embeds": encode_tokens(model.umt5, frozen["text_encoder"], batch["ids"], batch["mask"])}


def _mean_over_parts(gradient, batch: Batch, key: Array, parts: int):
    """Return gradients and metrics, averaged over equal parts of the batch that are worked on one after the other."""
    if parts == 1:
        return gradient(batch, key)
    # A part takes every so many-th example: along the first axis the batch lies spread over the devices.
    cut = jax.tree.map(lambda a: rearrange(a, "(n parts) ... -> parts n ...", parts=parts), dict(batch))

    def add(total, scanned):
        part, index = scanned
        return jax.tree.map(jnp.add, total, gradient(part, jax.random.fold_in(key, index))), None

    first = jax.tree.map(lambda a: a[0], cut)
    shapes = jax.eval_shape(gradient, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (cut, jnp.arange(parts)))
    return jax.tree.map(lambda a: a / parts, total)


def _average(config: EMAConfig, average, trained, step: Int[Array, ""]):
    decay = jnp.where(step < (config.from_step or 0), 0.0, config.decay)
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, trained)
