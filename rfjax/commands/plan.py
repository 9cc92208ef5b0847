"""What a run of `rfjax generate` is to make: flags, checkpoint and output folder checked against each other."""

import argparse
import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import jax

import rfjax
from rfjax.commands.generate import DEFAULT_SECONDS
from rfjax.commands.prompt_schedule import ScheduledPrompt, switch_frames
from rfjax.config import ModelConfig, VAEConfig
from rfjax.errors import UserError
from rfjax.io import outputs
from rfjax.io.checkpoints import CONFIG, TOKENIZER, check_dtype, load_checkpoint_config
from rfjax.io.paths import kind_of
from rfjax.memory import MemoryPolicy, parse
from rfjax.memory.policy_file import policy_source
from rfjax.sampling.budget import VideoShape
from rfjax.sampling.jobs import Job, batches, expand
from rfjax.sampling.switching import WINDOW_CHUNKS

SHIPPED = Path(rfjax.__file__).parent / "assets" / "moving_shapes"
"""The checkpoint that comes with rfjax (docs/tiny_model.md)."""

LONGEST = 2**30
"""Latent frames that frame indices can count."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run of `rfjax generate`."""

    checkpoint: Path
    config: ModelConfig
    vae: VAEConfig
    policy: MemoryPolicy
    settings: dict[str, Any]
    """Everything that the pixels depend on, but the prompt and the number of the sample; goes into the metadata."""
    asked: list[Job]
    """Videos asked for."""
    missing: list[Job]
    """Those that the output folder does not hold yet (all, with --overwrite)."""
    unrecorded: list[str]
    """Files that stay as they are though the folder's metadata does not say how they were made."""
    batches: list[list[Job]]
    """The missing ones, in batches of equal size."""
    output: Path
    asked_seconds: float | None
    """Length asked for, before rounding up to whole chunks; None where latent frames were given."""
    sampler: Literal["chunk", "rolling"]
    """How chunks are denoised: one after the other, or several together."""
    schedule: dict[int, ScheduledPrompt]
    """Prompts that take over in the video, by the latent frame from which they hold."""

    devices: int = 1
    """How many devices share each batch."""

    @property
    def video(self) -> VideoShape:
        """Sizes of a device's part of a batch."""
        factor = self.vae.spatial_factor
        return VideoShape(
            batch=len(self.batches[0]) // self.devices if self.batches else 1,
            latent_frames=self.settings["latent_frames"],
            latent_height=self.settings["height"] // factor,
            latent_width=self.settings["width"] // factor,
        )

    @property
    def pass_chunks(self) -> int:
        """The most chunks that go through the network together."""
        if self.sampler == "rolling":
            return len(self.config.denoising_steps)
        return WINDOW_CHUNKS if self.settings.get("prompt_switch") == "recache" else 1

    @property
    def chunks(self) -> int:
        """Chunks of every video."""
        return self.settings["latent_frames"] // self.config.chunk_frames

    @property
    def video_frames(self) -> int:
        """Frames of every video."""
        return 1 + self.vae.temporal_factor * (self.settings["latent_frames"] - 1)

    @property
    def seconds_per_latent(self) -> float:
        """Duration of a latent frame."""
        return self.vae.temporal_factor / self.settings["fps"]


def make_plan(args: argparse.Namespace, prompts: list[str], schedule: list[ScheduledPrompt]) -> Plan:
    """Check everything that can be checked before weights are read, and write nothing.

    Args:
        args: of `rfjax generate`.
        prompts: a video each, times the samples.
        schedule: changes of prompt, the first one's beginning among them; empty if the prompt does not change.

    Raises:
        UserError: anything wrong with the flags, the checkpoint's sizes or the output folder.
    """
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    check_dtype(dtype)
    checkpoint = args.checkpoint or SHIPPED
    config, vae = read_config(checkpoint)
    policy = parse(args.policy, dict(args.settings))
    seconds = DEFAULT_SECONDS if args.seconds is None and args.latent_frames is None else args.seconds
    height, width = frame_pixels(config, vae, args.height, args.width)
    settings = {
        "checkpoint": fingerprint(checkpoint),
        "policy": {
            "name": policy.name,
            **dataclasses.asdict(policy),  # pyright: ignore[reportArgumentType]
            **policy_source(policy),
        },
        "latent_frames": latent_frames(config.chunk_frames, vae.temporal_factor, seconds, args.latent_frames, args.fps),
        "height": height,
        "width": width,
        "fps": args.fps,
        "seed": args.seed,
        "dtype": dtype,
    }
    if args.sampler != "chunk":
        settings["sampler"] = args.sampler
    starts: dict[int, ScheduledPrompt] = {}
    if schedule:
        length = settings["latent_frames"]
        starts = switch_frames(
            schedule, args.prompt_schedule, config.chunk_frames, vae.temporal_factor, args.fps, length
        )
        settings["prompt_schedule"] = [dataclasses.asdict(entry) for entry in schedule]
        settings["prompt_switch"] = args.prompt_switch or "recache"
    outputs.check_writable(args.output)
    asked = expand(prompts, args.num_samples)
    recorded = outputs.read_records(args.output).keys()
    if not args.overwrite:
        outputs.check_settings(args.output, settings)
    missing = [job for job in asked if args.overwrite or kind_of(args.output / job.video, "the video") == "missing"]
    kept = set(asked) - set(missing)
    devices = max(1, min(_devices(args), len(missing)))
    return Plan(
        checkpoint=checkpoint,
        config=config,
        vae=vae,
        policy=policy,
        settings=settings,
        asked=asked,
        missing=missing,
        unrecorded=sorted(job.video for job in kept if job.video not in recorded),
        batches=batches(missing, args.batch_size, devices),
        output=args.output,
        asked_seconds=seconds,
        sampler=args.sampler,
        schedule=starts,
        devices=devices,
    )


def _devices(args: argparse.Namespace) -> int:
    """Return how many devices may share a batch: those that `--mesh` names, or all where the sampler can use them.

    Raises:
        UserError: there are not so many, or the sampler runs on one.
    """
    there, asked = jax.local_device_count(), args.mesh
    if asked is None:
        return 1 if args.sampler == "rolling" else there
    if asked > there:
        raise UserError(f"--mesh is data={asked}, but there are {there} devices; data=1 to data={there} would do")
    if asked > 1 and args.sampler == "rolling":
        raise UserError(f"--mesh data={asked} does not go with --sampler rolling, which runs on one device; use chunk")
    return asked


def read_config(checkpoint: Path) -> tuple[ModelConfig, VAEConfig]:
    """Read a checkpoint's sizes, and check that it can turn prompts into pixels.

    Raises:
        UserError: it is missing, or lacks a network or the tokenizer.
    """
    config = load_checkpoint_config(checkpoint)
    if config.vae is None:
        raise _lacks(checkpoint, "autoencoder (vae)")
    if config.umt5 is None:
        raise _lacks(checkpoint, "text encoder (umt5)")
    if kind_of(checkpoint / TOKENIZER, "the folder") != "folder":
        raise _lacks(checkpoint, "tokenizer")
    if config.umt5.dim != config.transformer.text_dim:
        raise UserError(
            f"--checkpoint {checkpoint} has a text encoder of width {config.umt5.dim} and a transformer that reads "
            f"{config.transformer.text_dim}; they do not belong together"
        )
    if config.vae.z_dim != config.transformer.in_dim:
        raise UserError(
            f"--checkpoint {checkpoint} has an autoencoder of {config.vae.z_dim} latent channels and a transformer of "
            f"{config.transformer.in_dim}; they do not belong together"
        )
    return config, config.vae


def _lacks(checkpoint: Path, part: str) -> UserError:
    return UserError(f"--checkpoint {checkpoint} has no {part}, which generate needs; convert it with one")


def fingerprint(checkpoint: Path) -> str:
    """Return a hash that differs between checkpoints, wherever they lie: of the sizes and of what Orbax wrote.

    The weights are not read: a manifest names the files of its network, and every writing names them anew.
    """
    digest = hashlib.sha256()
    manifests = sorted(checkpoint.glob("*/manifest.ocdbt"))
    for path in (checkpoint / CONFIG, checkpoint / TOKENIZER / "tokenizer.json", *manifests):
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    return f"sha256:{digest.hexdigest()[:16]}"


def frame_pixels(config: ModelConfig, vae: VAEConfig, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, the checkpoint's where none is given.

    Raises:
        UserError: one is not a multiple of what a token covers (16 for Wan).
    """
    factor = vae.spatial_factor
    sizes = []
    for name, asked, latent, patch in (
        ("height", height, config.latent_height, config.transformer.patch_size[1]),
        ("width", width, config.latent_width, config.transformer.patch_size[2]),
    ):
        size, multiple = asked or latent * factor, patch * factor
        if size % multiple:
            below = size // multiple * multiple
            near = f"{below} or {below + multiple}" if below else str(multiple)
            raise UserError(f"--{name} is {size}; it must be a multiple of {multiple}, such as {near}")
        sizes.append(size)
    return sizes[0], sizes[1]


def latent_frames(chunk: int, factor: int, seconds: float | None, frames: int | None, fps: int) -> int:
    """Return the length in latent frames; seconds are rounded up to whole chunks.

    Args:
        chunk: latent frames a chunk.
        factor: video frames of every latent frame but the first, which is a single one.
        seconds: length asked for, or None.
        frames: latent frames asked for instead, or None.
        fps: video frames a second.

    Raises:
        UserError: latent frames that make no whole chunks, or a video too long to count.
    """
    if frames is None:
        assert seconds is not None
        if seconds * fps / factor >= LONGEST - 2 * chunk:
            raise UserError(
                f"--seconds is {seconds:g}; at {fps} fps at most {(LONGEST // 2) * factor // fps} are possible"
            )
        video_frames = max(1, math.ceil(round(seconds * fps, 6)))
        least = 1 + math.ceil((video_frames - 1) / factor)
        return math.ceil(least / chunk) * chunk
    if frames >= LONGEST:
        raise UserError(f"--latent-frames is {frames}; at most {LONGEST - 1} are possible")
    if frames % chunk:
        below = frames // chunk * chunk
        near = f"{below} or {below + chunk}" if below else str(chunk)
        raise UserError(f"--latent-frames is {frames}; it must be a multiple of the chunk's {chunk}, such as {near}")
    return frames
