"""What a measurement says, as plain values for JSON and as sentences."""

import dataclasses
import statistics
from typing import Any

from rfjax.benchmark import build
from rfjax.benchmark.machine import peak_flops, process_memory, program_memory, this_machine
from rfjax.benchmark.measure import Measurement
from rfjax.benchmark.timing import ratio


def summarise(measurement: Measurement) -> dict[str, Any]:
    """Return everything that was found out; the keys are explained in docs/benchmarks.md."""
    setup, subject = measurement.setup, measurement.setup.subject
    machine = this_machine()
    return {
        "machine": dataclasses.asdict(machine),
        "peak_flops": peak_flops(machine.device, setup.dtype),
        "settings": {
            "preset": subject.preset.to_dict(),
            "model": subject.config.to_dict(),
            "dtype": setup.dtype,
            "batch_size": setup.batch,
            "repeats": setup.repeats,
        },
        "shared": {name: _part(measurement, None, name) for name in _names(measurement, None)},
        "skipped": measurement.skipped,
        "policies": {name: _policy(measurement, name) for name in setup.policies},
        "ratios": _ratios(measurement),
        "memory": process_memory(),
    }


def _names(measurement: Measurement, policy: str | None) -> list[str]:
    return [name for owner, name in measurement.parts if owner == policy]


def _part(measurement: Measurement, policy: str | None, name: str) -> dict[str, Any]:
    part, seconds = measurement.parts[policy, name], measurement.seconds[policy, name]
    median = statistics.median(seconds)
    return {
        "seconds": median * part.calls,
        "per": "video" if name in build.PER_VIDEO else "chunk",
        "calls": part.calls,
        "call_seconds": median,
        "call_flops": part.flops,
        "flops_per_second": None if part.flops is None else part.flops / median,
        "compile_seconds": part.compiled.seconds,
        "runs": seconds,
    }


def _policy(measurement: Measurement, name: str) -> dict[str, Any]:
    setup, subject = measurement.setup, measurement.setup.subject
    assert subject.config.vae is not None
    parts = {part: _part(measurement, name, part) for part in _names(measurement, name)}
    shared = {part: _part(measurement, None, part) for part in _names(measurement, None)}
    factor = subject.config.vae.temporal_factor
    chunk, decode = parts[build.STEP]["seconds"], shared[build.DECODE]["seconds"]
    text = sum(shared[part]["seconds"] for part in build.PER_VIDEO if part in shared)
    video_frames = 1 + factor * (subject.preset.latent_frames - 1)
    return {
        "settings": dataclasses.asdict(setup.policies[name]),  # pyright: ignore[reportArgumentType]
        **dataclasses.asdict(measurement.footprints[name]),
        "parts": parts,
        "frames_per_second": {
            "end_to_end": setup.batch * video_frames / (text + subject.chunks * (chunk + decode)),
            "rollout": setup.batch * factor * subject.config.chunk_frames / chunk,
        },
        "compile_seconds": parts[build.STEP]["compile_seconds"],
        "chunk_memory": program_memory(measurement.parts[name, build.STEP].compiled.call),
        "memory_grows": name in measurement.growing,
        "late_over_early": None
        if name in measurement.growing
        else ratio(measurement.seconds[name, build.STEP], measurement.seconds[name, build.EARLY_STEP]),
    }


def _ratios(measurement: Measurement) -> list[dict[str, Any]]:
    """How much faster the first policy is than each other one."""
    first, *others = measurement.setup.policies
    return [
        {"policy": first, "against": other}
        | {
            part: ratio(measurement.seconds[other, part], measurement.seconds[first, part])
            for part in (build.SELF_ATTENTION, build.DENOISE, build.STEP)
        }
        for other in others
    ]


def verdicts(summary: dict[str, Any]) -> list[str]:
    """Say in a sentence each what the numbers mean."""
    policies = summary["policies"]
    lines = []
    for pair in summary["ratios"]:
        first, other = pair["policy"], pair["against"]
        frames = f"{policies[first]['attended_frames']} against {policies[other]['attended_frames']} frames"
        lines.append(f"Self-attention: {first} {_faster(pair[build.SELF_ATTENTION])} {other} ({frames}).")
        lines.append(f"Rollout: {first} {_faster(pair[build.STEP])} {other}.")
    for name, policy in policies.items():
        if policy["memory_grows"]:
            lines.append(f"{name} keeps every frame: its memory and its chunks grow with the video.")
        else:
            lines.append(
                f"{name}: chunk {build.LATE_CHUNK} costs {policy['late_over_early']:.2f} times chunk "
                f"{build.EARLY_CHUNK}, in the same memory."
            )
    return lines


def _faster(times: float) -> str:
    return f"is {times:.2f} times faster than" if times >= 1 else f"is {1 / times:.2f} times slower than"
