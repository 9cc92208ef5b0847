"""The tables of a study: a row a video, a row a second of video, and what the report shows of each variant."""

import csv
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rfjax.errors import UserError
from rfjax.evaluation.measures import SCALARS, SERIES
from rfjax.evaluation.results import Result
from rfjax.io.atomic import replacing

Columns = dict[str, list[Any]]
"""A table by the names of its columns, all equally long; None is an empty cell."""
Format = Literal["csv", "parquet"]


def results_table(results: Sequence[Result]) -> Columns:
    """Return a row a video; `policy.X` is setting X of the policy, empty where a policy has no such setting."""
    rows = [_row(result) for result in results]
    settings = sorted({key for row in rows for key in row if key.startswith("policy.")})
    first, last = ("variant", "policy"), [key for key in rows[0] if key not in settings][2:] if rows else []
    return {name: [_cell(row.get(name)) for row in rows] for name in (*first, *settings, *last)}


def _row(result: Result) -> dict[str, Any]:
    record = result.record
    policy = dict(record["settings"]["policy"])
    return {
        "variant": result.variant.name,
        "policy": policy.pop("name"),
        **{f"policy.{key}": value for key, value in policy.items()},
        "prompt": record["prompt"],
        "sample": record["sample"],
        "file": f"{result.folder.name}/{record['file']}",
        "frames": record["video"]["frames"],
        "seconds": record["video"]["seconds"],
        **{quantity.name: getattr(result.measures, quantity.name) for quantity in SCALARS},
        "attended_frames": record["attended_frames"],
        "seconds_per_chunk": result.chunk_seconds,
        "videos_together": record["timings"]["batch_size"],
    }


def series_table(results: Sequence[Result]) -> Columns:
    """Return a row a second of each video."""
    names = [quantity.name for quantity in SERIES]
    columns: Columns = {name: [] for name in ("variant", "prompt", "sample", "file", "second")}
    columns |= {name.removesuffix("_series"): [] for name in names}
    for result in results:
        series = [getattr(result.measures, name).tolist() for name in names]
        for second, values in enumerate(zip(*series, strict=True)):
            video = (result.variant.name, result.record["prompt"], result.record["sample"])
            file = f"{result.folder.name}/{result.record['file']}"
            for column, value in zip(columns.values(), (*video, file, second, *values), strict=True):
                column.append(_cell(value))
    return columns


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def check_format(kind: Format) -> None:
    """Check that tables of this kind can be written.

    Raises:
        UserError: pyarrow is needed and not installed.
    """
    if kind == "parquet":
        _pyarrow()


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], kind: Format) -> None:
    """Write a table beside `path`, with the ending of its kind, and remove one of the other kind.

    Raises:
        UserError: the file cannot be written, or pyarrow is needed and not installed.
    """
    write = {"csv": _write_csv, "parquet": _write_parquet}
    with replacing(path.with_name(f"{path.name}.{kind}")) as temporary:
        write[kind](temporary, columns)
    for other in write.keys() - {kind}:
        path.with_name(f"{path.name}.{other}").unlink(missing_ok=True)


def _write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    pyarrow = _pyarrow()
    # A column without any value would have a type of its own, which no other table's can be joined to.
    kinds = {name: pyarrow.float64() for name, values in columns.items() if all(value is None for value in values)}
    arrays = {name: pyarrow.array(_alike(values), kinds.get(name)) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), str(path))


def _alike(values: Sequence[Any]) -> list[Any]:
    """Return values of one type, as a column of Parquet must have: text where policies differ in it."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return [None if value is None else float(value) for value in values]
    return list(values) if len(kinds) <= 1 else [None if value is None else str(value) for value in values]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('--format parquet needs pyarrow; pip install "rfjax[study]"') from None
    return pyarrow


@dataclasses.dataclass(frozen=True)
class Spread:
    """A quantity over the videos of a variant."""

    mean: float
    """NaN where it is known for none."""
    deviation: float
    """Standard deviation, of a sample; NaN where it is known for fewer than two."""


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of what is not NaN."""
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return Spread(mean, statistics.stdev(known) if len(known) > 1 else math.nan)


def scalars(results: Sequence[Result], name: str) -> dict[str, list[float]]:
    """Return one scalar of `Measures` of each variant's videos."""
    return {variant: [getattr(v.measures, name) for v in videos] for variant, videos in by_variant(results).items()}


def paired_scalars(results: Sequence[Result], name: str) -> dict[str, list[float]]:
    """Return the same without what a video has in common under all variants, which is its prompt's and its noise's.

    The mean over all is added again, so that a variant with every video keeps its mean (Cousineau, "Confidence
    intervals in within-subject designs", 2005).
    """
    values: dict[Any, list[float]] = {}
    for result in results:
        values.setdefault(_video(result), []).append(getattr(result.measures, name))
    means = {video: spread(given).mean for video, given in values.items()}
    overall = spread(list(means.values())).mean
    return {
        variant: [getattr(v.measures, name) - means[_video(v)] + overall for v in videos]
        for variant, videos in by_variant(results).items()
    }


def _video(result: Result) -> tuple[str, int]:
    return result.record["prompt"], result.record["sample"]


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Sort videos by the names of their variants, in the order of the study."""
    videos: dict[str, list[Result]] = {}
    for result in results:
        videos.setdefault(result.variant.name, []).append(result)
    return videos
