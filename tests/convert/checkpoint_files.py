"""Writes checkpoint files as PyTorch and safetensors do, without either."""

import dataclasses
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
_STORAGE = {"float32": "Float", "bfloat16": "BFloat16", "float16": "Half", "int64": "Long", "float64": "Double"}
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor that looks into a storage shared with others; offset and strides in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    untyped: bool = False
    parameter: bool = False


@dataclasses.dataclass(frozen=True)
class Pickled:
    """Instructions to put into the pickle as they are."""

    code: bytes


@dataclasses.dataclass(frozen=True)
class Ordered:
    """An OrderedDict, with the attribute `_metadata` that PyTorch's state dicts carry."""

    items: Mapping[str, Any]


def save_torch(path: Path, content: Any, compression: int = zipfile.ZIP_STORED, byteorder: bytes = b"little") -> Path:
    """Write what `torch.save(content, path)` writes; numpy arrays stand for tensors."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    code = b"\x80\x02" + _pickle(content, storages) + b"."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{path.stem}/data.pkl", code)
        archive.writestr(f"{path.stem}/byteorder", byteorder)
        for key, values in storages.values():
            archive.writestr(f"{path.stem}/data/{key}", values.tobytes())
        archive.writestr(f"{path.stem}/version", b"3\n")
    return path


def _pickle(value: Any, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    def each(values: Iterable[Any]) -> bytes:
        return b"".join(_pickle(item, storages) for item in values)

    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + each(value) + b"t"
        case list():
            return b"](" + each(value) + b"e"
        case dict():
            return b"}(" + each(item for pair in value.items() for item in pair) + b"u"
        case Ordered(items):
            pairs = each(item for pair in items.items() for item in pair)
            return b"ccollections\nOrderedDict\n)R(" + pairs + b"u" + _pickle({"_metadata": {"version": 1}}, {}) + b"b"
        case Pickled(code):
            return code
        case np.ndarray():
            strides = tuple(np.array(value.strides) // value.itemsize) if value.size else (1,) * value.ndim
            return _pickle(View(value, 0, value.shape, tuple(int(s) for s in strides)), storages)
        case View():
            return _pickle_view(value, storages)
    raise TypeError(type(value))


def _pickle_view(view: View, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    values = view.storage
    key, _ = storages.setdefault(id(values), (str(len(storages)), values))
    if view.untyped:
        kind, size = b"ctorch.storage\nUntypedStorage\n", values.nbytes
        function, tail = b"ctorch._utils\n_rebuild_tensor_v3\n", f"ctorch\n{values.dtype.name}\n".encode()
    else:
        kind, size = f"ctorch\n{_STORAGE[values.dtype.name]}Storage\n".encode(), values.size
        function, tail = b"ctorch._utils\n_rebuild_tensor_v2\n", b""
    hooks = b"ccollections\nOrderedDict\n)R"
    pid = b"(" + _pickle("storage", {}) + kind + _pickle(key, {}) + _pickle("cpu", {}) + _pickle(size, {}) + b"tQ"
    place = _pickle(view.offset, {}) + _pickle(view.shape, {}) + _pickle(view.strides, {})
    tensor = function + b"(" + pid + place + b"\x89" + hooks + tail + b"tR"
    if view.parameter:
        return b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88" + hooks + b"tR"
    return tensor


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": _CODES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for v in tensors.values()))
    return path


def save_shards(folder: Path, tensors: Mapping[str, np.ndarray], stem: str, count: int = 3) -> Path:
    """Write `<stem>-0000i-of-0000n.safetensors` and their index, as diffusers does; return the index."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for i in range(count):
        part = dict(list(tensors.items())[i::count])
        name = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        save_safetensors(folder / name, part)
        places.update(dict.fromkeys(part, name))
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def random_tensors(
    shapes: Mapping[str, Iterable[int]], dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(tuple(shape)).astype(dtype) for name, shape in shapes.items()}
