import os
import socket
import subprocess
import sys

import pytest

from rfjax.errors import UserError
from rfjax.io.ownership import owning

HOLD = """
import sys
from pathlib import Path
from rfjax.io.ownership import owning
with owning(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_owner_until_that_is_gone_however_it_ends(tmp_path):
    for end in (subprocess.Popen.kill, subprocess.Popen.terminate):
        words = [sys.executable, "-c", HOLD, str(tmp_path)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            owner = f"in use by process {holder.pid} on {socket.gethostname()}; wait for"
            with pytest.raises(UserError, match=owner), owning(tmp_path):
                pass
            end(holder)
        with owning(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".rfjax.lock").read_text()


def test_a_folder_that_is_not_there_cannot_be_owned(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*none/\.rfjax\.lock: No such file"), owning(tmp_path / "none"):
        pass


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), owning(tmp_path):
        raise KeyError
    with owning(tmp_path):
        pass
