import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from checkpoint_files import BFLOAT16, GOLDEN, Ordered, Pickled, View, save_torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoints_convert.tensors import StoredTensor
from checkpoints_convert.torch_zip import read_torch
from rfjax.errors import UserError


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "float64"])
def test_values_of_every_type(tmp_path, dtype):
    values = np.arange(-3, 3).reshape(2, 3).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
    tensor = read_torch(save_torch(tmp_path / "a.pt", {"x": values}))["x"]
    assert (tensor.dtype, tensor.shape) == (dtype, (2, 3))
    np.testing.assert_array_equal(tensor.load(), values)


@pytest.mark.parametrize("untyped", [False, True])
@pytest.mark.parametrize("parameter", [False, True])
def test_strided_views_of_one_storage(tmp_path, untyped, parameter):
    storage = np.arange(24, dtype=np.float32)
    views = {
        "transposed": View(storage, 0, (4, 6), (1, 4), untyped, parameter),
        "tail": View(storage, 20, (2, 2), (2, 1), untyped, parameter),
        "expanded": View(storage, 5, (3, 2), (0, 1), untyped, parameter),
        "scalar": View(storage, 7, (), (), untyped, parameter),
        "empty": View(storage, 0, (0, 3), (3, 1), untyped, parameter),
    }
    read = {name: tensor.load() for name, tensor in read_torch(save_torch(tmp_path / "a.pt", views)).items()}
    np.testing.assert_array_equal(read["transposed"], storage.reshape(6, 4).T)
    np.testing.assert_array_equal(read["tail"], [[20, 21], [22, 23]])
    np.testing.assert_array_equal(read["expanded"], [[5, 6]] * 3)
    assert read["scalar"] == 7
    assert read["empty"].shape == (0, 3)


def test_structure_and_training_extras(tmp_path):
    content = {
        "generator": Ordered({"w": np.ones(2, np.float32)}),
        "step": 1200,
        "loss": 0.5,
        "names": ["a", None, True],
        "shape": Pickled(b"ctorch\nSize\n((K\x02K\x03ttR"),
    }
    read = read_torch(save_torch(tmp_path / "a.pt", content))
    assert isinstance(read["generator"]["w"], StoredTensor)
    assert {key: value for key, value in read.items() if key != "generator"} == {
        "step": 1200,
        "loss": 0.5,
        "names": ["a", None, True],
        "shape": (2, 3),
    }


class _Runs:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": pickle.dumps(_Runs(os.system, "touch ran"), 2)[2:-1],
    "builtins.eval": b"cbuiltins\neval\n(X\x0e\x00\x00\x00open('ran','w')tR",
    "python 2 name": b"c__builtin__\neval\n(X\x0e\x00\x00\x00open('ran','w')tR",
    "getattr": b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nX\x0b\x00\x00\x00__globals__tR",
    "inst": b"(X\x09\x00\x00\x00touch ranios\nsystem\n",
    "stack global": b"\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R",
    "dotted": b"\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93",
    "torch function": b"ctorch.hub\nload\n(X\x01\x00\x00\x00xtR",
    "numpy": b"cnumpy.core.multiarray\n_reconstruct\n)R",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_pickles_that_want_to_run_code_are_refused(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    path = save_torch(tmp_path / "a.pt", {"x": np.ones(2, np.float32), "y": Pickled(ATTACKS[attack])})
    with pytest.raises(UserError, match=r"asks to load .*, which could run code"):
        read_torch(path)
    assert not (tmp_path / "ran").exists()


def test_build_cannot_bend_what_rebuilds_tensors(tmp_path):
    state = b"N}(X\x08\x00\x00\x00__call__K\x01u\x86b"
    for attack in (b"ctorch._utils\n_rebuild_tensor_v2\n" + state, b"ccollections\nOrderedDict\n" + state):
        with pytest.raises(UserError, match="damaged"):
            read_torch(save_torch(tmp_path / "a.pt", {"y": Pickled(attack)}))
    assert read_torch(save_torch(tmp_path / "b.pt", {"x": np.ones(2, np.float32)}))["x"].shape == (2,)


def test_build_cannot_move_a_tensor_to_another_file(tmp_path):
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00K\x02\x85K\x01\x85\x89NtR"
    bent = tensor + b"N}(X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/passwdu\x86b"
    with pytest.raises(UserError, match="damaged"):
        read_torch(save_torch(tmp_path / "a.pt", {"x": np.ones(2, np.float32), "y": Pickled(bent)}))


@pytest.mark.parametrize(
    "view",
    [
        View(np.ones(4, np.float32), 1, (4,), (1,)),
        View(np.ones(4, np.float32), 0, (2, 3), (2, 1)),
        View(np.ones(4, np.float32), -1, (1,), (1,)),
        View(np.ones(4, np.float32), 0, (2,), (-1,)),
        View(np.ones(4, np.float32), 0, (2, 2), (1,)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, view):
    with pytest.raises(UserError, match="damaged"):
        read_torch(save_torch(tmp_path / "a.pt", {"x": view}))


def test_other_files_are_named(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"x": 1}, 2))
    with pytest.raises(UserError, match=r"before 1\.6"):
        read_torch(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(UserError, match=r"without data\.pkl"):
        read_torch(path)
    with pytest.raises(UserError, match="compressed"):
        read_torch(save_torch(path, {"x": np.ones(2, np.float32)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="big-endian"):
        read_torch(save_torch(path, {"x": np.ones(2, np.float32)}, byteorder=b"big"))


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(tmp_path, share):
    whole = (GOLDEN / "umt5_tiny.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut\.pth is not a whole PyTorch zip checkpoint"):
        read_torch(path)


@given(st.integers(0, 3000), st.integers(0, 255))
@example(206, 46)  # the end of the pickle, after a text
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_gives_tensors_or_a_user_error(tmp_path, position, byte):
    data = bytearray((GOLDEN / "umt5_tiny.pth").read_bytes())
    data[position] = byte
    path = tmp_path / "changed.pth"
    path.write_bytes(data)
    try:
        content = read_torch(path)
    except UserError:
        return
    for tensor in content.values():
        if isinstance(tensor, StoredTensor):
            tensor.load().sum()


def test_an_entry_that_lies_about_its_place_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    data = bytearray((GOLDEN / "umt5_tiny.pth").read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 42 : central + 46] = struct.pack("<I", 7)
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_torch(path)


LIMITED = """
import resource, sys
from pathlib import Path
from checkpoints_convert.torch_zip import read_torch
from rfjax.errors import UserError

used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
for name in sys.argv[1:]:
    try:
        read_torch(Path(name))
        print("read")
    except UserError as error:
        print(error)
"""


SIZE, MAPPING = b"ctorch\nSize\nq\x01", b"ccollections\nOrderedDict\nq\x01"
LIST = b"](" + b"N" * 100_000 + b"eq\x00"
DICT = b"}(" + b"".join(b"X\x05\x00\x00\x00%05dN" % i for i in range(10_000)) + b"uq\x00"
BOMBS = {
    "shared levels": b"}q\x00"
    + b"".join(b"}q%c(K\x00h%cK\x01h%cu" % (level, level - 1, level - 1) for level in range(1, 40)),
    "memo": b"Nr" + struct.pack("<I", 2**27),
    "largest memo": b"Nr" + struct.pack("<I", 2**32 - 1),
    "memo in text": b"Np%d\n" % 2**27,
    "copied sizes": LIST + SIZE + b"(" + b"h\x01h\x00\x85R" * 1000 + b"l",
    "copied mappings": DICT + MAPPING + b"(" + b"h\x01h\x00\x85R" * 1000 + b"l",
    "copied attributes": DICT + MAPPING + b"(" + b"h\x01)Rh\x00b" * 1000 + b"l",
}


def test_short_pickles_cannot_fill_the_memory(tmp_path):
    paths = [save_torch(tmp_path / f"{name}.pt", Pickled(code)) for name, code in BOMBS.items()]
    command = [sys.executable, "-c", LIMITED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answers = dict(zip(BOMBS, done.stdout.splitlines(), strict=True))
    assert [name for name, answer in answers.items() if "MemoryError" in answer] == []
    assert all("numbers an object" in answers[name] for name in ("memo", "largest memo", "memo in text"))
    assert answers["shared levels"] == "read"
    assert "holds list; a state dict is needed" in answers["copied attributes"]
