"""Datasets that take hours to compute: kept batch by batch, so that a build that was stopped goes on.

Beside the dataset's folder DIR, DIR.parts holds `settings.json` and a file a batch until the dataset is written.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rfjax.data.building import FILE_FORMAT, Shard, shards, write_dataset
from rfjax.errors import UserError
from rfjax.io.atomic import replacing, write_json
from rfjax.io.checkpoints import check_output
from rfjax.io.paths import kind_of

Columns = dict[str, np.ndarray]
"""Values of a batch of examples by name, one a row; texts are an array of them."""
Compute = Callable[[str, range], Columns]
"""From a split and the numbers of a batch's examples to the examples."""
Report = Callable[[int, int, int], None]
"""Takes how many examples are kept from earlier runs, done by now, and wanted; after every batch, and when resuming."""

SETTINGS = "settings.json"
COMPRESSED = ("prompt_embeds", "video")
"""Fields that are mostly zeros, or plain."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A dataset to be computed."""

    builder: type["Parts"]
    """Writes the dataset."""
    settings: Mapping[str, Any]
    """All that the examples depend on, JSON-able: parts of other settings are not mixed."""
    splits: Mapping[str, int]
    """Examples of each split."""
    batch_size: int
    """Examples computed together; the last ones of a split may be fewer."""


def write_in_parts(folder: Path, plan: Plan, compute: Compute, report: Report) -> None:
    """Compute what is missing of a dataset and write it to a new folder, which appears only when it is complete.

    Raises:
        UserError: the folder exists and is not empty or cannot be written to, there are parts of another build, the
            disk is full, or an example has numbers that are not finite.
    """
    parts = _open_parts(folder, plan)
    batches = {
        _part(parts, split, batch.start): (split, batch) for split in plan.splits for batch in _batches(plan, split)
    }
    total = sum(plan.splits.values())
    missing = {path: place for path, place in batches.items() if not path.exists()}
    kept = done = total - sum(len(batch) for _, batch in missing.values())
    if kept:
        report(kept, kept, total)
    for path, (split, batch) in missing.items():
        columns = compute(split, batch)
        _check_finite(columns, split, batch)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **columns)  # pyright: ignore[reportArgumentType]
        done += len(batch)
        report(kept, done, total)
    write_dataset(folder, lambda data_dir: plan.builder(parts, plan, data_dir=data_dir))
    shutil.rmtree(parts, ignore_errors=True)


def signature(*files: Path) -> str:
    """Return a short hash of files, by which a part's makings are known again.

    Raises:
        UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()[:16]


class Parts(tfds.core.ShardBasedBuilder):
    """Puts parts together; a dataset is named after the subclass that builds it."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, parts: Path, plan: "Plan", data_dir: Path):
        """Describe the dataset; the features are those of its first part."""
        self._parts, self._plan = parts, plan
        self._read = lru_cache(maxsize=1)(_read)  # examples are asked for in order
        self._first = _read(_part(parts, next(iter(plan.splits)), 0))
        super().__init__(data_dir=data_dir, file_format=FILE_FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: _feature(name, rows) for name, rows in self._first.items()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Shard]]:
        example_bytes = sum(rows[0].nbytes for rows in self._first.values())
        return {
            split: shards(partial(self._example, split), count, example_bytes)
            for split, count in self._plan.splits.items()
        }

    def _example(self, split: str, index: int) -> dict[str, Any]:
        row = index % self._plan.batch_size
        columns = self._read(_part(self._parts, split, index - row))
        return {name: _plain(rows[row]) for name, rows in columns.items()}


def _open_parts(folder: Path, plan: Plan) -> Path:
    target = check_output(folder)
    parts = target.with_name(f"{target.name}.parts")
    wanted = {**plan.settings, "splits": dict(plan.splits), "batch_size": plan.batch_size}
    if kind_of(parts, "the folder of parts") == "missing":
        try:
            parts.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write {parts}: {error.strerror}") from None
    if kind_of(parts / SETTINGS, "the settings") == "missing":
        write_json(parts / SETTINGS, wanted)
    there = _read_settings(parts / SETTINGS)
    for name in (*wanted, *there):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{parts} holds parts of a build with {name} {there.get(name)}, this one has {wanted.get(name)}; "
                "delete it, or give another output"
            )
    return parts


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete its folder, or give another output") from None


def _batches(plan: Plan, split: str) -> Iterator[range]:
    count = plan.splits[split]
    return (range(start, min(start + plan.batch_size, count)) for start in range(0, count, plan.batch_size))


def _part(parts: Path, split: str, first: int) -> Path:
    return parts / f"{split}-{first:08d}.npz"


def _read(path: Path) -> Columns:
    with np.load(path) as columns:
        return dict(columns)


def _feature(name: str, rows: np.ndarray) -> tfds.features.FeatureConnector:
    if rows.dtype.kind == "U":
        return tfds.features.Text()
    encoding = "zlib" if name in COMPRESSED else "none"
    return tfds.features.Tensor(shape=rows.shape[1:], dtype=rows.dtype, encoding=encoding)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, np.str_) else value


def _check_finite(columns: Columns, split: str, batch: range) -> None:
    for name, rows in columns.items():
        if rows.dtype.kind == "f":
            for index, row in zip(batch, rows, strict=True):
                if not np.isfinite(row).all():
                    raise UserError(
                        f"{name} of example {index} of {split} has numbers that are not finite; is the model sound?"
                    )
