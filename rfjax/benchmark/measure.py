"""One run of the benchmark: everything is compiled, then measured in turns."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rfjax.benchmark import build
from rfjax.benchmark.build import Part, Setup
from rfjax.benchmark.timing import in_turns
from rfjax.errors import UserError
from rfjax.memory import Footprint, MemoryPolicy, MemoryShape, footprint
from rfjax.models.functional import abstract_params
from rfjax.models.text_encoder import UMT5Encoder
from rfjax.sampling.budget import GB, VideoShape, estimate
from rfjax.sampling.state import memory_shape

TEXT_ENCODER_ON_CPU = 10**9
"""Bytes of weights up to which the text encoder is measured on a CPU."""

LESS_MEMORY = "try --preset small, --dtype bfloat16, fewer policies or a smaller --batch-size"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A finished run."""

    setup: Setup
    parts: dict[tuple[str | None, str], Part]
    """By policy (None for what all share) and name."""
    seconds: dict[tuple[str | None, str], list[float]]
    """Of every run of each part."""
    footprints: dict[str, Footprint]
    """Memory of each policy."""
    growing: set[str]
    """Policies that keep more the longer the video is."""
    skipped: dict[str, str]
    """Parts that were left out, and why."""


def measure(setup: Setup, report: Callable[[str], None]) -> Measurement:
    """Measure all parts of all policies; `report` is told what is being done.

    Raises:
        UserError: a policy's settings do not fit the sizes, or the device's memory does not suffice.
    """
    shape = memory_shape(setup.subject.config, setup.batch, setup.subject.frame_size)
    growing = {name for name, policy in setup.policies.items() if _grows(policy, shape)}
    skipped = _skipped(setup, needed_memory(setup))
    report("drawing random weights")
    weights, text = build.network_of(setup)
    shared = [build.text_context_part(setup, weights), build.decode_part(setup)]
    if build.TEXT_ENCODER not in skipped:
        shared.insert(0, build.text_encoder_part(setup))
    of_policies = []
    for name, policy in setup.policies.items():
        report(f"compiling {name}")
        of_policies += build.policy_parts(setup, name, policy, weights, text, early=name not in growing)
    # The same part of every policy, then the next part: what is compared runs side by side.
    of_policies.sort(key=lambda part: build.PER_POLICY.index(part.name))
    parts = {(part.policy, part.name): part for part in (*shared, *of_policies)}
    seconds = in_turns(
        {key: part.task for key, part in parts.items()},
        {key: part.repeats for key, part in parts.items()},
        lambda number, last: report(f"round {number} of {last}" if number else "warming up"),
    )
    frames, dtype = setup.subject.preset.latent_frames, jnp.dtype(setup.dtype)
    footprints = {name: footprint(policy, shape, frames, dtype) for name, policy in setup.policies.items()}
    return Measurement(setup, parts, seconds, footprints, growing, skipped)


def needed_memory(setup: Setup) -> int:
    """Return about how many bytes the run needs, the text encoder aside.

    Raises:
        UserError: the device has fewer, or a policy's settings do not fit the sizes.
    """
    subject = setup.subject
    config = dataclasses.replace(subject.config, umt5=None)
    video = VideoShape(setup.batch, subject.preset.latent_frames, *subject.frame_size)
    budgets = [estimate(config, policy, video, setup.dtype) for policy in setup.policies.values()]
    memory = sum(2 * budget.memory for budget in budgets)  # an early and a late one of each policy
    needed = budgets[0].weights + memory + max(budget.working for budget in budgets)
    if setup.limit is not None and needed > setup.limit:
        raise UserError(
            f"this benchmark needs about {needed / GB:.1f} GB of device memory (weights {budgets[0].weights / GB:.1f}, "
            f"two memories of each policy {memory / GB:.1f}) and there are {setup.limit / GB:.1f} GB; "
            f"{LESS_MEMORY}"
        )
    return needed


def _grows(policy: MemoryPolicy, shape: MemoryShape) -> bool:
    short, long = ((chunk + 1) * shape.chunk_frames for chunk in (build.EARLY_CHUNK, build.LATE_CHUNK))
    sizes = [footprint(policy, shape, frames, jnp.float32).state_bytes for frames in (short, long)]
    return sizes[1] > sizes[0]


def _skipped(setup: Setup, needed: int) -> dict[str, str]:
    """Say what is left out: the text encoder, where its weights are too much."""
    weights = abstract_params(UMT5Encoder, setup.subject.config.umt5, jnp.dtype(setup.dtype))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    if jax.default_backend() == "cpu" and size > TEXT_ENCODER_ON_CPU:
        return {build.TEXT_ENCODER: f"its {size / GB:.1f} GB of weights are run on accelerators only"}
    if setup.limit is not None and needed + 1.2 * size > setup.limit:
        return {build.TEXT_ENCODER: f"its {size / GB:.1f} GB of weights do not fit beside the rest"}
    return {}
