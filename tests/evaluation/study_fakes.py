"""Results of studies that nobody made: numbers that follow from the variant, and one real video for all."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rfjax.evaluation.measures import SCALARS, SERIES, Measures
from rfjax.evaluation.results import Result
from rfjax.evaluation.study import Study, Variant, expand_variants
from rfjax.io.video import VideoWriter

SECONDS = 4


def variants_of(*policies: dict[str, Any]) -> list[Variant]:
    study = Study.from_dict({"prompts": ["a cat"], "policies": list(policies)})
    return expand_variants(study, Path("study.yaml"))


def measures_of(level: float, seconds: int = SECONDS) -> Measures:
    fields: dict[str, Any] = {quantity.name: float(level) for quantity in SCALARS}
    fields |= {quantity.name: level + np.arange(seconds, dtype=float) for quantity in SERIES}
    fields["repetition_series"] = np.where(np.arange(seconds) < 2, np.nan, float(level))
    return Measures(**fields)


def record_of(variant: Variant, prompt: str, sample: int, **changes: Any) -> dict[str, Any]:
    return {
        "file": "video.mp4",
        "timeline": "memory_timeline.png",
        "prompt": prompt,
        "sample": sample,
        "settings": {
            "policy": {"name": variant.policy.name, **dataclasses.asdict(variant.policy)},  # pyright: ignore
            **{"height": 32, "width": 48, "fps": 8, "latent_frames": 12, "seed": 0, "dtype": "float32"},
        },
        "video": {"frames": 32, "seconds": 4.0, "chunk_latent_frames": 3},
        "model": {"path": "/models/toy", "description": "random weights"},
        "attended_frames": 7,
        "selected_frames": [[], [], [2], [3, 5]] if variant.policy.name == "relax_forcing" else [[], [], [], []],
        "timings": {"chunk_seconds": [9.0, 1.0, 2.0, 6.0], "batch_size": 2},
        "device": {"kind": "cpu"},
        "versions": {"rfjax": "1", "jax": "2"},
        **changes,
    }


def results_of(
    variants: list[Variant], folder: Path = Path(), prompts: tuple[str, ...] = ("a cat", "a dog")
) -> list[Result]:
    """Two videos a variant; the n-th variant's measures are about n."""
    return [
        Result(variant, folder, record_of(variant, prompt, 0), measures_of(number + 0.25 * place))
        for number, variant in enumerate(variants)
        for place, prompt in enumerate(prompts)
    ]


def make_video(folder: Path, frames: int = 33) -> None:
    """A picture that grows brighter, and a file in place of the timeline."""
    with VideoWriter(folder / "video.mp4", 32, 48, 8) as writer:
        for level in np.linspace(20, 220, frames):
            writer.write(np.full((1, 32, 48, 3), int(level), np.uint8))
    (folder / "memory_timeline.png").write_bytes(b"\x89PNG timeline")
