"""What is written beside the videos: timelines, and records of how each was made."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import jax
import numpy as np

from rfjax.commands.plan import Plan
from rfjax.io import outputs
from rfjax.io.reports import report_folder
from rfjax.memory import Trace
from rfjax.sampling.budget import Budget
from rfjax.sampling.jobs import Job
from rfjax.sampling.pipeline import VideoChunk
from rfjax.version import rfjax_version

_TITLE = 68
"""Characters that fit above a timeline."""


def write_records(
    plan: Plan, budget: Budget, chunks: Sequence[VideoChunk], jobs: Mapping[int, Job], batch_size: int
) -> None:
    """Draw the timelines of finished videos and write their records.

    Args:
        plan: that the videos belong to, with their length.
        budget: of the run.
        chunks: of the batch that they were made in; their pixels are not looked at.
        jobs: the videos, by their place in the batch.
        batch_size: videos made together.

    Raises:
        UserError: something cannot be written.
    """
    trace = jax.tree.map(lambda *parts: np.stack(parts), *(chunk.trace for chunk in chunks))
    with outputs.updating(report_folder(plan.output, plan.processes.index)) as records:
        for index, job in jobs.items():
            timeline = outputs.timeline_name(records, job.prompt, job.sample, plan.processes.index == 0)
            _draw_timeline(plan, trace, index, job, timeline)
            records[job.video] = _record(plan, budget, chunks, index, job, timeline, batch_size)


def _draw_timeline(plan: Plan, trace: Trace, index: int, job: Job, name: str) -> None:
    """Draw what one video attended."""
    from rfjax.io.plots import memory_timeline  # imports Matplotlib, which the first chunk need not wait for

    title = f"{plan.policy.name}: {job.prompt}"
    memory_timeline(
        trace,
        plan.config.chunk_frames,
        plan.output / name,
        title if len(title) <= _TITLE else f"{title[:_TITLE]} ...",
        sample=index,
        seconds_per_frame=plan.seconds_per_latent,
    )


def _record(
    plan: Plan, budget: Budget, chunks: Sequence[VideoChunk], index: int, job: Job, timeline: str, batch_size: int
) -> outputs.Record:
    """Everything that is written about a video."""
    seconds = [chunk.seconds for chunk in chunks]
    selected = [np.unique(np.asarray(chunk.trace.selected_frames)[index]) for chunk in chunks]
    later_frames = (plan.chunks - 1) * plan.config.chunk_frames * plan.vae.temporal_factor * batch_size
    device = jax.devices()[0]
    return {
        "file": job.video,
        "timeline": timeline,
        "prompt": job.prompt,
        "sample": job.sample,
        "settings": plan.settings,
        "video": {
            "frames": plan.video_frames,
            "seconds": plan.video_frames / plan.settings["fps"],
            "chunk_latent_frames": plan.config.chunk_frames,
        },
        "model": {
            "path": str(plan.checkpoint.resolve()),
            "description": plan.config.description,
            "parameters": budget.parameters,
        },
        "attended_frames": budget.attended_frames,
        "selected_frames": [frames[frames >= 0].tolist() for frames in selected],
        "timings": {
            "batch_size": batch_size,
            "seconds": round(sum(seconds), 3),
            "first_chunk_seconds": round(seconds[0], 3),
            "frames_per_second": round(later_frames / sum(seconds[1:]), 3) if seconds[1:] else None,
            "chunk_seconds": [round(value, 4) for value in seconds],
        },
        "device": {"kind": device.device_kind, "platform": device.platform},
        "versions": {
            "rfjax": rfjax_version(),
            "jax": jax.__version__,
            "flax": version("flax"),
            "python": platform.python_version(),
        },
    }
