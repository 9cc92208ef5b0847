"""The chunk rollout of Self-Forcing over any memory policy: one step function for the compiled loop and for streaming.

Each chunk starts from noise; every denoising step predicts x0 and, unless it is the last, adds fresh noise at the next
timestep; one more pass over the result at timestep 0 yields the keys and values that become memory. The index of a
chunk's first frame is a traced value, so one compilation serves every chunk of a video of any length.

Source: Self-Forcing `pipeline/causal_inference.py`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rfjax.config import ModelConfig
from rfjax.memory import CleanChunk, MemoryPolicy, MemoryShape, Trace, View
from rfjax.models.functional import AnyArray, Params, bind
from rfjax.models.model import Model
from rfjax.models.transformer import AttendedMemory, TextContext, WanTransformer, rotate_memory
from rfjax.pytree import pytree
from rfjax.sampling.request import ChunkNoise, chunks_of, request_of
from rfjax.sampling.schedule import add_noise, sigma_at, warp


@pytree()
@dataclasses.dataclass(frozen=True)
class RolloutState:
    """Everything that passes from one chunk to the next."""

    memory: Any
    """The policy's state."""
    start: Int[Array, "B"]
    """Index of the first frame of the chunk to come, for each sample."""


@pytree()
@dataclasses.dataclass(frozen=True)
class Chunk:
    """One finished chunk, or all chunks of a rollout stacked on a first axis."""

    latents: Float[Array, "*chunks B n H W C"]
    finite: Bool[Array, "*chunks B"]
    """Whether every latent of the sample is a number."""
    trace: Trace


@pytree()
@dataclasses.dataclass(frozen=True)
class Rollout:
    """A finished rollout."""

    latents: Float[Array, "B F H W C"]
    """Given frames first, then the generated ones."""
    trace: Trace
    """What each generated chunk attended, stacked on a first axis."""
    finite: Bool[Array, "chunks B"]


def chunk_step(
    config: ModelConfig,
    frame_size: tuple[int, int],
    policy: MemoryPolicy,
    params: Params,
    text: TextContext,
    state: RolloutState,
    noise: ChunkNoise,
) -> tuple[RolloutState, Chunk]:
    """Generate one chunk and remember it.

    Args:
        config: sizes and denoising steps (static).
        frame_size: latent rows and columns (static).
        policy: decides what is attended and kept.
        params: of the transformer, which computes in their type.
        text: from `encode_text`.
        state: from `begin`, `remember` or the step before.
        noise: keys, or this chunk's own noise without the chunks axis.
    """
    view = policy.read(state.memory, state.start)
    memory = attend(config, frame_size, view)
    network = bind(WanTransformer, config.transformer, params)
    steps = warp(config.denoising_steps, config.timestep_shift)
    sigmas = sigma_at(jnp.asarray(steps), config.timestep_shift)
    initial, renoise = _noise_of(config, frame_size, state, noise)
    batch, frames = initial.shape[:2]

    def denoise(x, scanned):
        timestep, sigma, following, fresh = scanned
        flow, _ = network(x, jnp.full((batch, frames), timestep), text, memory)
        return add_noise(x - sigma * flow, fresh, following), None

    # After the last step the noise level is 0, where adding noise changes nothing.
    scanned = (
        jnp.asarray(steps),
        sigmas,
        jnp.concatenate([sigmas[1:], jnp.zeros_like(sigmas[:1])]),
        jnp.concatenate([renoise, jnp.zeros_like(initial)[None]]),
    )
    latents, _ = jax.lax.scan(denoise, initial, scanned)

    state = _commit(config, policy, network, text, memory, state, latents)
    return state, Chunk(latents, jnp.isfinite(latents).all(axis=(1, 2, 3, 4)), view.trace)


def remember(
    config: ModelConfig,
    frame_size: tuple[int, int],
    policy: MemoryPolicy,
    params: Params,
    text: TextContext,
    state: RolloutState,
    latents: Float[Array, "B n H W C"],
) -> RolloutState:
    """Take one given chunk into the memory through the clean pass alone (video continuation)."""
    memory = attend(config, frame_size, policy.read(state.memory, state.start))
    network = bind(WanTransformer, config.transformer, params)
    return _commit(config, policy, network, text, memory, state, latents)


def attend(config: ModelConfig, frame_size: tuple[int, int], view: View) -> AttendedMemory:
    """Rotate a view to its time positions, once a chunk, for all passes."""
    rows, columns = frame_size[0] // config.transformer.patch_size[1], frame_size[1] // config.transformer.patch_size[2]
    keys = rotate_memory(view.keys, view.positions, view.places, rows, columns, config.transformer)
    return AttendedMemory(keys, view.values, view.length)


def _commit(config, policy, network, text, memory, state, latents):
    batch, frames = latents.shape[:2]
    _, made = network(latents, jnp.zeros((batch, frames), jnp.float32), text, memory, return_projections=True)
    indices = state.start[:, None] + jnp.arange(frames, dtype=jnp.int32)
    chunk = CleanChunk(indices, made.queries, made.keys, made.values)
    return RolloutState(policy.commit(state.memory, chunk), state.start + frames)


def _noise_of(config: ModelConfig, frame_size: tuple[int, int], state: RolloutState, noise: ChunkNoise):
    """Return this chunk's initial noise [B, n, H, W, C] and the noise of its later steps [steps - 1, B, n, H, W, C]."""
    shape = (config.chunk_frames, *frame_size, config.transformer.in_dim)
    later = (len(config.denoising_steps) - 1, *shape)
    chunk = state.start // config.chunk_frames

    def draw(use, shape):
        """Standard normal numbers [B, *shape], of each sample's own key."""

        def one(key, chunk):
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, chunk), use), shape, jnp.float32)

        return jax.vmap(one)(noise.keys, chunk)

    initial = draw(0, shape) if noise.initial is None else noise.initial
    renoise = jnp.moveaxis(draw(1, later), 1, 0) if noise.renoise is None else noise.renoise
    return initial, renoise


@functools.partial(jax.jit, static_argnames="config")
def encode_text(config: ModelConfig, params: Params, prompt_embeds: Float[Array, "B T D"]) -> TextContext:
    """Cross-attention keys and values of the prompts, made once for all passes."""
    return bind(WanTransformer, config.transformer, params).embed_text(prompt_embeds)


step = jax.jit(chunk_step, static_argnames=("config", "frame_size"), donate_argnames="state")
"""`chunk_step`, compiled; the state given is consumed."""

_remember = jax.jit(remember, static_argnames=("config", "frame_size"), donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "video_frames", "dtype"))
def _begin(config, frame_size, video_frames, dtype, policy, params, prompt_embeds):
    # The state comes out of one program with the text, so that it lies where the parameters lie from the first step on.
    text = encode_text(config, params, prompt_embeds)
    shape = memory_shape(config, prompt_embeds.shape[0], frame_size)
    return text, RolloutState(policy.init(shape, video_frames, dtype), jnp.zeros(shape.batch, jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "sizes", "dtype"))
def _whole(config, sizes, dtype, policy, params, prompt_embeds, given, noise):
    """Take in the given chunks [G, B, n, ...] and generate all others, as one program."""
    text, state = _begin(config, sizes.frame_size, sizes.video_frames, dtype, policy, params, prompt_embeds)

    def take_in(state, latents):
        return remember(config, sizes.frame_size, policy, params, text, state, latents), None

    def generate(state, noise_of_chunk):
        own = dataclasses.replace(noise, initial=noise_of_chunk[0], renoise=noise_of_chunk[1])
        return chunk_step(config, sizes.frame_size, policy, params, text, state, own)

    if given is not None:
        state, _ = jax.lax.scan(take_in, state, given)
    return jax.lax.scan(generate, state, (noise.initial, noise.renoise), length=sizes.chunks)[1]


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
    """Generate a whole video per sample as one compiled program.

    Args:
        model: from `rfjax.load`.
        policy: from `rfjax.memory.create`.
        prompt_embeds: one prompt a sample, padding zeroed; shorter than the model's text length is padded.
        noise: where the F generated frames start, or just that shape, and `key` draws it.
        renoise: noise added after every denoising step but the last, of each generated chunk; else `key` draws it.
        key: one key, from which each sample's follows, or an array of B keys. A sample's video depends on its key
            alone: neither on the batch it is in nor on how long the video goes on.
        initial_latents: a given beginning of G frames that the video continues.

    Raises:
        UserError: shapes that do not fit the model or each other, or noise to draw and no key.
    """
    sizes, drawn = request_of(model.config, prompt_embeds, noise, renoise, key, initial_latents)
    given = None if initial_latents is None else chunks_of(initial_latents, model.config.chunk_frames)
    dtype, embeds = jnp.dtype(model.dtype), jnp.asarray(prompt_embeds)
    chunks = _whole(model.config, sizes, dtype, policy, model.transformer, embeds, given, drawn)
    latents = jnp.moveaxis(chunks.latents, 0, 1).reshape(sizes.generated)
    if initial_latents is not None:
        latents = jnp.concatenate([jnp.asarray(initial_latents, latents.dtype), latents], axis=1)
    return Rollout(latents, chunks.trace, chunks.finite)


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
    """Generate the same video as `rollout`, chunk by chunk; given frames are not repeated.

    Chunks are dispatched when they are asked for and not waited for, so a caller may decode one while the next is
    computed. With `noise` a shape, memory does not grow with the length of the video. Arguments and errors are those
    of `rollout`.
    """
    sizes, drawn = request_of(model.config, prompt_embeds, noise, renoise, key, initial_latents)
    return _stream(model, policy, prompt_embeds, sizes, drawn, initial_latents)


def _stream(model, policy, prompt_embeds, sizes, noise, initial_latents):
    text, state = begin(model, policy, prompt_embeds, sizes.video_frames, sizes.frame_size)
    arguments = (model.config, sizes.frame_size, policy, model.transformer, text)
    for latents in () if initial_latents is None else chunks_of(initial_latents, model.config.chunk_frames):
        state = _remember(*arguments, state, latents)
    for index in range(sizes.chunks):
        initial, renoise = (None if given is None else given[index] for given in (noise.initial, noise.renoise))
        state, chunk = step(*arguments, state, ChunkNoise(noise.keys, initial, renoise))
        yield chunk


def begin(
    model: Model,
    policy: MemoryPolicy,
    prompt_embeds: Float[AnyArray, "B T D"],
    video_frames: int,
    frame_size: tuple[int, int],
) -> tuple[TextContext, RolloutState]:
    """Return the prompts' cross-attention context and the empty state of a rollout."""
    dtype = jnp.dtype(model.dtype)
    return _begin(model.config, frame_size, video_frames, dtype, policy, model.transformer, jnp.asarray(prompt_embeds))


def memory_shape(config: ModelConfig, batch: int, frame_size: tuple[int, int]) -> MemoryShape:
    """Sizes of the memory of a batch of videos of that latent height and width."""
    return MemoryShape(
        layers=config.transformer.num_layers,
        batch=batch,
        heads=config.transformer.num_heads,
        head_dim=config.transformer.head_dim,
        rows=frame_size[0] // config.transformer.patch_size[1],
        columns=frame_size[1] // config.transformer.patch_size[2],
        chunk_frames=config.chunk_frames,
    )
