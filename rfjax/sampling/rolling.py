"""The rolling rollout of Rolling Forcing: as many chunks as there are denoising steps are denoised together.

Each chunk of the joint window stands one noise level above the chunk before it. One pass over the window, in which
every frame sees every other, takes each chunk one level down; the first is then finished, a clean pass over it alone
makes its memory, and a chunk of pure noise joins at the end. At both ends of a video the window is shorter: it fills
up, and it empties. The number of the window's chunks is the only thing compiled for; where it stands is traced.

Source: TencentARC/RollingForcing `pipeline/rolling_forcing_inference.py` (arXiv 2509.25161). Unlike there, videos
shorter than the window are denoised at the levels that they would have in a longer one.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from rfjax.config import ModelConfig
from rfjax.errors import UserError
from rfjax.memory import NONE, MemoryPolicy, Trace, View
from rfjax.models.functional import AnyArray, Params, bind
from rfjax.models.model import Model
from rfjax.models.transformer import TextContext, WanTransformer
from rfjax.pytree import pytree
from rfjax.sampling.request import ChunkNoise, check_memory, draw_noise, request_of
from rfjax.sampling.rollout import Chunk, Rollout, encode_text, remember
from rfjax.sampling.schedule import add_noise, few_steps, sigma_at
from rfjax.sampling.state import RolloutState, attend, empty_state, memory_shape, read_memory


@runtime_checkable
class WindowPolicy(MemoryPolicy, Protocol):
    """A policy whose joint window attends to other frames than its clean pass; of all others, both use `read`."""

    def read_window(self, state: Any, start: Int[Array, "B"], frames: int) -> View:
        """Gather what a joint window of so many frames, the first of which is `start`, attends to.

        The shorter the window, the more slots the view may have.
        """
        ...


@pytree()
@dataclasses.dataclass(frozen=True)
class Window:
    """The chunks being denoised, the cleanest first; chunks beyond those that are present mean nothing."""

    latents: Float[Array, "chunks B n H W C"]
    """Of each chunk, at its own noise level."""
    renoise: Float[Array, "chunks steps B n H W C"]
    """Noise that each chunk gets after each step: none after the last."""


def enter(
    config: ModelConfig,
    frame_size: tuple[int, int],
    state: RolloutState,
    window: Window,
    place: int | Int[Array, ""],
    noise: ChunkNoise,
) -> Window:
    """Put a chunk of pure noise into the window.

    Args:
        config: sizes and denoising steps (static).
        frame_size: latent rows and columns (static).
        state: whose `start` is the first frame of the window.
        window: without the chunk.
        place: of the chunk in the window.
        noise: keys, or the chunk's own noise without the chunks axis.
    """
    initial, renoise = draw_noise(config, frame_size, state.start + place * config.chunk_frames, noise)
    renoise = jnp.concatenate([renoise, jnp.zeros_like(initial)[None]])
    return Window(window.latents.at[place].set(initial), window.renoise.at[place].set(renoise))


def advance(
    config: ModelConfig,
    frame_size: tuple[int, int],
    policy: MemoryPolicy,
    params: Params,
    text: TextContext,
    state: RolloutState,
    window: Window,
    size: int,
    level: int | Int[Array, ""],
) -> tuple[Window, Trace]:
    """Take every chunk of the window one denoising step further, in one pass; also return what it remembered.

    Args:
        config: sizes and denoising steps (static).
        frame_size: latent rows and columns (static).
        policy: decides what is attended.
        params: of the transformer, which computes in their type.
        text: from `encode_text`.
        state: memory of the finished chunks.
        window: chunks at their present levels.
        size: chunks that are present (static).
        level: index of the first chunk's denoising step; that of each following one is one less.
    """
    view = _read_window(policy, state, size * config.chunk_frames, config.chunk_frames)
    network = bind(WanTransformer, config.transformer, params)
    steps = jnp.asarray(few_steps(config))
    sigmas = sigma_at(steps, config.timestep_shift)
    # After the last step the noise level is 0, where adding noise changes nothing.
    following = jnp.concatenate([sigmas[1:], jnp.zeros_like(sigmas[:1])])
    levels = level - jnp.arange(size)
    noisy, fresh = window.latents[:size], window.renoise[jnp.arange(size), levels]

    timestep = jnp.repeat(steps[levels], config.chunk_frames)
    frames = rearrange(noisy, "k b n h w c -> b (k n) h w c")
    timestep = jnp.broadcast_to(timestep, frames.shape[:2])
    flow, _ = network(frames, timestep, text, attend(config, frame_size, view))
    flow = rearrange(flow, "b (k n) h w c -> k b n h w c", k=size)

    sigma, next_sigma = (s[levels].reshape(-1, 1, 1, 1, 1, 1) for s in (sigmas, following))
    latents = add_noise(noisy - sigma * flow, fresh, next_sigma)
    return dataclasses.replace(window, latents=window.latents.at[:size].set(latents)), view.trace


def finish(
    config: ModelConfig,
    frame_size: tuple[int, int],
    policy: MemoryPolicy,
    params: Params,
    text: TextContext,
    state: RolloutState,
    window: Window,
    trace: Trace,
) -> tuple[RolloutState, Window, Chunk]:
    """Remember the window's first chunk, which is clean, and take it out.

    Args:
        config: sizes (static).
        frame_size: latent rows and columns (static).
        policy: decides what the clean pass attends to and what is kept.
        params: of the transformer, which computes in their type.
        text: from `encode_text`.
        state: memory of the chunks before.
        window: after the chunk's last step.
        trace: of that step.
    """
    latents = window.latents[0]
    state = remember(config, frame_size, policy, params, text, state, latents)
    rest = jax.tree.map(lambda chunks: jnp.roll(chunks, -1, axis=0), window)
    return state, rest, Chunk(latents, jnp.isfinite(latents).all(axis=(1, 2, 3, 4)), trace)


def _read_window(policy: MemoryPolicy, state: RolloutState, frames: int, fewest: int) -> View:
    """Read the memory for a window of so many frames; traces of all windows have the slots of the shortest's."""
    if not isinstance(policy, WindowPolicy):
        return read_memory(policy, state)
    view = policy.read_window(state.memory, state.start, frames)
    most = jax.eval_shape(lambda: policy.read_window(state.memory, state.start, fewest)).trace.frames.shape[-2]

    def pad(slots, value):
        return jnp.pad(slots, ((0, 0), (0, 0), (0, most - slots.shape[-2]), (0, 0)), constant_values=value)

    trace = dataclasses.replace(
        view.trace,
        frames=pad(view.trace.frames, -1),
        positions=pad(view.trace.positions, 0),
        roles=pad(view.trace.roles, NONE),
    )
    return dataclasses.replace(view, trace=trace)


def attended_frames(config: ModelConfig, policy: MemoryPolicy, frame_size: tuple[int, int], video_frames: int) -> int:
    """How many frames the passes over a full window attend to, its own included, once the memory is full."""
    frames = len(config.denoising_steps) * config.chunk_frames
    shape = memory_shape(config, 1, frame_size)

    def keys():
        state = empty_state(policy, shape, video_frames, jnp.float32, (*frame_size, config.transformer.in_dim))
        return _read_window(policy, state, frames, config.chunk_frames).keys

    return jax.eval_shape(keys).shape[2] + frames


@functools.partial(jax.jit, static_argnames=("config", "sizes", "dtype"))
def _empty(config, sizes, dtype, policy, params, prompt_embeds):
    # All comes out of one program with the text, so that it lies where the parameters lie from the first step on.
    batch, _, *latent_shape = sizes.generated
    shape = memory_shape(config, batch, sizes.frame_size)
    state = empty_state(policy, shape, sizes.video_frames, dtype, tuple(latent_shape))
    steps = len(config.denoising_steps)
    chunk = (batch, config.chunk_frames, *latent_shape)
    window = Window(jnp.zeros((steps, *chunk), jnp.float32), jnp.zeros((steps, steps, *chunk), jnp.float32))
    return encode_text(config, params, prompt_embeds), state, window


_enter = jax.jit(enter, static_argnames=("config", "frame_size"), donate_argnames="window")
_advance = jax.jit(advance, static_argnames=("config", "frame_size", "size"), donate_argnames="window")
_finish = jax.jit(finish, static_argnames=("config", "frame_size"), donate_argnames=("state", "window"))


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "chunks"), donate_argnames=("state", "window"))
def _roll(config, frame_size, policy, params, text, state, window, noise, chunks):
    """Let so many chunks join a window that lacks one, and finish as many, as one program."""
    shared, size = (config, frame_size, policy, params, text), len(config.denoising_steps)

    def roll(carry, noise_of_chunk):
        state, window = carry
        own = dataclasses.replace(noise, initial=noise_of_chunk[0], renoise=noise_of_chunk[1])
        window = enter(config, frame_size, state, window, size - 1, own)
        window, trace = advance(*shared, state, window, size, size - 1)
        state, window, chunk = finish(*shared, state, window, trace)
        return (state, window), chunk

    (state, window), made = jax.lax.scan(roll, (state, window), (noise.initial, noise.renoise), length=chunks)
    return state, window, made


def _iterate(shared, chunks, index, state, window, noise):
    """Let chunk `index` of the video join, if there is one, denoise once and finish the first chunk when it is due."""
    config, frame_size, *_ = shared
    last_level = len(config.denoising_steps) - 1
    size = min(index, chunks - 1) - max(index - last_level, 0) + 1
    if index < chunks:
        window = _enter(config, frame_size, state, window, size - 1, noise.at(index))
    window, trace = _advance(*shared, state, window, size, min(index, last_level))
    if index < last_level:
        return state, window, None
    return _finish(*shared, state, window, trace)


def rollout(
    model: Model,
    policy: MemoryPolicy,
    prompt_embeds: Float[AnyArray, "B T D"],
    noise: Float[AnyArray, "B F H W C"] | tuple[int, ...],
    *,
    renoise: Float[AnyArray, "chunks steps B n H W C"] | None = None,
    key: Array | None = None,
    initial_latents: Float[AnyArray, "B G H W C"] | None = None,
) -> Rollout:
    """Generate a whole video per sample; all steps with a full window are one compiled program.

    A longer video begins with the shorter one but for its last chunks, one less than there are denoising steps: they
    were denoised without later chunks beside them.

    Args:
        model: from `rfjax.load`; its denoising steps are the chunks of the joint window.
        policy: from `rfjax.memory.create`. `rolling_forcing` is the published one; any other gives the joint window
            what it would give the window's first chunk.
        prompt_embeds: one prompt a sample, padding zeroed; shorter than the model's text length is padded.
        noise: where the F generated frames start, or just that shape, and `key` draws it.
        renoise: noise added after every denoising step but the last, of each generated chunk; else `key` draws it.
        key: one key, from which each sample's follows, or an array of B keys. A sample's video depends on its key and
            its length alone, not on the batch it is in; its noise is that of `rfjax.rollout`.
        initial_latents: refused, since there is no published rule for continuing a video.

    Raises:
        UserError: shapes that do not fit the model or each other, noise to draw and no key, given latents, or a
            model from `rfjax.parallelize`.
    """
    sizes, drawn = _request_of(model, prompt_embeds, noise, renoise, key, initial_latents)
    check_memory(model, policy, sizes)
    shared, state, window = _begin(model, policy, prompt_embeds, sizes)
    before = len(model.config.denoising_steps) - 1
    full, parts = max(sizes.chunks - before, 0), []
    for index in range(before):
        state, window, _ = _iterate(shared, sizes.chunks, index, state, window, drawn)
    if full:
        state, window, rolled = _roll(*shared, state, window, drawn.part(before, sizes.chunks), full)
        parts.append(rolled)
    for index in range(before + full, before + sizes.chunks):
        state, window, chunk = _iterate(shared, sizes.chunks, index, state, window, drawn)
        parts.append(jax.tree.map(lambda leaf: leaf[None], chunk))
    chunks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return Rollout(jnp.moveaxis(chunks.latents, 0, 1).reshape(sizes.generated), chunks.trace, chunks.finite)


def stream(
    model: Model,
    policy: MemoryPolicy,
    prompt_embeds: Float[AnyArray, "B T D"],
    noise: Float[AnyArray, "B F H W C"] | tuple[int, ...],
    *,
    renoise: Float[AnyArray, "chunks steps B n H W C"] | None = None,
    key: Array | None = None,
    initial_latents: Float[AnyArray, "B G H W C"] | None = None,
) -> Iterator[Chunk]:
    """Generate the same video as `rollout`, chunk by chunk as they are finished.

    The first chunk comes after as many passes as there are denoising steps, each later one after one more and its clean
    pass. Its trace is that of the pass that finished it. Chunks are dispatched when they are asked for and not waited
    for. With `noise` a shape, memory does not grow with the length of the video. Arguments and errors are those of
    `rollout`.
    """
    sizes, drawn = _request_of(model, prompt_embeds, noise, renoise, key, initial_latents)
    check_memory(model, policy, sizes)
    return _stream(model, policy, prompt_embeds, sizes, drawn)


def _stream(model, policy, prompt_embeds, sizes, noise):
    shared, state, window = _begin(model, policy, prompt_embeds, sizes)
    for index in range(sizes.chunks + len(model.config.denoising_steps) - 1):
        state, window, chunk = _iterate(shared, sizes.chunks, index, state, window, noise)
        if chunk is not None:
            yield chunk


def _begin(model, policy, prompt_embeds, sizes):
    """Return what all steps share, the empty memory and the empty window."""
    dtype, embeds = jnp.dtype(model.dtype), jnp.asarray(prompt_embeds)
    text, state, window = _empty(model.config, sizes, dtype, policy, model.transformer, embeds)
    return (model.config, sizes.frame_size, policy, model.transformer, text), state, window


def _request_of(model, prompt_embeds, noise, renoise, key, initial_latents):
    if model.mesh is not None:
        raise UserError("the rolling sampler runs on one device; pass the model as rfjax.load returned it")
    if initial_latents is not None:
        raise UserError(
            f"initial_latents has {initial_latents.shape[1]} frames, but the rolling sampler has no published rule for "
            "continuing a video; leave them out, or use rfjax.rollout"
        )
    return request_of(model.config, prompt_embeds, noise, renoise, key, None)
