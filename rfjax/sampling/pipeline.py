"""From prompts to pixels, chunk by chunk: decoding follows generation, so that memory stays flat with length."""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from rfjax.errors import UserError
from rfjax.memory import MemoryPolicy, Trace
from rfjax.models.functional import AnyArray
from rfjax.models.layout import by_width
from rfjax.models.model import Model
from rfjax.models.vae import DecoderCache, decode_first, decode_init, decode_next
from rfjax.parallel.mesh import DATA
from rfjax.parallel.samples import divided, select, spread
from rfjax.sampling import rolling
from rfjax.sampling.codec import to_bytes, vae_of
from rfjax.sampling.rollout import Chunk, stream
from rfjax.sampling.switching import Switch


class NotFiniteError(UserError):
    """Latents hold NaN or infinity."""


@dataclasses.dataclass(frozen=True)
class VideoChunk:
    """One chunk of every video of a batch, on the host."""

    frames: UInt8[np.ndarray, "B T H W 3"]
    """RGB; the first chunk has fewer, since a video's first latent frame is a single video frame."""
    trace: Trace
    """What the chunk attended."""
    seconds: float
    """Since the chunk before was ready, or since the start; the first includes compilation."""


def keys_from_seed(seed: int, samples: Sequence[int]) -> Key[Array, "B"]:
    """Return a key for each sample that depends on the seed and the sample's number alone: not on the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(samples, jnp.uint32))


def stream_video(
    model: Model,
    policy: MemoryPolicy,
    prompt_embeds: Float[Array, "B T D"],
    latent_frames: int,
    frame_size: tuple[int, int],
    keys: Key[Array, "B"],
    switches: Sequence[Switch] = (),
    sampler: Literal["chunk", "rolling"] = "chunk",
) -> Iterator[VideoChunk]:
    """Generate a batch of videos and decode every chunk as soon as it is made.

    While the host handles a chunk, the device works on the next one.

    Args:
        model: from `rfjax.load`, with its autoencoder.
        policy: from `rfjax.memory.create`.
        prompt_embeds: from `rfjax.encode_prompt`.
        latent_frames: length, a multiple of the chunk.
        frame_size: latent rows and columns.
        keys: [B] one a sample, from `keys_from_seed`.
        switches: changes of prompt, for the chunk sampler only.
        sampler: which stream of chunks: `rfjax.stream` or `rfjax.rolling.stream`.

    Raises:
        UserError: sizes that do not fit the model, or no autoencoder.
        NotFiniteError: latents are no longer finite.
    """
    noise_shape = (prompt_embeds.shape[0], latent_frames, *frame_size, model.config.transformer.in_dim)
    if sampler == "rolling":
        if switches:
            raise UserError("the rolling sampler cannot change prompts, since its chunks overlap; use sampler='chunk'")
        chunks = rolling.stream(model, policy, prompt_embeds, noise_shape, key=keys)
    else:
        chunks = stream(model, policy, prompt_embeds, noise_shape, key=keys, switches=switches)
    return decode_stream(model, chunks, noise_shape)


def decode_stream(model: Model, chunks: Iterable[Chunk], shape: tuple[int, ...]) -> Iterator[VideoChunk]:
    """Decode every chunk as soon as it is made, and fetch it while the device works on the next one.

    Args:
        model: with its autoencoder.
        chunks: of `B` videos, without a leading axis.
        shape: [B, F, H, W, C] of the latents of all chunks together.

    Raises:
        UserError: no autoencoder.
        NotFiniteError: latents are no longer finite.
    """
    total = shape[1] // model.config.chunk_frames
    cache = new_decoder(model, shape[0], (shape[2], shape[3]))
    since = time.perf_counter()
    waiting: tuple[int, Chunk, list[Array]] | None = None
    for index, chunk in enumerate(chunks):
        cache, frames = decode_chunk(model, cache, chunk.latents, first=index == 0)
        if waiting is not None:
            done, since = _fetch(*waiting, total, since)
            yield done
        waiting = index, chunk, frames
    if waiting is not None:
        yield _fetch(*waiting, total, since)[0]


def new_decoder(model: Model, samples: int, frame_size: tuple[int, int]) -> DecoderCache:
    """Return the decoder's empty memory, on the devices of the model; raise `UserError` without an autoencoder."""
    return _decode_init(vae_of(model)[0], jnp.dtype(model.dtype), samples, *frame_size, model.mesh)


def decode_chunk(
    model: Model, cache: DecoderCache, latents: Float[Array, "B n H W C"], *, first: bool
) -> tuple[DecoderCache, list[UInt8[Array, "B _ rows columns 3"]]]:
    """Dispatch the decoding of a chunk frame by frame: two small programs serve chunks of any place and length."""
    frames = []
    for i in range(latents.shape[1]):
        decode = _decode_first if first and i == 0 else _decode_next
        cache, pixels = decode(*vae_of(model), cache, latents[:, i : i + 1], model.mesh)
        frames.append(pixels)
    return cache, frames


def decode_mixed(
    model: Model, cache: DecoderCache, latent: Float[Array, "B 1 h w C"], begins: Bool[AnyArray, "B"]
) -> tuple[DecoderCache, UInt8[Array, "B 1 H W 3"], UInt8[Array, "B T H W 3"]]:
    """Decode a latent frame that is the first of some videos only: both ways, and each keeps its own memory.

    Args:
        model: with its autoencoder.
        cache: of all videos; consumed.
        latent: the frame.
        begins: whose first frame it is.

    Returns:
        The memory, the frame as a first one, and the frames as a later one.
    """
    return _decode_mixed(*vae_of(model), cache, latent, spread(jnp.asarray(begins), model.mesh), model.mesh)


def _fetch(index: int, chunk: Chunk, frames: list[Array], total: int, since: float) -> tuple[VideoChunk, float]:
    """Wait for a chunk, check it and copy it to the host; return it and when it was ready."""
    finite = np.asarray(chunk.finite)
    if not finite.all():
        start, size = index * chunk.latents.shape[1], chunk.latents.shape[1]
        raise NotFiniteError(
            f"the latents of chunk {index + 1} of {total} (latent frames {start} to {start + size - 1}) hold NaN or "
            f"infinity in {int((~finite).sum())} of {len(finite)} videos of the batch; try --dtype float32, or check "
            "the checkpoint's weights"
        )
    pixels = np.concatenate([np.asarray(part) for part in frames], axis=1)
    now = time.perf_counter()
    return VideoChunk(pixels, jax.device_get(chunk.trace), now - since), now


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _decode_init(config, dtype, batch, height, width, mesh):
    groups = 1 if mesh is None else mesh.shape[DATA]

    def empty():
        return by_width(decode_init(config, dtype, batch // groups, height, width), width)

    return divided(empty, mesh, (), 0)()


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def _decode_first(config, params, cache, latent, mesh=None):
    return _decode(decode_first, config, params, cache, latent, mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def _decode_next(config, params, cache, latent, mesh=None):
    return _decode(decode_next, config, params, cache, latent, mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def _decode_mixed(config, params, cache, latent, begins, mesh=None):
    def both(params, cache, latent, begins):
        width = latent.shape[3]
        first, single = decode_first(config, params, cache, by_width(latent, width))
        later, group = decode_next(config, params, cache, by_width(latent, width))
        cache, single, group = select(begins, first, later), to_bytes(single), to_bytes(group)
        return by_width(cache, width), by_width(single, width), by_width(group, width)

    return divided(both, mesh, (None, 0, 0, 0), (0, 0, 0))(params, cache, latent, begins)


def _decode(decode, config, params, cache, latent, mesh):
    def one(params, cache, latent):
        width = latent.shape[3]
        cache, video = decode(config, params, cache, by_width(latent, width))
        return by_width(cache, width), by_width(to_bytes(video), width)

    return divided(one, mesh, (None, 0, 0), (0, 0))(params, cache, latent)
