"""The finished chunks of a video that is not finished, so that it can be gone on with.

A video file cannot be: the state of its encoder is out of reach. A reel has a file a chunk, whole or absent.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rfjax.errors import UserError
from rfjax.io.atomic import replacing


class DamagedReelError(UserError):
    """A chunk is missing or cannot be read."""


class Reel:
    """The chunks of one video, each a set of named arrays."""

    def __init__(self, folder: Path):
        """Name the folder; nothing is made before the first chunk."""
        self._folder = folder

    def add(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a chunk, in place of one with the same index.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self._folder}: {error.strerror}") from None
        with replacing(self._path(index)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    def chunks(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """Read the first chunks.

        Raises:
            DamagedReelError: one is missing or damaged.
        """
        for index in range(count):
            try:
                with open(self._path(index), "rb") as file, np.load(file) as stored:
                    yield dict(stored)
            except Exception as error:  # neither NumPy nor zipfile says what it may raise
                raise DamagedReelError(f"{self._path(index)} cannot be read: {error}") from None

    def remove(self) -> None:
        """Remove all chunks."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.npz"
