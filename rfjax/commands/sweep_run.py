"""What `rfjax sweep` does once its flags are read: checks, then videos and their measures, then tables and report."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator

import jax
from jaxtyping import Array, Float
from rich.console import Console

from rfjax.commands.generation import check_prompts, device_name, encode, gb, short_count
from rfjax.commands.interruptions import Interruptions, Terminated
from rfjax.commands.progress import ChunkProgress
from rfjax.commands.records import write_records
from rfjax.commands.sweep_plan import STUDY, Member, Step, Sweep, make_sweep
from rfjax.errors import UserError
from rfjax.evaluation.report import write_report
from rfjax.evaluation.results import Result, measure_videos
from rfjax.evaluation.study import write_study
from rfjax.evaluation.tables import results_table, series_table, write_table
from rfjax.io import outputs
from rfjax.io.checkpoints import load
from rfjax.io.vbench import VBENCH, link_videos
from rfjax.io.video import VideoWriter
from rfjax.models.model import Model
from rfjax.sampling.budget import check_fits, device_limit, needs, out_of_memory_says
from rfjax.sampling.pipeline import VideoChunk, decode_stream, keys_from_seed
from rfjax.sampling.variants import stream_variants


@dataclasses.dataclass(frozen=True)
class Run:
    """What all steps share."""

    sweep: Sweep
    model: Model
    progress: ChunkProgress
    interruptions: Interruptions


def sweep(args: argparse.Namespace) -> None:
    """Make the videos that the output folder lacks, measure all and write tables and report.

    Raises:
        UserError: an input is wrong, and nothing has been written; or the latents became NaN, and the videos finished
            before are kept.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    plan = make_sweep(args)
    limit = device_limit(jax.devices()[0])
    for line in _introduction(plan, limit):
        console.print(line)
    if plan.steps:
        advice = _check_fits(plan, limit)
        check_prompts(plan.plan, [job.prompt for step in plan.steps for job in step.jobs])
        with out_of_memory_says(advice):
            model = load(plan.plan.checkpoint, dtype=plan.plan.settings["dtype"])
            try:
                _make_all(plan, model, console)
            except KeyboardInterrupt as interruption:
                if not isinstance(interruption, Terminated):
                    _report(plan, console)
                raise
    _report(plan, console)


def _introduction(plan: Sweep, limit: int | None) -> list[str]:
    """Say what is about to be computed; the first line has device, variants, compilations, videos and memory."""
    first, settings = plan.plan, plan.plan.settings
    largest = max(plan.budgets.values(), key=lambda budget: budget.total)
    there = "" if limit is None else f" of {gb(limit)}"
    lines = [
        f"{device_name()}: {first.checkpoint.name} ({short_count(largest.parameters)} parameters, "
        f"{settings['dtype']}), {_plural(len(plan.members), 'variant')} in "
        f"{_plural(plan.compilations, 'compilation')}, {_plural(plan.missing, 'video')} to make, "
        f"memory {gb(largest.memory)} GB ({gb(largest.total)}{there} GB in all)"
    ]
    if first.config.description:
        lines.append(f"note: {first.config.description}")
    asked = sum(len(member.plan.asked) for member in plan.members)
    if plan.missing < asked:
        lines.append(f"{asked - plan.missing} of {_plural(asked, 'video')} are in {plan.output} already")
    for member in plan.members:
        if member.plan.unrecorded:
            lines.append(
                f"left as they are and out of the report, though {outputs.METADATA} in {member.plan.output} does not "
                f"know them: {', '.join(member.plan.unrecorded)}"
            )
    lines.append(
        f"a video is {settings['height']}x{settings['width']} pixels, {first.video_frames} frames, "
        f"{first.video_frames / settings['fps']:.4g} s at {settings['fps']} fps: "
        f"{settings['latent_frames']} latent frames in {_plural(first.chunks, 'chunk')}"
    )
    return lines


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _check_fits(plan: Sweep, limit: int | None) -> str:
    """Refuse variants that the device cannot hold; return what to say if it runs out of memory in spite of that."""
    more = ", or a smaller --together" if any(len(step.members) > 1 for step in plan.steps) else ""
    for name, budget in plan.budgets.items():
        try:
            check_fits(budget, limit)
        except UserError as error:
            raise UserError(f"{name}: {error}{more}") from None
    return needs(max(plan.budgets.values(), key=lambda budget: budget.total), limit) + more


def _make_all(plan: Sweep, model: Model, console: Console) -> None:
    for folder in (plan.output, *(member.plan.output for member in plan.members)):
        outputs.make_folder(folder)
        outputs.remove_stale(folder)
    write_study(plan.output / STUDY, plan.resolved)
    done = 0
    try:
        with (
            Interruptions() as interruptions,
            ChunkProgress(console, len(plan.steps) * plan.plan.chunks) as progress,
        ):
            run = Run(plan, model, progress, interruptions)
            embeds, encoded = None, None
            for step in plan.steps:
                prompts = [job.prompt for job in step.jobs]
                if embeds is None or prompts != encoded:
                    embeds, encoded = encode(model, prompts), prompts
                count = sum(len(jobs) for jobs in step.videos.values())
                progress.label(f"{_who(step)}: {_numbers(done, count, plan.missing)}")
                _make_step(run, step, embeds)
                done += count
                for member, jobs in step.videos.items():
                    _measure(member, [job.video for job in jobs.values()], interruptions.check)
    except KeyboardInterrupt as interruption:
        complete = f"; {done} of {_plural(plan.missing, 'video')} are complete in {plan.output}"
        raise type(interruption)(complete) from None


def _who(step: Step) -> str:
    names = [member.variant.name for member in step.videos]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _numbers(done: int, count: int, total: int) -> str:
    return f"video {done + 1} of {total}" if count == 1 else f"videos {done + 1}-{done + count} of {total}"


def _make_step(run: Run, step: Step, embeds: Float[Array, "B T D"]) -> None:
    """Generate the videos of a step, and write those that are missing with their timelines and records."""
    run.interruptions.check()
    chunks: list[VideoChunk] = []
    with contextlib.ExitStack() as stack:
        writers = {
            place: stack.enter_context(_writer(member, job.video))
            for member, jobs in step.videos.items()
            for place, job in jobs.items()
        }
        for chunk in _stream(run, step, embeds):
            run.interruptions.check()
            for place, writer in writers.items():
                writer.write(chunk.frames[place])
            run.progress.advance(len(writers) * chunk.frames.shape[1])
            chunks.append(dataclasses.replace(chunk, frames=chunk.frames[:0].copy()))  # a view would keep the pixels
    for member, jobs in step.videos.items():
        write_records(member.plan, run.sweep.budgets[member.variant.name], chunks, jobs, step.size)


def _writer(member: Member, file: str) -> VideoWriter:
    settings = member.plan.settings
    return VideoWriter(member.plan.output / file, settings["height"], settings["width"], settings["fps"])


def _stream(run: Run, step: Step, embeds: Float[Array, "B T D"]) -> Iterator[VideoChunk]:
    """Generate the chunks of all videos of a step; an error names the variants."""
    plan, model = step.members[0].plan, run.model
    frames, size = plan.settings["latent_frames"], (plan.video.latent_height, plan.video.latent_width)
    keys = keys_from_seed(plan.settings["seed"], [job.sample for job in step.jobs])
    try:
        shape = (len(step.jobs), frames, *size, model.config.transformer.in_dim)
        chunks = stream_variants(model, [member.plan.policy for member in step.members], embeds, shape, keys)
        yield from decode_stream(model, chunks, (step.size, *shape[1:]))
    except UserError as error:
        raise UserError(f"{_who(step)}: {error}") from None


def _measure(member: Member, files: list[str], before_each: Callable[[], None] = lambda: None) -> list[Result]:
    """Return the results of those of a variant's videos that were recorded with its settings."""
    settings = json.loads(json.dumps(member.plan.settings))
    folder, records = member.plan.output, outputs.read_records(member.plan.output)
    files = [f for f in files if f in records and records[f]["settings"] == settings and (folder / f).exists()]
    measures = measure_videos(folder, records, files, before_each)
    return [Result(member.variant, folder, records[file], measures[file]) for file in files]


def _report(plan: Sweep, console: Console) -> None:
    """Write tables and report of all videos that are there."""
    results = [
        result for member in plan.members for result in _measure(member, [job.video for job in member.plan.asked])
    ]
    if not results:
        return
    console.print(f"writing the report of {_plural(len(results), 'video')}")
    write_table(plan.output / "results", results_table(results), plan.kind)
    write_table(plan.output / "series", series_table(results), plan.kind)
    write_report(plan.output / "report.html", plan.title, results)
    for name in dict.fromkeys(result.variant.name for result in results):
        link_videos(plan.output / VBENCH / name, [result.path for result in results if result.variant.name == name])
    console.print(f"report.html, results.{plan.kind} and series.{plan.kind} in {plan.output}")
