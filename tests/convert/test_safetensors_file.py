import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import BFLOAT16, random_tensors, save_safetensors

from checkpoints_convert.safetensors_file import read_safetensors, write_safetensors
from rfjax.errors import UserError


def test_reads_what_the_library_writes(tmp_path):
    tensors = random_tensors({"a": (2, 3), "b": (), "c": (4,)})
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name].load(), values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_library_reads_what_is_written(tmp_path, dtype):
    tensors = random_tensors({"a": (2, 3), "b": (5,)}, BFLOAT16 if dtype == "bfloat16" else dtype)
    shapes = {name: values.shape for name, values in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", shapes, dtype, iter(tensors.values()))
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    for name, values in tensors.items():
        assert read[name].tobytes() == values.tobytes()


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.3, 0.9, 0.9999])
def test_a_cut_file_is_refused(tmp_path, share):
    path = save_safetensors(tmp_path / "a.safetensors", random_tensors({str(i): (100,) for i in range(20)}))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="truncated"):
        read_safetensors(path)


def _entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "no safetensors file"),
        ("[]", "no mapping"),
        (json.dumps({"a": [1]}), "entry for a is damaged"),
        (json.dumps({"a": _entry(shape=[-2])}), "entry for a is damaged"),
        (json.dumps({"a": _entry(shape=[3])}), "do not make its shape"),
        (json.dumps({"a": _entry(dtype="F8_E4M3", data_offsets=[0, 2])}), "a as F8_E4M3"),
        ("[" * 100_000, "no safetensors file"),
        (json.dumps({"a": _entry(dtype=[])}), "entry for a is damaged"),
        (json.dumps({"a": _entry(shape=[1] * 200_000, data_offsets=[0, 4])}), "entry for a is damaged"),
        (json.dumps({"a": _entry(data_offsets=[0, 10**4000])}), "entry for a is damaged"),
        (f'{{"a": {json.dumps(_entry())}, "a": {json.dumps(_entry())}}}', "doubled names"),
    ],
)
def test_a_wrong_header_is_named(tmp_path, header, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(UserError, match=message):
        read_safetensors(path)


def test_many_doubled_names_are_counted_and_a_few_listed(tmp_path):
    entry = json.dumps(_entry())
    header = "{" + ", ".join(f'"{i // 2}": {entry}' for i in range(40_000)) + "}"
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(UserError, match=r"20000 doubled names in its header: 0, 1, [0-9, ]{60,70}$"):
        read_safetensors(path)
