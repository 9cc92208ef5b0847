"""Datasets made by a checkpoint's networks: latents of clips, clips redrawn, and the teacher's trajectories."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Array, Float, UInt8

from rfjax.config import ModelConfig, VAEConfig
from rfjax.data.parts import Columns, Parts, Plan, Report, signature, write_in_parts
from rfjax.data.reading import Dataset, Example, check_window, open_dataset
from rfjax.data.redrawing import redraw
from rfjax.data.trajectories import make_trajectories
from rfjax.errors import UserError
from rfjax.io.checkpoints import TOKENIZER, check_output, load_checkpoint_config, load_network
from rfjax.io.paths import kind_of
from rfjax.memory import create
from rfjax.models import vae
from rfjax.models.functional import Params
from rfjax.models.model import Model
from rfjax.models.text_encoder import encode_tokens
from rfjax.models.tokenizer import Tokenizer
from rfjax.sampling.bidirectional import noise_levels
from rfjax.sampling.codec import to_unit
from rfjax.sampling.schedule import STEPS, few_steps

READING_THREADS = 4
REDRAWING_WINDOW = 21
"""Latent frames that the student attends to, as in its training."""
KEPT = ("caption", "scene")
"""What examples keep of the clips'."""


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Which latents of which clips."""

    dataset: Path
    """Folder of a dataset with videos; all its splits are taken."""
    checkpoint: Path
    """Whose autoencoder, and text encoder, are used."""
    frames: int | None = None
    """First video frames of each clip that are taken; None takes whole clips."""
    embed_prompts: bool = False
    """Whether the captions' embeddings are kept beside the latents."""
    batch_size: int = 8
    """Clips encoded together."""
    dtype: str = "float32"
    """Of the computation."""


@dataclasses.dataclass(frozen=True)
class RedrawnConfig:
    """Which clips a student redraws."""

    dataset: Path
    """Folder of a dataset with videos; all its splits are taken."""
    checkpoint: Path
    """The student, with its autoencoder."""
    frames: int | None = None
    """First video frames of each clip that are taken; None takes whole clips."""
    batch_size: int = 8
    """Clips worked on together."""
    seed: int = 0
    """With the number of the clip it fixes its noise."""
    dtype: str = "float32"
    """Of the computation."""


@dataclasses.dataclass(frozen=True)
class TrajectoriesConfig:
    """Which trajectories."""

    prompts: Path
    """A text file with a prompt a line, or a dataset whose captions (of split "train") are taken."""
    checkpoint: Path
    """The teacher."""
    count: int
    """Trajectories; the prompts are gone through again where they are fewer."""
    guidance: float = 3.0
    """1 is none."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    solver_steps: int = 48
    """Euler steps, a multiple of the model's denoising steps."""
    latent_frames: int = 21
    """Length of the videos."""
    batch_size: int = 8
    """Videos made together."""
    seed: int = 0
    """With the number of the trajectory it fixes its noise."""
    dtype: str = "float32"
    """Of the computation."""


class Latents(Parts):
    """Latents of clips."""


class Redrawn(Parts):
    """Clips, and beside them the latents that a student made of them."""


class Trajectories(Parts):
    """Ways of a teacher from noise to clean latents."""


def build_latents(folder: Path, config: LatentsConfig, report: Report) -> None:
    """Encode a dataset's clips into a new dataset: `latents`, float16 [F, h, w, C], with captions and scenes.

    Raises:
        UserError: the dataset or checkpoint is missing or lacks a part, the clips do not fit the autoencoder, or the
            folder cannot be written.
    """
    check_output(folder)
    sources, frames, sizes, vae_sizes = _open_clips(config)
    networks = ("vae", "text_encoder") if config.embed_prompts else ("vae",)
    plan = Plan(
        builder=Latents,
        settings={
            "dataset": signature(config.dataset / "dataset_info.json"),
            "checkpoint": _checkpoint_signature(config.checkpoint, networks),
            "frames": frames,
            "embed_prompts": config.embed_prompts,
            "dtype": config.dtype,
        },
        splits={split: len(source) for split, source in sources.items()},
        batch_size=config.batch_size,
    )
    encode = functools.partial(_encode, vae_sizes, load_network(config.checkpoint, "vae", config.dtype))
    embed = _Embedder(config.checkpoint, sizes, config.dtype) if config.embed_prompts else None

    def compute(split: str, batch: range) -> Columns:
        videos, columns = _clips(readers[split](batch), frames)
        columns["latents"] = _stored(encode(_filled(videos, config.batch_size)), len(batch))
        if embed:
            columns["prompt_embeds"] = _stored(embed(_filled(columns["caption"], config.batch_size)), len(batch))
        return columns

    with ThreadPoolExecutor(READING_THREADS) as pool:
        readers = {split: _Reader(source, pool) for split, source in sources.items()}
        write_in_parts(folder, plan, compute, report)


def build_redrawn(folder: Path, config: RedrawnConfig, report: Report) -> None:
    """Let a student redraw a dataset's clips: `video`, and `latents`, float16 [F, h, w, C], with captions and scenes.

    The latents show the clips with the student's own errors, so that its decoder can learn to make the best of them
    (stage `vae` with `decoder_only`). Batches take turns: one is left as the encoder made it, and one is redrawn from
    each denoising step of the later half; from earlier ones things come out elsewhere, which blurs what is learnt.

    Raises:
        UserError: the dataset or checkpoint is missing or lacks a part, the clips do not fit the autoencoder or make no
            whole chunks, or the folder cannot be written.
    """
    check_output(folder)
    sources, frames, sizes, vae_sizes = _open_clips(config)
    _check_chunks(frames, sizes, vae_sizes)
    plan = Plan(
        builder=Redrawn,
        settings={
            "dataset": signature(config.dataset / "dataset_info.json"),
            "checkpoint": _checkpoint_signature(config.checkpoint, ("transformer", "vae", "text_encoder")),
            "frames": frames,
            "seed": config.seed,
            "dtype": config.dtype,
        },
        splits={split: len(source) for split, source in sources.items()},
        batch_size=config.batch_size,
    )
    embed = _Embedder(config.checkpoint, sizes, config.dtype)
    transformer, autoencoder = (load_network(config.checkpoint, name, config.dtype) for name in ("transformer", "vae"))
    model = Model(sizes, transformer, autoencoder, dtype=jnp.dtype(config.dtype))
    steps = len(sizes.denoising_steps)
    turns, policy = (None, *range((steps + 1) // 2, steps)), create("self_forcing", window_frames=REDRAWING_WINDOW)

    def compute(split: str, batch: range) -> Columns:
        videos, columns = _clips(readers[split](batch), frames)
        latents = _encode(vae_sizes, autoencoder, _filled(videos, config.batch_size))
        step = turns[batch.start // config.batch_size % len(turns)]
        if step is not None:
            key = jax.random.fold_in(jax.random.key(config.seed), list(sources).index(split))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, _filled(np.array(batch), config.batch_size))
            embeds = embed(_filled(columns["caption"], config.batch_size))
            latents = redraw(model, policy, latents, embeds, step, keys)
        return {**columns, "video": videos, "latents": _stored(latents, len(batch))}

    with ThreadPoolExecutor(READING_THREADS) as pool:
        readers = {split: _Reader(source, pool) for split, source in sources.items()}
        write_in_parts(folder, plan, compute, report)


def build_trajectories(folder: Path, config: TrajectoriesConfig, report: Report) -> None:
    """Follow the teacher's flow for each prompt into a dataset of `trajectory`, float16 [S + 1, F, h, w, C].

    Raises:
        UserError: the prompts or the checkpoint are missing or lack a part, a setting that cannot be, or the folder
            cannot be written.
    """
    check_output(folder)
    prompts = _captions(config.prompts)
    sizes = load_checkpoint_config(config.checkpoint)
    if config.latent_frames % sizes.chunk_frames:
        raise UserError(
            f"the trajectories have {config.latent_frames} latent frames; a multiple of the chunk's "
            f"{sizes.chunk_frames} is needed"
        )
    plan = Plan(
        builder=Trajectories,
        settings={
            "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
            "checkpoint": _checkpoint_signature(config.checkpoint, ("transformer", "text_encoder")),
            "guidance": config.guidance,
            "negative_prompt": config.negative_prompt,
            "solver_steps": config.solver_steps,
            "latent_frames": config.latent_frames,
            "seed": config.seed,
            "dtype": config.dtype,
        },
        splits={"train": config.count},
        batch_size=config.batch_size,
    )
    # Refuses a wrong number of steps before anything is loaded.
    noise_levels((few_steps(sizes) / STEPS).tolist(), sizes.timestep_shift, config.solver_steps)
    embed = _Embedder(config.checkpoint, sizes, config.dtype)
    negative = embed.negative(config.negative_prompt)
    params = load_network(config.checkpoint, "transformer", config.dtype)
    shape = (config.latent_frames, sizes.latent_height, sizes.latent_width, sizes.transformer.in_dim)
    follow = make_trajectories(sizes, params, shape, config.solver_steps, config.guidance)

    def compute(split: str, batch: range) -> Columns:
        captions = np.array([prompts[index % len(prompts)] for index in batch])
        numbers = _filled(np.array(batch), config.batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), jnp.asarray(numbers))
        made = follow(embed(_filled(captions, config.batch_size)), negative, keys)
        return {"caption": captions, "trajectory": _stored(made, len(batch))}

    write_in_parts(folder, plan, compute, report)


class _Reader:
    """Reads batches of examples in order; while one is worked on, the next is read."""

    def __init__(self, source: Dataset, pool: ThreadPoolExecutor):
        self._source, self._pool = source, pool
        self._ahead: dict[int, Future[Example]] = {}

    def __call__(self, batch: range) -> list[Example]:
        now = self._submit(batch)
        self._ahead = self._submit(range(batch.stop, min(batch.stop + len(batch), len(self._source))))
        return [future.result() for future in now.values()]

    def _submit(self, batch: range) -> dict[int, Future[Example]]:
        read = self._source.__getitem__
        return {index: self._ahead.get(index) or self._pool.submit(read, index) for index in batch}


class _Embedder:
    """The checkpoint's text encoder."""

    def __init__(self, checkpoint: Path, sizes: ModelConfig, dtype: str):
        if sizes.umt5 is None or kind_of(checkpoint / TOKENIZER, "the tokenizer") != "folder":
            raise UserError(f"the checkpoint {checkpoint} lacks a text encoder or tokenizer, to embed the prompts")
        if sizes.umt5.dim != sizes.transformer.text_dim:
            raise UserError(
                f"the text encoder of {checkpoint} gives width {sizes.umt5.dim}, but its transformer takes "
                f"{sizes.transformer.text_dim}: they do not belong together"
            )
        self._tokenizer = Tokenizer.load(checkpoint / TOKENIZER, sizes.transformer.text_len)
        self._encode = functools.partial(_encode_tokens, sizes.umt5, load_network(checkpoint, "text_encoder", dtype))

    def __call__(self, captions: np.ndarray) -> Float[Array, "B L D"]:
        return self._encode(*self._tokenizer(captions.tolist()))

    def negative(self, prompt: str) -> Float[Array, "1 L D"]:
        """Embed one prompt, which may be empty."""
        return self._encode(*(self._tokenizer([prompt]) if prompt else self._tokenizer.nothing()))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig, params: Params, video: UInt8[Array, "B T H W 3"]) -> Float[Array, "B F h w C"]:
    dtype = jax.tree.leaves(params)[0].dtype
    return vae.encode(config, params, to_unit(video).astype(dtype))


_encode_tokens = functools.partial(jax.jit, static_argnums=0)(encode_tokens)


def _open_clips(config: LatentsConfig | RedrawnConfig) -> tuple[dict[str, Dataset], int, ModelConfig, VAEConfig]:
    """Return the splits of the clips, how many frames of each are taken, and the sizes of the networks."""
    sources = _open_videos(config.dataset)
    sizes = load_checkpoint_config(config.checkpoint)
    if sizes.vae is None:
        raise UserError(f"the checkpoint {config.checkpoint} has no autoencoder; name one that has")
    return sources, _check_clips(sources, sizes.vae, config.frames), sizes, sizes.vae


def _check_chunks(frames: int, sizes: ModelConfig, vae_sizes: VAEConfig) -> None:
    """Make sure that clips of so many frames are whole chunks of the student, and that it can redraw anything."""
    if len(sizes.denoising_steps) < 2:
        raise UserError("the student denoises in one step, which sees nothing of a clip; one of 2 or more is needed")
    chunk, group = sizes.chunk_frames, vae_sizes.temporal_factor
    latent_frames = 1 + (frames - 1) // group
    if latent_frames % chunk:
        whole = max(latent_frames - latent_frames % chunk, chunk)
        raise UserError(
            f"clips of {frames} frames have {latent_frames} latent frames, and the student makes chunks of {chunk}; "
            f"{1 + (whole - 1) * group} frames, for one, would do"
        )


def _clips(examples: Sequence[Example], frames: int) -> tuple[UInt8[np.ndarray, "B T H W 3"], Columns]:
    """Return the videos, and what is kept beside them."""
    kept = {name: np.array([example[name] for example in examples]) for name in KEPT if name in examples[0]}
    return np.stack([example["video"][:frames] for example in examples]), kept


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Repeat the last row up to a whole batch, so that one program serves all batches."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])


def _stored(rows: Array, count: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is not finite is refused later
        return np.asarray(rows[:count]).astype(np.float16)


def _open_videos(path: Path) -> dict[str, Dataset]:
    """Open all splits of a dataset that has videos."""
    train = open_dataset(path, "train")
    if not isinstance(train, Dataset) or "video" not in train[0]:
        raise UserError(f"{path} has no videos to encode, only {', '.join(sorted(train[0]))}; name a dataset of clips")
    splits = tfds.builder_from_directory(path).info.splits
    sources = {split: open_dataset(path, split) for split in splits}
    return {split: source for split, source in sources.items() if isinstance(source, Dataset)}


def _check_clips(sources: dict[str, Dataset], config: VAEConfig, frames: int | None) -> int:
    """Return how many frames of each clip are encoded, after checking that the autoencoder can."""
    lengths = sorted({length for source in sources.values() for length in source.lengths("video")})
    if frames is None and len(lengths) > 1:
        raise UserError(
            f"the clips have from {lengths[0]} to {lengths[-1]} frames, latents need one length; "
            f"take the first frames of each, with --frames {_fitting(lengths[0], config)} at most"
        )
    if frames is None:
        frames = lengths[0]
    for source in sources.values():
        check_window(source, "video", frames)
    if frames != _fitting(frames, config):
        raise UserError(
            f"the autoencoder encodes 1 plus a multiple of {config.temporal_factor} frames, not {frames}; "
            f"take the first ones, with --frames {_fitting(frames, config)}"
        )
    _, height, width, _ = next(iter(sources.values()))[0]["video"].shape
    if height % config.spatial_factor or width % config.spatial_factor:
        raise UserError(f"the clips are {height}x{width} pixels; multiples of {config.spatial_factor} are needed")
    return frames


def _fitting(frames: int, config: VAEConfig) -> int:
    """The largest number of frames, at most this many, that the autoencoder encodes."""
    return frames - (frames - 1) % config.temporal_factor


def _checkpoint_signature(checkpoint: Path, networks: Sequence[str]) -> str:
    """Tell a checkpoint from another one in its place: a network's manifest is new with every writing."""
    present = [file for name in networks if (file := checkpoint / name / "manifest.ocdbt").exists()]
    return signature(checkpoint / "config.json", *present)


def _captions(path: Path) -> list[str]:
    source = open_dataset(path, "train")
    if not isinstance(source, Dataset):
        return [source[index]["caption"] for index in range(len(source))]
    builder: Any = tfds.builder_from_directory(path)
    others = {name: tfds.decode.SkipDecoding() for name in builder.info.features if name != "caption"}
    return [example["caption"].decode() for example in builder.as_data_source("train", decoders=others)]
