"""The parts of a benchmark, compiled and ready to be run again and again."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rfjax.benchmark import flops, parts
from rfjax.benchmark.preset import Subject
from rfjax.benchmark.timing import Compiled, compile_ahead
from rfjax.memory import MemoryPolicy
from rfjax.models.functional import Params
from rfjax.models.text_encoder import UMT5Encoder, encode_tokens
from rfjax.models.transformer import TextContext, WanTransformer
from rfjax.models.vae import WanVAE, decode_init
from rfjax.sampling.request import ChunkNoise, sample_keys
from rfjax.sampling.rollout import step

EARLY_CHUNK, LATE_CHUNK = 5, 500
"""Chunks, counted from 0, whose cost is compared: it must not grow with the video."""

TEXT_ENCODER, TEXT_CONTEXT, DECODE = "text_encoder", "text_context", "vae_decode"
GATHER, SELF_ATTENTION, DENOISE, CLEAN = "gather", "self_attention", "denoising_passes", "clean_pass"
STEP, EARLY_STEP = "chunk", "early_chunk"
PER_VIDEO = (TEXT_ENCODER, TEXT_CONTEXT)
PER_POLICY = (GATHER, SELF_ATTENTION, DENOISE, CLEAN, STEP, EARLY_STEP)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured."""

    subject: Subject
    policies: dict[str, MemoryPolicy]
    """By the text that asks for each."""
    batch: int
    dtype: str
    repeats: int
    limit: int | None
    """Bytes that the device has, None where that is not known."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, ready to be run."""

    policy: str | None
    """Text of the policy it belongs to; None for what all share."""
    name: str
    compiled: Compiled
    task: Callable[[], Any]
    """Run it once; returns what is to be waited for."""
    calls: int
    """Runs a chunk, or a video for the text's parts."""
    flops: int | None
    """Of one run; None where data is moved and hardly anything computed."""
    repeats: int
    """How often it is measured."""


@dataclasses.dataclass
class Kept:
    """What a task consumes and replaces."""

    value: Any


def network_of(setup: Setup) -> tuple[Params, TextContext]:
    """Return random weights of the transformer and the context of a random prompt."""
    config = setup.subject.config
    weights = parts.random_weights(WanTransformer, config.transformer, jnp.dtype(setup.dtype))
    return weights, parts.text_context(config, weights, _prompt(setup))


def _prompt(setup: Setup) -> jax.Array:
    network = setup.subject.config.transformer
    return jax.random.normal(jax.random.key(1), (setup.batch, network.text_len, network.text_dim))


def text_encoder_part(setup: Setup) -> Part:
    """Prompts of full length to embeddings."""
    config, tokens = setup.subject.config.umt5, setup.subject.config.transformer.text_len
    assert config is not None
    weights = parts.random_weights(UMT5Encoder, config, jnp.dtype(setup.dtype))
    ids = jnp.ones((setup.batch, tokens), jnp.int32)
    compiled = compile_ahead(jax.jit(functools.partial(encode_tokens, config)), weights, ids, ids)
    count = flops.text_encoder(config, setup.batch, tokens)
    return Part(None, TEXT_ENCODER, compiled, lambda: compiled.call(weights, ids, ids), 1, count, setup.repeats)


def text_context_part(setup: Setup, weights: Params) -> Part:
    """Embeddings to the keys and values of every cross-attention."""
    config, prompt = setup.subject.config, _prompt(setup)
    compiled = compile_ahead(parts.text_context, config, weights, prompt)
    count = flops.text_context(config.transformer, setup.batch)
    return Part(None, TEXT_CONTEXT, compiled, lambda: compiled.call(weights, prompt), 1, count, setup.repeats)


def decode_part(setup: Setup) -> Part:
    """One latent frame to pixels."""
    config, dtype = setup.subject.config, jnp.dtype(setup.dtype)
    assert config.vae is not None
    height, width = setup.subject.frame_size
    weights = parts.random_weights(WanVAE, config.vae, dtype)
    latent = jax.random.normal(jax.random.key(4), (setup.batch, 1, height, width, config.vae.z_dim))
    cache = Kept(decode_init(config.vae, dtype, setup.batch, height, width))
    compiled = compile_ahead(parts.decode_frame, config, weights, cache.value, latent)

    def task():
        cache.value, video = compiled.call(weights, cache.value, latent)
        return video

    count = flops.vae_decode(config.vae, setup.batch, 1, height, width)
    repeats = min(setup.repeats, setup.subject.preset.decode_repeats)
    return Part(None, DECODE, compiled, task, config.chunk_frames, count, repeats)


def policy_parts(
    setup: Setup, name: str, policy: MemoryPolicy, weights: Params, text: TextContext, early: bool
) -> list[Part]:
    """Return the parts that depend on the policy.

    Args:
        setup: what is measured.
        name: text that asks for the policy.
        policy: the policy.
        weights: of the transformer.
        text: the prompt's context.
        early: whether an early chunk is compared with a late one; else, for a policy whose memory grows with the video,
            the last chunk of the setup's video is measured alone.
    """
    subject, batch = setup.subject, setup.batch
    config, size, frames = subject.config, subject.frame_size, subject.preset.latent_frames
    filled = functools.partial(parts.state_at, config, size, batch, frames, setup.dtype, policy)
    # The warm-up moves each state on by a chunk.
    late = Kept(filled(LATE_CHUNK - 1 if early else subject.chunks - 1))
    gathering = compile_ahead(parts.gather, config, size, policy, late.value)
    memory = gathering.call(policy, late.value)
    shape = (batch, config.chunk_frames, *size, config.transformer.in_dim)
    latents, timestep = jax.random.normal(jax.random.key(5), shape), jnp.full(shape[:2], 625.0)
    noise = ChunkNoise(sample_keys(jax.random.key(6), batch), None, None)
    stepping = compile_ahead(step, config, size, policy, weights, text, late.value, noise)
    denoising = compile_ahead(parts.denoising_pass, config, weights, text, memory, latents, timestep)
    cleaning = compile_ahead(parts.clean_pass, config, policy, weights, text, memory, late.value, latents)

    def generate(state: Kept):
        state.value, chunk = stepping.call(policy, weights, text, state.value, noise)
        return state.value, chunk

    def clean():
        late.value = cleaning.call(policy, weights, text, memory, late.value, latents)
        return late.value

    passes = len(config.denoising_steps)
    tokens = config.transformer.frame_tokens(*size)
    attended = memory.keys.shape[2] + config.chunk_frames
    count = flops.transformer_pass(config.transformer, batch, config.chunk_frames, attended, tokens)
    tasks = {
        GATHER: (gathering, lambda: gathering.call(policy, late.value), 1, None),
        DENOISE: (denoising, lambda: denoising.call(weights, text, memory, latents, timestep), passes, count.total),
        CLEAN: (cleaning, clean, 1, count.total),
        STEP: (stepping, lambda: generate(late), 1, (passes + 1) * count.total),
    }
    if early:
        begun = Kept(filled(EARLY_CHUNK - 1))
        tasks[EARLY_STEP] = (stepping, lambda: generate(begun), 1, (passes + 1) * count.total)
    made = [
        Part(name, part, compiled, task, calls, operations, setup.repeats)
        for part, (compiled, task, calls, operations) in tasks.items()
    ]
    return [*made, _self_attention_part(setup, name, attended, count.self_attention)]


def _self_attention_part(setup: Setup, name: str, attended: int, count: int) -> Part:
    """One layer's attention in one pass, of `attended` frames; `count` is that of all layers."""
    config = setup.subject.config
    network = config.transformer
    tokens = network.frame_tokens(*setup.subject.frame_size)

    def draw(seed: int, frames: int):
        sizes = (setup.batch, frames * tokens, network.num_heads, network.head_dim)
        return jax.random.normal(jax.random.key(seed), sizes, jnp.dtype(setup.dtype))

    operands = draw(7, config.chunk_frames), draw(8, attended), draw(9, attended)
    length = jnp.full(setup.batch, attended * tokens)
    compiled = compile_ahead(parts.self_attention, *operands, length)
    calls = network.num_layers * (len(config.denoising_steps) + 1)
    count //= network.num_layers
    return Part(name, SELF_ATTENTION, compiled, lambda: compiled.call(*operands, length), calls, count, setup.repeats)
