"""What a run of `rfjax generate` is to make: flags, checkpoint and output folder checked against each other."""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Sequence
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
from rfjax.io.manifest import read_jobs
from rfjax.io.paths import kind_of
from rfjax.io.prompts import Request
from rfjax.io.reports import all_records
from rfjax.memory import MemoryPolicy, parse
from rfjax.memory.policy_file import policy_source
from rfjax.parallel.division import ONE_DEVICE, Sizes
from rfjax.parallel.processes import ALONE, Processes
from rfjax.sampling.budget import VideoShape
from rfjax.sampling.jobs import Job, expand, longest_first, places_for
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
    """Everything that the pixels depend on, but the prompt and the number of the sample; goes into the metadata.

    The length is that of the longest video; `of` gives another's.
    """
    asked: list[Job]
    """Videos asked for."""
    missing: list[Job]
    """Those that the output folder does not hold yet (all, with --overwrite), as far as this process makes them."""
    elsewhere: list[Job]
    """Those that other processes make."""
    unrecorded: list[str]
    """Files that stay as they are though the folder's metadata does not say how they were made."""
    places: int
    """Videos made together, on all devices."""
    output: Path
    place: str
    """What the user calls the output folder."""
    asked_seconds: float | None
    """Length asked for, before rounding up to whole chunks; None where latent frames were given."""
    sampler: Literal["chunk", "rolling"]
    """How chunks are denoised: one after the other, or several together."""
    schedule: dict[int, ScheduledPrompt]
    """Prompts that take over in the video, by the latent frame from which they hold."""

    mesh: Sizes = ONE_DEVICE
    """How many devices there are, and what they divide."""
    processes: Processes = ALONE
    """Who makes the videos."""

    @property
    def devices(self) -> int:
        """How many devices, or groups of devices that divide videos, share each batch."""
        return self.mesh.data

    @property
    def video(self) -> VideoShape:
        """Sizes of a device's or group's part of a batch."""
        factor = self.vae.spatial_factor
        return VideoShape(
            batch=self.places // self.devices,
            latent_frames=self.settings["latent_frames"],
            latent_height=self.settings["height"] // factor,
            latent_width=self.settings["width"] // factor,
        )

    def of(self, job: Job) -> "Plan":
        """Return the plan with the length of that video."""
        return dataclasses.replace(self, settings=self.settings | {"latent_frames": job.latent_frames})

    @property
    def queue(self) -> list[Job]:
        """The missing videos in the order in which they are begun."""
        return longest_first(self.missing)

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


def make_plan(
    args: argparse.Namespace,
    requests: Sequence[Request],
    schedule: list[ScheduledPrompt],
    processes: Processes = ALONE,
) -> Plan:
    """Check everything that can be checked before weights are read, and write nothing; the plan is for one device.

    Args:
        args: of `rfjax generate`.
        requests: a video each, times the samples.
        schedule: changes of prompt, the first one's beginning among them; empty if the prompt does not change.
        processes: that divide the videos.

    Raises:
        UserError: anything wrong with the flags, the checkpoint's sizes or the output folder.
    """
    checkpoint = args.checkpoint or SHIPPED
    config, vae = read_config(checkpoint)
    policy = parse(args.policy, dict(args.settings))
    seconds = DEFAULT_SECONDS if args.seconds is None and args.latent_frames is None else args.seconds
    asked = expand(_lengths(requests, config, vae, seconds, args.latent_frames, args.fps), args.num_samples)
    settings = _settings(args, config, vae, policy, asked)
    starts: dict[int, ScheduledPrompt] = {}
    if schedule:
        times = config.chunk_frames, vae.temporal_factor, args.fps, settings["latent_frames"]
        starts = switch_frames(schedule, args.prompt_schedule, *times)
        settings["prompt_schedule"] = [dataclasses.asdict(entry) for entry in schedule]
        settings["prompt_switch"] = args.prompt_switch or "recache"
    missing, unrecorded = _missing(args, asked, settings)
    # Shares of all videos, so that a process finds the videos again whose state it has kept.
    share = set(processes.share(longest_first(asked)))
    own = [job for job in missing if job in share]
    return Plan(
        checkpoint=checkpoint,
        config=config,
        vae=vae,
        policy=policy,
        settings=settings,
        asked=asked,
        missing=own,
        elsewhere=[job for job in missing if job not in share],
        unrecorded=unrecorded,
        places=places_for(len(own), args.batch_size),
        output=args.output,
        place=str(args.output),
        asked_seconds=seconds if all(request == Request(request.prompt) for request in requests) else None,
        sampler=args.sampler,
        schedule=starts,
        processes=processes,
    )


def _settings(
    args: argparse.Namespace, config: ModelConfig, vae: VAEConfig, policy: MemoryPolicy, asked: list[Job]
) -> dict[str, Any]:
    """Return everything that the pixels depend on, but prompts: neither their text nor when they change."""
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    check_dtype(dtype)
    height, width = frame_pixels(config, vae, args.height, args.width)
    settings = {
        "checkpoint": fingerprint(args.checkpoint or SHIPPED),
        "policy": {
            "name": policy.name,
            **dataclasses.asdict(policy),  # pyright: ignore[reportArgumentType]
            **policy_source(policy),
        },
        "latent_frames": max(job.latent_frames for job in asked),
        "height": height,
        "width": width,
        "fps": args.fps,
        "seed": args.seed,
        "dtype": dtype,
    }
    if args.sampler != "chunk":
        settings["sampler"] = args.sampler
        _check_rolling(args, asked)
    return settings


def _missing(args: argparse.Namespace, asked: list[Job], settings: dict[str, Any]) -> tuple[list[Job], list[str]]:
    """Look into the output folder.

    Returns:
        The videos that are to be made, and the files that stay though no record tells how they were made.

    Raises:
        UserError: the folder cannot be written, or holds videos of other settings.
    """
    outputs.check_writable(args.output)
    recorded = all_records(args.output)
    if args.overwrite:
        return asked, []
    outputs.check_settings(args.output, recorded, settings, {job.video: job.latent_frames for job in asked})
    # Between a video's last byte and its record lies a moment in which a run may be killed.
    begun = {file for file, entry in read_jobs(args.output).items() if entry["state"] != "done"} - recorded.keys()
    missing = [job for job in asked if job.video in begun or kind_of(args.output / job.video, "the video") == "missing"]
    kept = {job.video for job in asked} - {job.video for job in missing}
    return missing, sorted(kept - recorded.keys())


def _lengths(
    requests: Sequence[Request],
    config: ModelConfig,
    vae: VAEConfig,
    seconds: float | None,
    frames: int | None,
    fps: int,
) -> dict[str, int]:
    """Return the latent frames of each prompt, its own or those that the flags say; a repeated prompt counts once."""
    lengths: dict[str, int] = {}
    for request in requests:
        own = request.seconds, request.latent_frames
        asked = (seconds, frames) if own == (None, None) else own
        try:
            length = latent_frames(config.chunk_frames, vae.temporal_factor, *asked, fps)
        except UserError as error:
            if own == (None, None):
                raise
            said = str(error).replace("--seconds", "seconds").replace("--latent-frames", "latent_frames")
            raise UserError(f"prompt {request.prompt!r}: {said}") from None
        if lengths.setdefault(request.prompt, length) != length:
            raise UserError(
                f"prompt {request.prompt!r} is asked for with {lengths[request.prompt]} and with {length} latent "
                "frames; its videos would have the same names, so one length is needed"
            )
    return lengths


def _check_rolling(args: argparse.Namespace, asked: list[Job]) -> None:
    if len({job.latent_frames for job in asked}) > 1:
        raise UserError("--sampler rolling makes videos of one length together; use chunk, or a prompt file a length")
    if args.checkpoint_every:
        raise UserError(
            f"--checkpoint-every {args.checkpoint_every} does not go with --sampler rolling, whose chunks overlap; "
            "use chunk"
        )


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
