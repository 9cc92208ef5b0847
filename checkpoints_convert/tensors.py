"""Where a tensor lies in a file, without its values."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
"""Types that a checkpoint may hold; of these, parameters may have the first three."""


_MAX_AXES = 32
_MAX_NUMBER = 2**63


class StoredTensor(NamedTuple):
    """A tensor inside a file.

    A named tuple, because nothing that a pickle can ask for changes one after its checks.
    """

    path: Path
    """File that holds the values."""
    offset: int
    """Byte of the file at which element (0, 0, ...) lies."""
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements (not bytes) from one index to the next, for each axis."""

    def load(self) -> np.ndarray:
        """Map the tensor into memory, read-only; the pages are released with the last reference to it."""
        dtype = DTYPES[self.dtype]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        extent = span(self.shape, self.strides)
        values = np.memmap(self.path, dtype=dtype, mode="r", offset=self.offset, shape=(extent,))
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)


def possible(shape: Sequence[Any], numbers: Iterable[Any]) -> bool:
    """Tell whether a file's shape has few enough axes and, like the other numbers, only sizes that a disk can have."""
    return len(shape) <= _MAX_AXES and all(type(n) is int and 0 <= n < _MAX_NUMBER for n in (*shape, *numbers))


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements lie from the first to the last one of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor stored row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
