"""Sampling of the bidirectional network: an Euler solver of its flow, with classifier-free guidance.

The network's flow is the velocity of the probability-flow ODE in the noise level, so `x` moves by `flow` times the
difference of two levels. Source: Wan2.1 `wan/text2video.py`, Self-Forcing `scripts/generate_ode_pairs.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rfjax.config import ModelConfig
from rfjax.errors import UserError
from rfjax.models.functional import AnyArray, Params, bind
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.request import sample_keys
from rfjax.sampling.schedule import STEPS

Flow = Callable[[Float[Array, "B F H W C"], Float[Array, ""]], Float[Array, "B F H W C"]]
"""Flow of latents at a noise level."""


class Weak(NamedTuple):
    """A worse network, an earlier or shallower one of the same widths, to be led away from.

    Source: autoguidance, arXiv 2406.02507.
    """

    params: Params
    """Of the transformer, of any number of layers."""
    guidance: Float[Array, ""] | float
    """Coefficient of `prompt - weak`, added to the flow; 0 or more."""


def noise_levels(knots: Sequence[float], shift: float, steps: int) -> np.ndarray:
    """Cut the way from noise level to noise level, and on to 0, into Euler steps that are equal before the shift.

    Args:
        knots: noise levels to be met exactly, falling, in (0, 1].
        shift: of the schedule.
        steps: of the whole way, equally many from each knot to the next.

    Returns:
        Noise levels [knots, steps / knots + 1], float32; each row begins where the one before it ends.

    Raises:
        UserError: the steps do not divide among the knots.
    """
    if steps < 1 or steps % len(knots):
        raise UserError(f"the solver has {steps} steps; a multiple of the {len(knots)} denoising steps is needed")
    ends = np.asarray([*knots, 0.0], np.float64)
    unshifted = ends / (shift - (shift - 1) * ends)
    rows = np.linspace(unshifted[:-1], unshifted[1:], steps // len(knots) + 1, axis=1)
    return (shift * rows / (1 + (shift - 1) * rows)).astype(np.float32)


def euler(
    flow: Flow, noise: Float[Array, "B F H W C"], levels: Float[AnyArray, "S n"]
) -> Float[Array, "S+1 B F H W C"]:
    """Follow a flow through rows of noise levels; return the state before each row, and the one at the end."""

    def step(x, pair):
        level, following = pair
        return x + (following - level) * flow(x, level), None

    def row(x, row):
        end, _ = jax.lax.scan(step, x, (row[:-1], row[1:]))
        return end, x

    end, states = jax.lax.scan(row, noise, jnp.asarray(levels))
    return jnp.concatenate([states, end[None]])


def guided_flow(
    config: ModelConfig,
    params: Params,
    prompt_embeds: Float[Array, "B T D"],
    negative_embeds: Float[Array, "1 N D"],
    guidance: Float[Array, ""] | float,
    weak: Weak | None = None,
) -> Flow:
    """Return the bidirectional network's `negative + guidance * (prompt - negative)`, both computed in one pass.

    With `weak`, `weak.guidance * (prompt - weak)` is added.
    """
    network = bind(WanTransformer, config.transformer, params)
    worse = None if weak is None else (_flow(config, weak.params, prompt_embeds), weak.guidance)
    batch = prompt_embeds.shape[0]
    negative = jnp.broadcast_to(negative_embeds, (batch, *negative_embeds.shape[1:]))
    texts = network.embed_text(prompt_embeds), network.embed_text(negative)
    text = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *texts)

    def flow(x, level):
        timestep = jnp.full((2 * batch, x.shape[1]), STEPS * level)
        both, _ = network(jnp.concatenate([x, x]), timestep, text)
        prompted, other = both[:batch], both[batch:]
        guided = other + guidance * (prompted - other)
        if worse is None:
            return guided
        weak_flow, coefficient = worse
        return guided + coefficient * (prompted - weak_flow(x, level))

    return flow


def _flow(config: ModelConfig, params: Params, prompt_embeds: Float[Array, "B T D"]) -> Flow:
    network = bind(WanTransformer, config.transformer, params)
    text = network.embed_text(prompt_embeds)
    return lambda x, level: network(x, jnp.full(x.shape[:2], STEPS * level), text)[0]


def sample_bidirectional(
    config: ModelConfig,
    params: Params,
    prompt_embeds: Float[Array, "B T D"],
    negative_embeds: Float[Array, "1 N D"],
    shape: tuple[int, ...],
    key: Array,
    steps: int = 48,
    guidance: float = 3.0,
    weak: Weak | None = None,
) -> Float[Array, "B F H W C"]:
    """Generate whole videos with the bidirectional network.

    Args:
        config: sizes and schedule.
        params: of the transformer, which computes in their type.
        prompt_embeds: one prompt a sample.
        negative_embeds: of the prompt that guidance leads away from.
        shape: of the latents, [B, F, H, W, C].
        key: one key, from which each sample's follows, or an array of B keys.
        steps: of the solver.
        guidance: 1 is none.
        weak: a worse network to be led away from as well.

    Returns:
        Normalised latents, float32.
    """
    levels = noise_levels((1.0,), config.timestep_shift, steps)
    return solve(config, shape[1:], levels, params, prompt_embeds, negative_embeds, key, guidance, weak)[-1]


def solve(
    config: ModelConfig,
    shape: tuple[int, ...],
    levels: Float[AnyArray, "S n"],
    params: Params,
    prompt_embeds: Float[Array, "B T D"],
    negative_embeds: Float[Array, "1 N D"],
    key: Array,
    guidance: float,
    weak: Weak | None = None,
) -> Float[Array, "S+1 B F H W C"]:
    """Follow the guided flow from each sample's own noise through `levels`, as `euler` does, in one program.

    `shape` is that of one video's latents, [F, H, W, C]; the other arguments are those of `sample_bidirectional`.
    """
    keys = sample_keys(key, prompt_embeds.shape[0])
    return _solve(config, tuple(shape), levels, params, prompt_embeds, negative_embeds, keys, guidance, weak)


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def _solve(config, shape, levels, params, prompt_embeds, negative_embeds, keys, guidance, weak):
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    return euler(guided_flow(config, params, prompt_embeds, negative_embeds, guidance, weak), noise, levels)
