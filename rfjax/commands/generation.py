"""What `rfjax generate` does once its flags are read: checks, then batches of videos, then their records."""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator

import jax
from jaxtyping import Array
from rich.console import Console

from rfjax.commands.interruptions import Interruptions
from rfjax.commands.keeping import Keeper, as_kept, discard
from rfjax.commands.meshes import budget_of, idle, mesh_of, on_mesh
from rfjax.commands.plan import Plan, make_plan
from rfjax.commands.production import Run, produce
from rfjax.commands.progress import ChunkProgress
from rfjax.commands.prompt_schedule import ScheduledPrompt
from rfjax.errors import UserError
from rfjax.io import outputs
from rfjax.io.checkpoints import TOKENIZER, load
from rfjax.io.entries import Entry
from rfjax.io.manifest import JOBS, Manifest, read_jobs
from rfjax.io.mirrors import Destination, destination
from rfjax.io.ownership import owning
from rfjax.io.prompts import Request
from rfjax.io.reports import check_alone, forget_report, merge, remove_working_folders, report_folder
from rfjax.models.model import Model
from rfjax.models.tokenizer import Tokenizer
from rfjax.parallel.processes import ALONE, Processes, RollCall, detect
from rfjax.sampling.budget import GB, Budget, check_fits, device_limit, needs, out_of_memory_says
from rfjax.sampling.codec import encode_prompt
from rfjax.sampling.jobs import Job
from rfjax.sampling.switching import Switch


def generate(args: argparse.Namespace, requests: list[Request], schedule: list[ScheduledPrompt]) -> None:
    """Make the videos that the output folder lacks.

    Raises:
        UserError: an input is wrong, and nothing has been written; or videos failed, and the others are complete.
    """
    processes = who(args)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=processes.index > 0)
    try:
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(destination(args.output, processes.index, processes.count))
            plan, budget, limit = prepare(args, requests, schedule, console, place, processes)
            stack.enter_context(_alone(plan))
            opened = stack.pop_all()
    except Exception as error:
        RollCall(processes, args.processes_timeout).withdraw(str(error))
        raise

    def merge_what_is_left() -> None:
        merge(plan.output)
        place.sync()

    # All have looked at the folder before anyone writes, so that all divide the same videos.
    roll_call = RollCall(processes, args.processes_timeout, merge_what_is_left)
    with opened, roll_call as together, out_of_memory_says(needs(budget, limit)):
        _make(args, plan, budget, console, together, place)


@contextlib.contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Keep the folder for this process, or its part of the folder; one that was made and stays empty is removed.

    Raises:
        UserError: another run works in the folder, or it cannot be made.
    """
    own = report_folder(plan.output, plan.processes.index)
    new = not own.exists()
    outputs.make_folder(own)
    try:
        with owning(own):
            if plan.processes.index == 0:
                check_alone(plan.output, plan.processes.count)
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                own.rmdir()


def _make(
    args: argparse.Namespace, plan: Plan, budget: Budget, console: Console, together: RollCall, place: Destination
) -> None:
    """Make this process's videos, and, in process 0, collect what the others report."""
    first, failure = plan.processes.index == 0, ""
    if not first:
        forget_report(plan.output, plan.processes.index)
    try:
        if plan.missing:
            _make_share(args, plan, budget, _load(plan), console)
        elif first:
            Manifest(plan.output, _entries(plan))
    except UserError as error:
        if not first:
            raise
        failure = str(error)
    finally:
        if not first:
            place.sync()  # before process 0 hears of the end
    if first:
        _collect(plan, together, failure, place)


def who(args: argparse.Namespace) -> Processes:
    """Return the processes that `--processes` names."""
    return detect(args.processes_timeout) if args.processes is None else args.processes


def _collect(plan: Plan, together: RollCall, failure: str, place: Destination) -> None:
    """Wait, in process 0, for the others, and merge what they report.

    Raises:
        UserError: this process or another has failed.
    """
    failures = together.failures()
    place.sync()
    merge(plan.output)
    if all(entry["state"] == "done" for entry in read_jobs(plan.output).values()):
        remove_working_folders(plan.output)
    place.sync()  # before the others hear that all is well
    others = "; ".join(f"process {index}: {reason}" for index, reason in failures.items())
    if failure or others:
        raise UserError("; ".join(filter(None, (failure, others))))


def prepare(
    args: argparse.Namespace,
    requests: list[Request],
    schedule: list[ScheduledPrompt],
    console: Console,
    place: Destination,
    processes: Processes = ALONE,
) -> tuple[Plan, Budget, int | None]:
    """Plan a run and say what it is, and check all that can be checked before weights are read.

    Returns:
        The plan, what it needs on a device, and the bytes that a device has, if known.

    Raises:
        UserError: an input is wrong; nothing has been written.
    """
    limit = device_limit(jax.local_devices()[0])
    args = argparse.Namespace(**{**vars(args), "output": place.folder})
    plan = on_mesh(make_plan(args, requests, schedule, processes), args.mesh, args.batch_size, limit)
    plan, places = dataclasses.replace(plan, place=place.name), plan.places
    plan = plan if args.overwrite else as_kept(plan)
    budget = budget_of(plan)
    for line in _introduction(plan, budget, limit):
        console.print(line)
    if plan.missing:
        _check_fits(plan, budget, limit, plan.places != places)
        prompts = [job.prompt for job in plan.missing] + [entry.prompt for entry in plan.schedule.values()]
        check_prompts(plan, prompts)
    return plan, budget, limit


def _check_fits(plan: Plan, budget: Budget, limit: int | None, kept: bool) -> None:
    try:
        check_fits(budget, limit)
    except UserError as error:
        if not kept:
            raise
        raise UserError(
            f"{plan.place} keeps the state of {plan.places} videos that are made together, which need as many devices "
            f"or as much memory as before ({error}); --overwrite begins anew"
        ) from None


def _load(plan: Plan) -> Model:
    dtype, sharded = plan.settings["dtype"], plan.mesh.fully_sharded
    return load(plan.checkpoint, dtype, mesh=mesh_of(plan), fully_sharded=sharded)


def _make_share(args: argparse.Namespace, plan: Plan, budget: Budget, model: Model, console: Console) -> None:
    """Make this process's videos.

    Raises:
        UserError: a file cannot be written, or videos failed twice.
    """
    outputs.remove_stale(plan.output)
    if args.overwrite:
        discard(plan)
    done: list[Job] = []
    manifest = Manifest(report_folder(plan.output, plan.processes.index), _entries(plan))
    try:
        with (
            Interruptions() as interruptions,
            ChunkProgress(console) as progress,
            Keeper(plan, args.checkpoint_every or 0) as keeper,
        ):
            encoded = functools.lru_cache(plan.places)(lambda prompt: encode(model, [prompt]))
            switches = encode_switches(plan, model)
            run = Run(plan, budget, model, encoded, switches, progress, interruptions, manifest, keeper, done)
            failures = produce(run)
    except KeyboardInterrupt as interruption:
        complete = f"; {len(done)} of {len(plan.missing)} videos are complete in {plan.place}"
        raise type(interruption)(complete) from None
    finally:
        manifest.stop()
    if failures:
        job, reason = next(iter(failures.items()))
        others = f"; so did {len(failures) - 1} others, see {JOBS}" if len(failures) > 1 else ""
        raise UserError(f"{job.video} failed twice: {reason}{others}; {len(done)} of {len(plan.missing)} are complete")
    made = plan.missing[0].video if len(plan.missing) == 1 else f"{len(plan.missing)} videos"
    console.print(f"{made} in {plan.place}")


def _entries(plan: Plan) -> list[Entry]:
    """Return what this process's manifest says of videos when a run begins: the first's of all that are asked for."""
    missing = {*plan.missing, *plan.elsewhere}
    return [
        {
            "file": job.video,
            "prompt": job.prompt,
            "sample": job.sample,
            "chunks": plan.of(job).chunks,
            "state": "pending" if job in missing else "done",
        }
        for job in (plan.missing if plan.processes.index else plan.asked)
    ]


def _introduction(plan: Plan, budget: Budget, limit: int | None) -> list[str]:
    """Say what is about to be computed; the first line has device, model, policy, attended frames and memory."""
    settings = plan.settings
    there = "" if limit is None else f" of {gb(limit)}"
    count = plan.mesh.devices
    each = ", on each device" if count > 1 else ""
    lines = [
        f"{device_name(count)}: {plan.checkpoint.name} ({short_count(budget.parameters)} parameters, "
        f"{settings['dtype']}), {plan.policy.name} attending to {budget.attended_frames} latent frames, "
        f"memory {gb(budget.memory)} GB ({gb(budget.total)}{there} GB in all{each})"
    ]
    if plan.mesh.group > 1:
        cut = ", parameters cut over both" if plan.mesh.fully_sharded else ""
        lines.append(f"mesh {plan.mesh}: {plan.mesh.group} devices make each video together{cut}")
    if plan.missing and plan.sampler == "chunk" and idle(plan):
        without = "1 device has" if idle(plan) == 1 else f"{idle(plan)} devices have"
        lines.append(f"{without} no video to make; with --mesh sequence=N, N devices make each video together")
    if plan.config.description:
        lines.append(f"note: {plan.config.description}")
    if finished := len(plan.asked) - len(plan.missing) - len(plan.elsewhere):
        lines.append(
            f"{finished} of {len(plan.asked)} videos are in {plan.place} already (--overwrite makes them anew)"
        )
    if plan.unrecorded:
        lines.append(f"left as they are, though {outputs.METADATA} does not know them: {', '.join(plan.unrecorded)}")
    if plan.missing:
        lines.append(_size(plan))
    if plan.elsewhere:
        lines.append(f"{len(plan.elsewhere)} others by the other {plan.processes.count - 1} processes")
    if plan.missing and plan.schedule:
        lines.append(_changes(plan))
    return lines


def _changes(plan: Plan) -> str:
    """Say when the prompt changes, in the seconds at which chunks begin."""
    factor, fps = plan.vae.temporal_factor, plan.settings["fps"]
    times = [f"{(1 + factor * (frame - 1)) / fps:.4g}{' (cut)' * entry.cut}" for frame, entry in plan.schedule.items()]
    return f"prompt changes ({plan.settings['prompt_switch']}) at {', '.join(times)} s"


def _size(plan: Plan) -> str:
    """Say how many videos of which sizes are to be made."""
    settings, fps, count = plan.settings, plan.settings["fps"], len(plan.missing)
    shortest, longest = plan.of(plan.queue[-1]), plan.of(plan.queue[0])

    def between(measure: Callable[[Plan], float]) -> str:
        return " to ".join(dict.fromkeys(f"{measure(each):.4g}" for each in (shortest, longest)))

    whole = plan.asked_seconds in (None, longest.video_frames / fps)
    rounded = "" if whole else f", {plan.asked_seconds:g} s rounded up to whole chunks"
    return (
        f"{count} video{'s' * (count > 1)} of {settings['height']}x{settings['width']} pixels, "
        f"{between(lambda each: each.video_frames)} frames, {between(lambda each: each.video_frames / fps)} s at "
        f"{fps} fps: {between(lambda each: each.settings['latent_frames'])} latent frames in "
        f"{between(lambda each: each.chunks)} chunks{rounded}"
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


def encode_switches(plan: Plan, model: Model) -> list[Switch]:
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
