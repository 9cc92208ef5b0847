"""Datasets made by a checkpoint's networks: latents of clips, and the teacher's trajectories."""

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
from rfjax.data.trajectories import make_trajectories
from rfjax.errors import UserError
from rfjax.io.checkpoints import TOKENIZER, check_output, load_checkpoint_config, load_network
from rfjax.io.paths import kind_of
from rfjax.models import vae
from rfjax.models.functional import Params
from rfjax.models.text_encoder import encode_tokens
from rfjax.models.tokenizer import Tokenizer
from rfjax.sampling.bidirectional import noise_levels
from rfjax.sampling.codec import to_unit
from rfjax.sampling.schedule import STEPS, few_steps

READING_THREADS = 4
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


class Trajectories(Parts):
    """Ways of a teacher from noise to clean latents."""


def build_latents(folder: Path, config: LatentsConfig, report: Report) -> None:
    """Encode a dataset's clips into a new dataset: `latents`, float16 [F, h, w, C], with captions and scenes.

    Raises:
        UserError: the dataset or checkpoint is missing or lacks a part, the clips do not fit the autoencoder, or the
            folder cannot be written.
    """
    check_output(folder)
    sources = _open_videos(config.dataset)
    sizes = load_checkpoint_config(config.checkpoint)
    if sizes.vae is None:
        raise UserError(f"the checkpoint {config.checkpoint} has no autoencoder; name one that has")
    frames = _check_clips(sources, sizes.vae, config.frames)
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
    encode = functools.partial(_encode, sizes.vae, load_network(config.checkpoint, "vae", config.dtype))
    embed = _Embedder(config.checkpoint, sizes, config.dtype) if config.embed_prompts else None

    def compute(split: str, batch: range) -> Columns:
        examples = readers[split](batch)
        videos = np.stack([example["video"][:frames] for example in examples])
        columns = {name: np.array([example[name] for example in examples]) for name in KEPT if name in examples[0]}
        columns["latents"] = _stored(encode(_filled(videos, config.batch_size)), len(batch))
        if embed:
            columns["prompt_embeds"] = _stored(embed(_filled(columns["caption"], config.batch_size)), len(batch))
        return columns

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
