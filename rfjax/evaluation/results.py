"""The videos of a study with what was recorded and measured of each; measures are kept beside the videos."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rfjax.evaluation.measures import SCALARS, SERIES, Measures, measure
from rfjax.evaluation.study import Variant
from rfjax.io.atomic import write_json
from rfjax.io.outputs import Record
from rfjax.io.video_reader import read_frames
from rfjax.version import rfjax_version

MEASURES = "measures.json"
"""File in a variant's folder: of each video its measures, and which making of it they belong to."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One video."""

    variant: Variant
    folder: Path
    """Of the variant."""
    record: Record
    """What `rfjax generate` writes about it."""
    measures: Measures

    @property
    def path(self) -> Path:
        """The video file."""
        return self.folder / self.record["file"]

    @property
    def chunk_seconds(self) -> float:
        """Seconds for a chunk of this video: the median chunk after the first, shared among all made together."""
        later = self.record["timings"]["chunk_seconds"][1:]
        return median(later) / self.record["timings"]["batch_size"] if later else math.nan

    @property
    def selected_distances(self) -> list[int]:
        """Latent frames from each frame that was chosen by score to the chunk that chose it."""
        chunk_frames = self.record["video"]["chunk_latent_frames"]
        chunks = enumerate(self.record["selected_frames"])
        return [chunk * chunk_frames - frame for chunk, frames in chunks for frame in frames]


def measure_videos(
    folder: Path, records: Mapping[str, Record], files: Sequence[str], before_each: Callable[[], None] = lambda: None
) -> dict[str, Measures]:
    """Return the measures of a folder's videos, computed where the folder does not have them.

    Args:
        folder: of one variant.
        records: its records, by file name.
        files: names of the videos to be measured.
        before_each: called before each video that has to be measured; it may raise.

    Raises:
        UserError: a video cannot be read, the measures cannot be written, or OpenCV is not installed.
    """
    kept = _read(folder / MEASURES)
    found = {}
    for file in files:
        key = _key(records[file])
        entry = kept.get(file)
        if entry is None or entry["key"] != key:
            before_each()
            frames = read_frames(folder / file)
            entry = kept[file] = {"key": key, **_plain(measure(frames, frames.fps))}
            write_json(folder / MEASURES, kept)
        found[file] = _measures(entry)
    return found


def _key(record: Record) -> str:
    """Tell one making of a video, measured by one version of rfjax, from all others."""
    text = json.dumps([record, rfjax_version()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(measures: Measures) -> dict[str, Any]:
    """Return the fields for JSON, which has no NaN."""
    values = {quantity.name: [getattr(measures, quantity.name)] for quantity in SCALARS}
    values |= {quantity.name: getattr(measures, quantity.name).tolist() for quantity in SERIES}
    return {name: [None if math.isnan(value) else value for value in given] for name, given in values.items()}


def _measures(entry: Mapping[str, Any]) -> Measures:
    numbers = {
        name: np.array([math.nan if value is None else value for value in entry[name]], float)
        for name in (quantity.name for quantity in (*SCALARS, *SERIES))
    }
    fields: dict[str, Any] = numbers | {quantity.name: float(numbers[quantity.name][0]) for quantity in SCALARS}
    return Measures(**fields)


def _read(path: Path) -> dict[str, Any]:
    """Return what is kept in a folder; what is missing or damaged is measured again."""
    wanted = {"key", *(quantity.name for quantity in (*SCALARS, *SERIES))}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {file: entry for file, entry in kept.items() if entry.keys() == wanted}
    except (OSError, ValueError, AttributeError):
        return {}
