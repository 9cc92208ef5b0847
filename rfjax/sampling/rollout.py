"""The chunk rollout of Self-Forcing over any memory policy: one step function for the compiled loop and for streaming.

Each chunk starts from noise; every denoising step predicts x0 and, unless it is the last, adds fresh noise at the next
timestep; one more pass over the result at timestep 0 yields the keys and values that become memory. The index of a
chunk's first frame is a traced value, so one compilation serves every chunk of a video of any length.

Source: Self-Forcing `pipeline/causal_inference.py`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rfjax.config import ModelConfig
from rfjax.memory import CleanChunk, MemoryPolicy, Trace
from rfjax.models.functional import AnyArray, Params, bind
from rfjax.models.model import Model
from rfjax.models.transformer import TextContext, WanTransformer
from rfjax.parallel.division import check_tokens, sequence_of
from rfjax.parallel.samples import check_samples, divided, spread
from rfjax.pytree import pytree
from rfjax.sampling.passes import ChunkPasses, passes_over
from rfjax.sampling.request import ChunkNoise, Sizes, check_memory, chunks_of, draw_noise, request_of, spread_noise
from rfjax.sampling.state import TEXT_AXIS, RolloutState, empty_state, laid_out, memory_shape, read_memory, state_axes
from rfjax.sampling.switching import Switch, recached_frames, switch_prompt


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
    view = read_memory(policy, state)
    passes = passes_over(config, frame_size, params, text, view)
    initial, renoise = draw_noise(config, frame_size, state.start, noise)
    latents, _ = passes.denoise(initial, renoise, len(config.denoising_steps) - 1)
    state = commit(policy, passes, state, latents)
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
    return commit(policy, passes_over(config, frame_size, params, text, read_memory(policy, state)), state, latents)


def commit(
    policy: MemoryPolicy, passes: ChunkPasses, state: RolloutState, latents: Float[Array, "B n H W C"]
) -> RolloutState:
    """Take a chunk's finished latents into the memory, through its clean pass."""
    batch, frames = latents.shape[:2]
    shape = memory_shape(passes.config, batch, (latents.shape[2], latents.shape[3]))
    made = passes.project(latents)
    indices = state.start[:, None] + jnp.arange(frames, dtype=jnp.int32)
    chunk = CleanChunk(indices, made.queries, made.keys, made.values)
    return RolloutState(
        memory=laid_out(policy.commit(state.memory, chunk), shape),
        start=state.start + frames,
        gap=jnp.zeros_like(state.gap),
        recent=jnp.concatenate([state.recent, latents], axis=1)[:, frames:],
    )


@functools.partial(jax.jit, static_argnames="config")
def encode_text(config: ModelConfig, params: Params, prompt_embeds: Float[Array, "B T D"]) -> TextContext:
    """Cross-attention keys and values of the prompts, made once for all passes."""
    return bind(WanTransformer, config.transformer, params).embed_text(prompt_embeds)


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "mesh"), donate_argnames="state")
def step(config, frame_size, policy, params, text, state, noise, mesh=None):
    """`chunk_step`, compiled, for the samples of each device of the mesh; the state given is consumed."""

    def one(policy, params, text, state, *noise):
        return chunk_step(config, frame_size, policy, params, text, state, ChunkNoise(*noise))

    states = state_axes(mesh, config, frame_size, policy)
    run = divided(one, mesh, (None, None, TEXT_AXIS, states, 0, 0, 1), (states, 0))
    return run(policy, params, text, state, noise.keys, noise.initial, noise.renoise)


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "mesh"), donate_argnames="state")
def _remember(config, frame_size, policy, params, text, state, latents, mesh=None):
    states = state_axes(mesh, config, frame_size, policy)
    run = divided(functools.partial(remember, config, frame_size), mesh, (None, None, TEXT_AXIS, states, 0), states)
    return run(policy, params, text, state, latents)


@functools.partial(jax.jit, static_argnames=("config", "sizes", "dtype", "mesh"))
def _begin(config, sizes, dtype, policy, params, prompt_embeds, mesh=None):
    # The state comes out of one program with the text, so that it lies where the parameters lie from the first step on.
    def begin(policy, params, prompt_embeds):
        text = encode_text(config, params, prompt_embeds)
        shape = memory_shape(config, prompt_embeds.shape[0], sizes.frame_size)
        return text, empty_state(policy, shape, sizes.video_frames, dtype, sizes.generated[2:], sizes.recent_frames)

    states = state_axes(mesh, config, sizes.frame_size, policy)
    return divided(begin, mesh, (None, None, 0), (TEXT_AXIS, states))(policy, params, prompt_embeds)


@functools.partial(jax.jit, static_argnames=("config", "sizes", "dtype", "chunks", "mesh"))
def _whole(config, sizes, dtype, policy, params, prompt_embeds, given, noise, chunks, mesh=None):
    """Take in the given chunks [G, B, n, ...] and generate `chunks` others, as one program."""

    def whole(policy, params, prompt_embeds, given, *noise):
        text, state = _begin(config, sizes, dtype, policy, params, prompt_embeds)

        def take_in(state, latents):
            return remember(config, sizes.frame_size, policy, params, text, state, latents), None

        if given is not None:
            state, _ = jax.lax.scan(take_in, state, given)
        return _generate(config, sizes.frame_size, policy, params, text, state, ChunkNoise(*noise), chunks)

    states = state_axes(mesh, config, sizes.frame_size, policy)
    run = divided(whole, mesh, (None, None, 0, 1, 0, 1, 2), (states, 1))
    return run(policy, params, prompt_embeds, given, noise.keys, noise.initial, noise.renoise)


@functools.partial(jax.jit, static_argnames=("config", "frame_size", "chunks", "mesh"), donate_argnames="state")
def _generate(config, frame_size, policy, params, text, state, noise, chunks, mesh=None):
    """Generate the next chunks, as one program; the state given is consumed."""

    def generate(policy, params, text, state, keys, *noise):
        def one(state, noise_of_chunk):
            return chunk_step(config, frame_size, policy, params, text, state, ChunkNoise(keys, *noise_of_chunk))

        return jax.lax.scan(one, state, noise, length=chunks)

    states = state_axes(mesh, config, frame_size, policy)
    run = divided(generate, mesh, (None, None, TEXT_AXIS, states, 0, 1, 2), (states, 1))
    return run(policy, params, text, state, noise.keys, noise.initial, noise.renoise)


def rollout(
    model: Model,
    policy: MemoryPolicy,
    prompt_embeds: Float[AnyArray, "B T D"],
    noise: Float[AnyArray, "B F H W C"] | tuple[int, ...],
    *,
    renoise: Float[AnyArray, "chunks steps B n H W C"] | None = None,
    key: Array | None = None,
    initial_latents: Float[AnyArray, "B G H W C"] | None = None,
    switches: Iterable[Switch] = (),
) -> Rollout:
    """Generate a whole video per sample as one compiled program, or one for each stretch of a prompt.

    Args:
        model: from `rfjax.load`.
        policy: from `rfjax.memory.create`.
        prompt_embeds: one prompt a sample, padding zeroed; shorter than the model's text length is padded.
        noise: where the F generated frames start, or just that shape, and `key` draws it.
        renoise: noise added after every denoising step but the last, of each generated chunk; else `key` draws it.
        key: one key, from which each sample's follows, or an array of B keys. A sample's video depends on its key
            alone: neither on the batch it is in nor on how long the video goes on.
        initial_latents: a given beginning of G frames that the video continues.
        switches: changes of prompt, in the order of time.

    Raises:
        UserError: shapes that do not fit the model or each other, noise to draw and no key, switches out of order, or
            samples or tokens that do not divide among the devices of a model from `rfjax.parallelize`.
    """
    switches = tuple(switches)
    check_samples(prompt_embeds.shape[0], model.mesh)
    sizes, drawn = request_of(model.config, prompt_embeds, noise, renoise, key, initial_latents, switches)
    check_memory(model, policy, sizes)
    check_tokens(model.config.transformer, sizes.frame_size, sequence_of(model.mesh))
    config, frame_size, params, mesh = model.config, sizes.frame_size, model.transformer, model.mesh
    given = None if initial_latents is None else chunks_of(initial_latents, config.chunk_frames).astype(jnp.float32)
    given, embeds = spread(given, mesh, 1), spread(jnp.asarray(prompt_embeds), mesh)
    dtype, drawn = jnp.dtype(model.dtype), spread_noise(drawn, mesh)
    ends = [sizes.chunk_at(switch.start) for switch in switches] + [sizes.chunks]
    state, chunks = _whole(config, sizes, dtype, policy, params, embeds, given, drawn.part(0, ends[0]), ends[0], mesh)
    parts = [chunks]
    for switch, begin, end in zip(switches, ends, ends[1:], strict=False):
        text, state = switched(model, policy, sizes, switch, state)
        own = drawn.part(begin, end)
        state, chunks = _generate(config, frame_size, policy, params, text, state, own, end - begin, mesh)
        parts.append(chunks)
    chunks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts) if switches else chunks
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
    switches: Iterable[Switch] = (),
) -> Iterator[Chunk]:
    """Generate the same video as `rollout`, chunk by chunk; given frames are not repeated.

    Chunks are dispatched when they are asked for and not waited for, so a caller may decode one while the next is
    computed. With `noise` a shape, memory does not grow with the length of the video. Arguments and errors are those
    of `rollout`.
    """
    switches = tuple(switches)
    check_samples(prompt_embeds.shape[0], model.mesh)
    sizes, drawn = request_of(model.config, prompt_embeds, noise, renoise, key, initial_latents, switches)
    check_memory(model, policy, sizes)
    check_tokens(model.config.transformer, sizes.frame_size, sequence_of(model.mesh))
    return _stream(model, policy, prompt_embeds, sizes, drawn, initial_latents, switches)


def _stream(model, policy, prompt_embeds, sizes, noise, initial_latents, switches):
    text, state = begin(model, policy, prompt_embeds, sizes)
    shared, mesh = (model.config, sizes.frame_size, policy, model.transformer), model.mesh
    noise = spread_noise(noise, mesh)
    for latents in () if initial_latents is None else chunks_of(initial_latents, model.config.chunk_frames):
        state = _remember(*shared, text, state, spread(latents.astype(jnp.float32), mesh), mesh)
    due = {sizes.chunk_at(switch.start): switch for switch in switches}
    for index in range(sizes.chunks):
        if index in due:
            text, state = switched(model, policy, sizes, due[index], state)
        state, chunk = step(*shared, text, state, noise.at(index), mesh)
        yield chunk


def switched(
    model: Model, policy: MemoryPolicy, sizes: Sizes, switch: Switch, state: RolloutState
) -> tuple[TextContext, RolloutState]:
    """Return the text and the state after a change of prompt in all samples; the state given is consumed."""
    frames = recached_frames(switch.start, model.config.chunk_frames) if switch.recache else 0
    embeds, kind = spread(jnp.asarray(switch.prompt_embeds), model.mesh), (frames, switch.cut)
    return switch_prompt(model.config, sizes.frame_size, *kind, policy, model.transformer, embeds, state, model.mesh)


def begin(
    model: Model, policy: MemoryPolicy, prompt_embeds: Float[AnyArray, "B T D"], sizes: Sizes
) -> tuple[TextContext, RolloutState]:
    """Return the prompts' cross-attention context and the empty state of a rollout."""
    embeds = spread(jnp.asarray(prompt_embeds), model.mesh)
    return _begin(model.config, sizes, jnp.dtype(model.dtype), policy, model.transformer, embeds, model.mesh)
