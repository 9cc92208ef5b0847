"""Reads PyTorch's zip checkpoints (`torch.save`) without PyTorch and without running anything they contain.

The layout is that of PyTorch's `torch/serialization.py`: a zip archive of stored (never compressed) entries, `data.pkl`
with the structure and `data/<key>` with the bytes of each storage.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.tensors import DTYPES, StoredTensor, contiguous, possible, span
from rfjax.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_BYTES = "bytes"
_NUMBERING = ("PUT", "BINPUT", "LONG_BINPUT")


class _Storage(NamedTuple):
    """A run of bytes in the file that one or more tensors look into."""

    path: Path
    offset: int
    size: int
    """Bytes, not elements."""
    dtype: str
    """A key of `DTYPES`, or `bytes` where each tensor says its own type."""


# The classes below are all that a pickle can call. Without attributes to set they cannot be bent by a pickle's BUILD
# instruction either; and none copies its arguments, or a short pickle could ask for any number of copies.
class _Mapping(dict):
    """`collections.OrderedDict`, which PyTorch pickles as an empty one, then its items and attributes."""

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes: `_metadata` of a state dict is of no use here."""


class _Size:
    """`torch.Size`."""

    __slots__ = ()

    def __call__(self, sizes) -> tuple[Any, ...]:
        if not isinstance(sizes, tuple):
            raise TypeError("a size that is no tuple")
        return sizes


class _RebuildTensor:
    """`torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_autograd) -> StoredTensor:
        return _tensor(storage, storage.dtype, offset, shape, strides)


class _RebuildTypedTensor:
    """`torch._utils._rebuild_tensor_v3`, for storages without a type of their own."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, _requires_grad, _hooks, dtype, *_metadata) -> StoredTensor:
        return _tensor(storage, dtype, offset, shape, strides)


class _RebuildParameter:
    """`torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, tensor, *_autograd) -> StoredTensor:
        if not isinstance(tensor, StoredTensor):
            raise TypeError("a parameter that is no tensor")
        return tensor


def _tensor(storage: _Storage, dtype: str, offset: int, shape: Any, strides: Any) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise TypeError("a tensor whose shape and strides do not go together")
    if not possible(shape, (offset, *strides)):
        raise ValueError("a tensor with an impossible shape")
    itemsize = DTYPES[dtype].itemsize
    if (offset + span(shape, strides)) * itemsize > storage.size:
        raise ValueError("a tensor that reaches beyond its storage")
    strides = strides if 0 not in shape else contiguous(shape)
    return StoredTensor(storage.path, storage.offset + offset * itemsize, dtype, shape, strides)


_STORAGES = {
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": _Mapping,
    "torch.Size": _Size(),
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_tensor_v3": _RebuildTypedTensor(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
    "torch.storage.UntypedStorage": _BYTES,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.{dtype}": dtype for dtype in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, text and `StoredTensor`; any other name in the pickle is refused."""

    def __init__(self, file: io.BytesIO, path: Path, storages: dict[str, tuple[int, int]]):
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Return the harmless stand-in for a name that the pickle asks for."""
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise UserError(
                f"{self._path} asks to load {module}.{name}, which could run code; a checkpoint may hold tensors, "
                "numbers, text, lists and dicts only"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the place of the storage that a tensor refers to."""
        kind, dtype, key, *_ = pid
        if kind != "storage" or (dtype not in DTYPES and dtype != _BYTES):
            raise ValueError("a reference that is no storage")
        offset, size = self._storages[key]
        return _Storage(self._path, offset, size, dtype)


def read_torch(path: Path) -> dict[Any, Any]:
    """Read what a `.pt` or `.pth` file holds, with a `StoredTensor` for each tensor and dicts for its mappings.

    Raises:
        UserError: the file is no whole PyTorch zip checkpoint, its pickle asks for anything but tensors and plain
            values, or it holds no dict.
    """
    try:
        entries = _entries(path)
        if "byteorder" in entries and _bytes(path, entries["byteorder"]) != b"little":
            raise UserError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
        storages = {name.removeprefix("data/"): place for name, place in entries.items() if name.startswith("data/")}
        pickled = _bytes(path, entries["data.pkl"])
        _check_numbers(pickled)
        content = _Unpickler(io.BytesIO(pickled), path, storages).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{path} is not a whole PyTorch zip checkpoint: {_what_it_is(path)}") from None
    except Exception as error:  # whatever a damaged pickle or archive can provoke
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; a state dict is needed")
    return content


def _entries(path: Path) -> dict[str, tuple[int, int]]:
    """Return (offset, size) of each entry by its name below the archive's root folder."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        infos = archive.infolist()
        root = next((i.filename.removesuffix("data.pkl") for i in infos if i.filename.endswith("/data.pkl")), None)
        if root is None:
            raise UserError(f"{path} is a zip archive without data.pkl; a file written by torch.save is needed")
        places = {}
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path} holds compressed entries; a file as torch.save writes it is needed")
            file.seek(info.header_offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if signature != b"PK\x03\x04" or start + info.file_size > size:
                raise zipfile.BadZipFile
            places[info.filename.removeprefix(root)] = (start, info.file_size)
    return places


def _bytes(path: Path, place: tuple[int, int]) -> bytes:
    # Not through zipfile: PyTorch can be told to leave out the checksums that zipfile insists on.
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _check_numbers(pickled: bytes) -> None:
    """Make sure that no instruction asks for more memory than the pickle is long.

    `pickletools` itself refuses text and bytes that reach beyond the end. That leaves the memo, an array that the
    unpickler makes as long as the largest number in it.
    """
    for instruction, number, _ in pickletools.genops(pickled):
        if instruction.name in _NUMBERING and isinstance(number, int) and number > len(pickled):
            raise ValueError(f"its pickle numbers an object {number} but is {len(pickled)} bytes long")


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"":
        return "the file is empty"
    if start == b"PK\x03\x04":
        return "its end is missing, so it was probably truncated"
    if start[:1] == b"\x80":
        return "it has PyTorch's layout from before 1.6; load it in PyTorch and save it again"
    return "it does not begin like one"
