"""Datasets written as a whole and quietly, with `tensorflow-datasets` but without TensorFlow.

Builders are `ShardBasedBuilder`s: a `GeneratorBasedBuilder` keeps all examples in memory, and from 1 GB on calls
TensorFlow to shuffle them on disk.
"""

import contextlib
import io
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rfjax.io.checkpoints import write_folder

FILE_FORMAT = "array_record"
SHARD_BYTES = 2**28
"""Of examples before compression: the library keeps a shard's in memory until it is written."""
Shard = Callable[[], Iterator[tuple[int, dict[str, Any]]]]
"""Yields the examples of a file, each with its number."""


def shards(example: Callable[[int], dict[str, Any]], count: int, example_bytes: int) -> list[Shard]:
    """Divide examples among files, in order.

    Args:
        example: makes the example of a number.
        count: of examples.
        example_bytes: size of one, before compression.
    """
    step = max(1, SHARD_BYTES // example_bytes)
    return [partial(_shard, example, range(first, min(first + step, count))) for first in range(0, count, step)]


def _shard(example: Callable[[int], dict[str, Any]], numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in numbers:
        yield number, example(number)


def write_dataset(folder: Path, make_builder: Callable[[Path], tfds.core.ShardBasedBuilder]) -> None:
    """Build a dataset in a new folder, which appears only when it is complete.

    Args:
        folder: to be created; holds the dataset itself, without folders for its name and version.
        make_builder: returns the builder for a `data_dir`; its file format has to be `FILE_FORMAT`.

    Raises:
        UserError: the folder exists and is not empty, cannot be written to, or the disk is full.
    """

    def write(temporary: Path) -> None:
        workshop = temporary / "building"
        with _quiet():
            builder = make_builder(workshop)
            try:
                builder.download_and_prepare()
            except RuntimeError as error:  # how array_record says that the disk is full
                failed = re.match(r"write\(\) failed: ([^;]+)", str(error))
                raise OSError(failed[1]) if failed else error from None
        for file in sorted(Path(builder.data_path).iterdir()):
            file.rename(temporary / file.name)
        shutil.rmtree(workshop)

    write_folder(folder, write)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's bars, its account of a download and its remarks on configurations."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
