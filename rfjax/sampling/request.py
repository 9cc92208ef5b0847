"""What a rollout is asked for, checked: every mistake is found here, before anything is computed."""

import dataclasses
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from rfjax.config import ModelConfig
from rfjax.errors import UserError
from rfjax.memory import MemoryPolicy
from rfjax.memory.check import check_policy
from rfjax.models.functional import AnyArray
from rfjax.models.model import Model
from rfjax.parallel.samples import spread
from rfjax.pytree import pytree
from rfjax.sampling.state import memory_shape
from rfjax.sampling.switching import WINDOW_CHUNKS, Switch


@pytree()
@dataclasses.dataclass(frozen=True)
class ChunkNoise:
    """All noise that a rollout or a chunk uses; what is None is drawn from the keys."""

    keys: Key[Array, "B"] | None
    """One key a sample; a chunk's draws depend on its key and its place in the video alone."""
    initial: Float[Array, "*chunks B n H W C"] | None
    """Where each chunk starts."""
    renoise: Float[Array, "*chunks steps B n H W C"] | None
    """Added after every denoising step but the last."""

    def at(self, chunk: int) -> "ChunkNoise":
        """Return the noise of one chunk."""
        return ChunkNoise(self.keys, *(None if a is None else a[chunk] for a in (self.initial, self.renoise)))

    def part(self, first: int, end: int) -> "ChunkNoise":
        """Return the noise of the chunks from `first` to before `end`."""
        return ChunkNoise(self.keys, *(None if a is None else a[first:end] for a in (self.initial, self.renoise)))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a rollout."""

    generated: tuple[int, ...]
    """[B, F, H, W, C] of the generated frames."""
    given_frames: int
    """Frames of the given beginning."""
    chunk_frames: int
    """Latent frames generated together."""
    recent_frames: int
    """Newest latents that the rollout's state keeps for a change of prompt."""

    @property
    def chunks(self) -> int:
        """How many chunks are generated."""
        return self.generated[1] // self.chunk_frames

    def chunk_at(self, start: int) -> int:
        """Return which of the generated chunks begins with that frame of the video."""
        return (start - self.given_frames) // self.chunk_frames

    @property
    def video_frames(self) -> int:
        """Latent frames of the whole video, given ones included."""
        return self.given_frames + self.generated[1]

    @property
    def frame_size(self) -> tuple[int, int]:
        """Latent rows and columns."""
        return self.generated[2], self.generated[3]


def request_of(
    config: ModelConfig,
    prompt_embeds: Float[AnyArray, "B T D"],
    noise: Float[AnyArray, "B F H W C"] | tuple[int, ...],
    renoise: Float[AnyArray, "chunks steps B n H W C"] | None,
    key: Array | None,
    initial_latents: Float[AnyArray, "B G H W C"] | None,
    switches: Sequence[Switch] = (),
) -> tuple[Sizes, ChunkNoise]:
    """Return a rollout's sizes, and its noise with a chunks axis on what is given.

    Raises:
        UserError: the arguments do not fit the model or each other.
    """
    drawn = isinstance(noise, tuple)
    if not drawn and not hasattr(noise, "shape"):
        raise UserError(
            f"noise is a {type(noise).__name__}; an array [B, F, H, W, {config.transformer.in_dim}], "
            "or that shape as a tuple, is needed"
        )
    shape = noise if drawn else noise.shape
    given = 0 if initial_latents is None else initial_latents.shape[1]
    _check_shapes(config, prompt_embeds, shape, given)
    batch, frames, *frame_shape = shape
    chunks = frames // config.chunk_frames
    if initial_latents is not None and initial_latents.shape != (batch, given, *frame_shape):
        raise UserError(
            f"initial_latents have shape {initial_latents.shape}; noise {shape} needs ({batch}, frames, "
            f"{', '.join(map(str, frame_shape))})"
        )
    later = (chunks, len(config.denoising_steps) - 1, batch, config.chunk_frames, *frame_shape)
    if renoise is not None and renoise.shape != later:
        raise UserError(f"renoise has shape {renoise.shape}; noise {shape} needs {later}")
    if key is None and (drawn or renoise is None):
        raise UserError(f"{'noise' if drawn else 'renoise'} is to be drawn, but no key was given")
    keys = None if key is None else sample_keys(key, batch)
    initial = None if isinstance(noise, tuple) else chunks_of(noise, config.chunk_frames).astype(jnp.float32)
    later_noise = None if renoise is None else jnp.asarray(renoise, jnp.float32)
    _check_switches(config, switches, shape, given)
    recent = WINDOW_CHUNKS * config.chunk_frames if any(switch.recache for switch in switches) else 0
    return Sizes(tuple(shape), given, config.chunk_frames, recent), ChunkNoise(keys, initial, later_noise)


def spread_noise(noise: ChunkNoise, mesh: Mesh | None) -> ChunkNoise:
    """Give every device of a model from `rfjax.parallelize` its samples' part of a rollout's noise."""
    return ChunkNoise(spread(noise.keys, mesh), spread(noise.initial, mesh, 1), spread(noise.renoise, mesh, 2))


def check_memory(model: Model, policy: MemoryPolicy, sizes: Sizes) -> None:
    """Check the policy for a rollout of these sizes, or raise `UserError`; free of cost after the first time."""
    shape = memory_shape(model.config, sizes.generated[0], sizes.frame_size)
    check_policy(policy, shape, sizes.video_frames, model.dtype)


def _check_shapes(config: ModelConfig, prompt_embeds, shape, given: int) -> None:
    network = config.transformer
    if len(shape) != 5 or shape[-1] != network.in_dim:
        raise UserError(f"noise has shape {shape}; [B, F, H, W, {network.in_dim}] is needed")
    for name, frames in (("noise", shape[1]), ("initial_latents", given)):
        if frames % config.chunk_frames or (name == "noise" and frames < 1):
            raise UserError(
                f"{name} has {frames} latent frames; a multiple of the chunk's {config.chunk_frames} is needed"
            )
    for name, size, patch in zip(("height", "width"), shape[2:4], network.patch_size[1:], strict=True):
        if size < patch or size % patch:
            raise UserError(f"latent {name} is {size}; a multiple of the patch's {patch} is needed")
    _check_embeds(config, "prompt_embeds", prompt_embeds, shape[0])


def _check_embeds(config: ModelConfig, name: str, embeds, batch: int) -> None:
    network = config.transformer
    if embeds.ndim != 3:
        raise UserError(f"{name} has shape {embeds.shape}; [B, tokens, {network.text_dim}] is needed")
    if embeds.shape[0] != batch:
        raise UserError(f"{name} has {embeds.shape[0]} samples and noise {batch}; they must be equal")
    if embeds.shape[1] > network.text_len or embeds.shape[2] != network.text_dim:
        raise UserError(
            f"{name} has {embeds.shape[1]} tokens of width {embeds.shape[2]}; the transformer takes at most "
            f"{network.text_len} of width {network.text_dim}"
        )


def _check_switches(config: ModelConfig, switches: Sequence[Switch], shape, given: int) -> None:
    end, before = given + shape[1], given - (given > 0)  # the generated part of a continued video may begin with one
    for number, switch in enumerate(switches):
        name = f"switches[{number}]"
        if not isinstance(switch.start, numbers.Integral):
            raise UserError(f"{name} starts at frame {switch.start!r}; a whole number is needed")
        if not hasattr(switch.prompt_embeds, "ndim"):
            kind = type(switch.prompt_embeds).__name__
            raise UserError(f"{name}: prompt_embeds is a {kind}; an array from rfjax.encode_prompt is needed")
        if switch.start % config.chunk_frames:
            raise UserError(
                f"{name} starts at frame {switch.start}; a multiple of the chunk's {config.chunk_frames} is needed"
            )
        if not before < switch.start < end:
            raise UserError(f"{name} starts at frame {switch.start}; a frame after {before} and before {end} is needed")
        _check_embeds(config, f"{name}: prompt_embeds", switch.prompt_embeds, shape[0])
        before = switch.start


def draw_noise(
    config: ModelConfig, frame_size: tuple[int, int], start: Int[Array, "B"], noise: ChunkNoise
) -> tuple[Float[Array, "B n H W C"], Float[Array, "steps B n H W C"]]:
    """Return the initial noise of the chunk at `start` and that of its later steps, drawn where it is not given."""
    shape = (config.chunk_frames, *frame_size, config.transformer.in_dim)
    later = (len(config.denoising_steps) - 1, *shape)
    chunk = start // config.chunk_frames

    def draw(use, shape):
        """Standard normal numbers [B, *shape], of each sample's own key."""

        def one(key, chunk):
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, chunk), use), shape, jnp.float32)

        return jax.vmap(one)(noise.keys, chunk)

    initial = draw(0, shape) if noise.initial is None else noise.initial
    renoise = jnp.moveaxis(draw(1, later), 1, 0) if noise.renoise is None else noise.renoise
    return initial, renoise


def sample_keys(key: Array, batch: int) -> Key[Array, "B"]:
    """Return one key a sample: those given, or `fold_in(key, index)` of a single one.

    Raises:
        UserError: an array of another number of keys.
    """
    if not hasattr(key, "dtype"):
        raise UserError(f"key is {key!r}; one of JAX is needed, such as jax.random.key(0)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise UserError(f"key has shape {key.shape}; one key, or one for each of the {batch} samples is needed")
    return key


def chunks_of(frames: Float[AnyArray, "B F H W C"], chunk_frames: int) -> Float[Array, "chunks B n H W C"]:
    """Cut a video into chunks, on a first axis."""
    batch, _, *rest = frames.shape
    return jnp.moveaxis(jnp.asarray(frames).reshape(batch, -1, chunk_frames, *rest), 1, 0)
