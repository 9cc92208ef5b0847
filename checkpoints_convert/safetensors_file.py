"""Reads and writes `.safetensors` files tensor by tensor, by memory map and by appending.

The format is documented at https://huggingface.co/docs/safetensors: eight bytes with the header's length, a JSON header
with type, shape and place of each tensor, then the values.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.tensors import DTYPES, StoredTensor, contiguous, possible
from rfjax.errors import UserError

_CODES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER = 100_000_000
_LISTED = 20


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor's place in the file.

    Raises:
        UserError: the file is missing, truncated, not in the format, names a tensor twice or has a type that is no
            parameter's.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > _MAX_HEADER or 8 + length > size:
                raise UserError(f"{path} is truncated or no safetensors file: its header is not whole")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file: its header is no mapping")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        doubled = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{len(doubled)} doubled names in its header: {', '.join(doubled[:_LISTED])}")
    return values


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if type(code) is not str or not possible(shape, (begin, end)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path} is no safetensors file: its header's entry for {name} is damaged") from None
    if code not in _CODES:
        raise UserError(f"{path} holds {name} as {code}; float32, bfloat16 or float16 is needed")
    dtype = _CODES[code]
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{path} is damaged: the bytes of {name} do not make its shape {list(shape)}")
    if data + end > size:
        raise UserError(f"{path} is truncated: {name} ends at byte {data + end}, the file at {size}")
    return StoredTensor(path, data + begin, dtype, shape, contiguous(shape))


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, values: Iterable[np.ndarray]
) -> None:
    """Write tensors one after another.

    Args:
        path: File to create.
        shapes: Name and shape of each tensor.
        dtype: `float32` or `bfloat16`, the type of all of them.
        values: The tensors in the order of `shapes`; each is dropped once written.
    """
    code = next(code for code, name in _CODES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, shape), value in zip(shapes.items(), values, strict=True):
            if value.shape != shape or value.dtype != DTYPES[dtype]:
                raise ValueError(f"{name} is {value.dtype} {value.shape}, the header says {dtype} {shape}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
