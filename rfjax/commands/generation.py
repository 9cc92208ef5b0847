"""What `rfjax generate` does once its flags are read: checks, then batches of videos, then their records."""

import argparse
import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from rfjax.commands.interruptions import Interruptions
from rfjax.commands.plan import Plan, make_plan
from rfjax.commands.progress import ChunkProgress
from rfjax.commands.prompt_schedule import ScheduledPrompt
from rfjax.commands.records import write_records
from rfjax.io import outputs
from rfjax.io.checkpoints import TOKENIZER, load
from rfjax.io.ownership import owning
from rfjax.io.video import VideoWriter
from rfjax.models.model import Model
from rfjax.models.tokenizer import Tokenizer
from rfjax.parallel.samples import data_parallel
from rfjax.sampling import rolling
from rfjax.sampling.budget import GB, Budget, check_fits, device_limit, estimate, needs, out_of_memory_says
from rfjax.sampling.codec import encode_prompt
from rfjax.sampling.jobs import Job
from rfjax.sampling.pipeline import VideoChunk, keys_from_seed, stream_video
from rfjax.sampling.switching import Switch


@dataclasses.dataclass(frozen=True)
class Run:
    """What all batches share."""

    plan: Plan
    budget: Budget
    model: Model
    switches: list[Switch]
    """Changes of prompt, with embeddings of a single sample."""
    progress: ChunkProgress
    interruptions: Interruptions


def generate(args: argparse.Namespace, prompts: list[str], schedule: list[ScheduledPrompt]) -> None:
    """Make the videos that the output folder lacks.

    Raises:
        UserError: an input is wrong, and nothing has been written; or the latents became NaN, and the videos finished
            before are kept.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    plan = make_plan(args, prompts, schedule)
    budget = estimate(plan.config, plan.policy, plan.video, plan.settings["dtype"], plan.pass_chunks)
    if plan.sampler == "rolling":
        size = plan.video.latent_height, plan.video.latent_width
        attended = rolling.attended_frames(plan.config, plan.policy, size, plan.video.latent_frames)
        budget = dataclasses.replace(budget, attended_frames=attended)
    limit = device_limit(jax.devices()[0])
    for line in _introduction(plan, budget, limit):
        console.print(line)
    if not plan.missing:
        return
    check_fits(budget, limit)
    check_prompts(plan, [job.prompt for job in plan.missing] + [entry.prompt for entry in plan.schedule.values()])
    with out_of_memory_says(needs(budget, limit)):
        model = load(plan.checkpoint, dtype=plan.settings["dtype"])
        if plan.devices > 1:
            model = data_parallel(model, jax.local_devices()[: plan.devices])
        outputs.make_folder(plan.output)
        with owning(plan.output):
            outputs.remove_stale(plan.output)
            _make_all(plan, budget, model, console)
    made = plan.missing[0].video if len(plan.missing) == 1 else f"{len(plan.missing)} videos"
    console.print(f"{made} in {plan.output}")


def _make_all(plan: Plan, budget: Budget, model: Model, console: Console) -> None:
    done, switches = 0, _switches(plan, model)
    try:
        with Interruptions() as interruptions, ChunkProgress(console, len(plan.batches) * plan.chunks) as progress:
            run = Run(plan, budget, model, switches, progress, interruptions)
            for batch in plan.batches:
                made = list(dict.fromkeys(batch))  # without the repeats that fill up the last batch
                progress.label(_numbers(done, len(made), len(plan.missing)))
                _make_batch(run, batch, made)
                done += len(made)
    except KeyboardInterrupt as interruption:
        complete = f"; {done} of {len(plan.missing)} videos are complete in {plan.output}"
        raise type(interruption)(complete) from None


def _numbers(done: int, count: int, total: int) -> str:
    return f"video {done + 1} of {total}" if count == 1 else f"videos {done + 1}-{done + count} of {total}"


def _introduction(plan: Plan, budget: Budget, limit: int | None) -> list[str]:
    """Say what is about to be computed; the first line has device, model, policy, attended frames and memory."""
    settings = plan.settings
    there = "" if limit is None else f" of {gb(limit)}"
    each = ", on each device" if plan.devices > 1 else ""
    lines = [
        f"{device_name(plan.devices)}: {plan.checkpoint.name} ({short_count(budget.parameters)} parameters, "
        f"{settings['dtype']}), {plan.policy.name} attending to {budget.attended_frames} latent frames, "
        f"memory {gb(budget.memory)} GB ({gb(budget.total)}{there} GB in all{each})"
    ]
    if plan.config.description:
        lines.append(f"note: {plan.config.description}")
    if finished := len(plan.asked) - len(plan.missing):
        lines.append(
            f"{finished} of {len(plan.asked)} videos are in {plan.output} already (--overwrite makes them anew)"
        )
    if plan.unrecorded:
        lines.append(f"left as they are, though {outputs.METADATA} does not know them: {', '.join(plan.unrecorded)}")
    if plan.missing:
        lines.append(_size(plan))
    if plan.missing and plan.schedule:
        lines.append(_changes(plan))
    return lines


def _changes(plan: Plan) -> str:
    """Say when the prompt changes, in the seconds at which chunks begin."""
    factor, fps = plan.vae.temporal_factor, plan.settings["fps"]
    times = [f"{(1 + factor * (frame - 1)) / fps:.4g}{' (cut)' * entry.cut}" for frame, entry in plan.schedule.items()]
    return f"prompt changes ({plan.settings['prompt_switch']}) at {', '.join(times)} s"


def _size(plan: Plan) -> str:
    settings, seconds = plan.settings, plan.video_frames / plan.settings["fps"]
    rounded = "" if plan.asked_seconds in (None, seconds) else f", {plan.asked_seconds:g} s rounded up to whole chunks"
    return (
        f"{len(plan.missing)} video{'s' * (len(plan.missing) > 1)} of {settings['height']}x{settings['width']} pixels, "
        f"{plan.video_frames} frames, {seconds:.4g} s at {settings['fps']} fps: "
        f"{settings['latent_frames']} latent frames in {plan.chunks} chunks{rounded}"
    )


def device_name(count: int = 1) -> str:
    """Return what the first line of a run says of its devices, which are alike."""
    device = jax.devices()[0]
    name = f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    return name if count == 1 else f"{count} x {name}"


def gb(size: int) -> str:
    """Write a number of bytes in GB."""
    return f"{size / GB:.1f}" if size >= GB else f"{size / GB:.2g}"


def short_count(number: int) -> str:
    """Write a number of parameters as 1.42B or 350K."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _make_batch(run: Run, batch: list[Job], made: list[Job]) -> None:
    """Generate a batch and write the videos, timelines and records of those `made`, its first jobs."""
    plan = run.plan
    settings = plan.settings
    run.interruptions.check()
    embeds = encode(run.model, [job.prompt for job in batch])
    keys = keys_from_seed(settings["seed"], [job.sample for job in batch])
    size = (plan.video.latent_height, plan.video.latent_width)
    chunks: list[VideoChunk] = []
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                VideoWriter(plan.output / job.video, settings["height"], settings["width"], settings["fps"])
            )
            for job in made
        ]
        switches = [
            dataclasses.replace(switch, prompt_embeds=jnp.repeat(switch.prompt_embeds, len(batch), axis=0))
            for switch in run.switches
        ]
        length = settings["latent_frames"]
        stream = stream_video(run.model, plan.policy, embeds, length, size, keys, switches, plan.sampler)
        for chunk in stream:
            run.interruptions.check()
            for writer, frames in zip(writers, chunk.frames, strict=False):
                writer.write(frames)
            run.progress.advance(len(made) * chunk.frames.shape[1])
            chunks.append(dataclasses.replace(chunk, frames=chunk.frames[:0].copy()))  # a view would keep the pixels
    write_records(plan, run.budget, chunks, dict(enumerate(made)), len(batch))


def _switches(plan: Plan, model: Model) -> list[Switch]:
    """Encode the prompts that take over in the video."""
    recache = plan.settings.get("prompt_switch") == "recache"
    return [Switch(start, encode(model, [entry.prompt]), recache, entry.cut) for start, entry in plan.schedule.items()]


def check_prompts(plan: Plan, prompts: Iterable[str]) -> None:
    """Tokenise every prompt once, before weights are read; one that is too long is a warning of one line."""
    tokenizer = Tokenizer.load(plan.checkpoint / TOKENIZER, plan.config.transformer.text_len)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer(list(dict.fromkeys(prompts)))
    for warning in caught:
        print(f"rfjax: warning: {warning.message}", file=sys.stderr)


def encode(model: Model, prompts: list[str]) -> Array:
    """Return the embeddings of prompts that `check_prompts` has seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said by check_prompts
        return encode_prompt(model, prompts)
