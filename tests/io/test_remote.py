"""Checkpoints and files that are given by an address, here in fsspec's memory."""

import shutil
from collections import namedtuple

import fsspec
import jax
import numpy as np
import pytest

from rfjax import cli, load
from rfjax.commands.plan import SHIPPED
from rfjax.errors import UserError
from rfjax.io.remote import local

SIZE = f"{sum(path.stat().st_size for path in SHIPPED.rglob('*') if path.is_file()) / 1e9:.2g} GB"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.put(f"{SHIPPED}/", "memory://bucket/model/", recursive=True)
    yield files
    files.store.clear()


def test_a_path_stays_what_it_is(tmp_path):
    assert local(tmp_path) == tmp_path
    assert str(local("runs/model")) == "runs/model"


def test_a_model_is_copied_once_and_loaded(bucket, capsys, monkeypatch):
    model, own = load("memory://bucket/model"), load(SHIPPED)
    assert f"copying memory://bucket/model ({SIZE}) to" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, model.transformer, own.transformer)
    monkeypatch.setattr(type(bucket), "get_file", None)
    copy = local("memory://bucket/model/")
    assert copy.name == "model"
    assert not capsys.readouterr().err


def test_what_changes_is_copied_anew(bucket):
    before = local("memory://bucket/model")
    bucket.pipe("memory://bucket/model/config.json", b"other")
    assert local("memory://bucket/model") != before
    assert (local("memory://bucket/model") / "config.json").read_bytes() == b"other"


def test_a_copy_that_lost_a_part_is_made_anew(bucket):
    copy = local("memory://bucket/model")
    size = (copy / "config.json").stat().st_size
    (copy / "config.json").write_bytes(b"")
    (copy / "tokenizer/tokenizer.json").unlink()
    assert local("memory://bucket/model") == copy
    assert (copy / "config.json").stat().st_size == size
    assert (copy / "tokenizer/tokenizer.json").exists()


def test_a_copy_that_breaks_off_leaves_nothing(bucket, monkeypatch, tmp_path):
    get, calls = type(bucket).get_file, []

    def breaks(self, *given, **named):
        calls.append(given)
        if len(calls) == 3:
            raise ConnectionError("reset by peer")
        return get(self, *given, **named)

    monkeypatch.setattr(type(bucket), "get_file", breaks)
    with pytest.raises(UserError, match=r"cannot copy memory://bucket/model to .*: reset by peer"):
        local("memory://bucket/model")
    assert not list((tmp_path / "cache/rfjax/copies").iterdir())


def test_a_disk_that_is_too_small_is_said_before(bucket, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match=rf"cannot copy memory://bucket/model: .*/copies has less than {SIZE} free"):
        local("memory://bucket/model")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/nothing", "nothing lies at memory://bucket/nothing"),
        ("nowhere://bucket/model", "cannot read nowhere://bucket/model: Protocol not known: nowhere"),
    ],
)
def test_what_cannot_be_read(address, message):
    with pytest.raises(UserError, match=message):
        local(address)


def test_names_that_lead_out_of_the_copy_are_refused(bucket, monkeypatch):
    entries = {"/bucket/model/../../x": {"size": 1}}
    monkeypatch.setattr(type(bucket), "find", lambda *given, **named: entries)
    with pytest.raises(UserError, match=r"holds '../../x', which is outside"):
        local("memory://bucket/model")


def test_commands_take_addresses_for_what_they_read_and_most_refuse_them_for_what_they_write(bucket, tmp_path, capsys):
    bucket.pipe("memory://bucket/prompts.txt", b"a red circle\n")
    flags = ["generate", "--checkpoint", "memory://bucket/model", "--prompt-file", "memory://bucket/prompts.txt"]
    assert cli.main([*flags, "--latent-frames", "2", "--output", str(tmp_path / "out")]) == 2
    assert "--latent-frames is 2" in capsys.readouterr().err  # all was read before that was found
    assert cli.main(["sweep", "policies", "--output", "gs://bucket/out"]) == 2
    assert "'gs://bucket/out' is an address, to which only `rfjax generate` writes" in capsys.readouterr().err
    assert cli.main(["generate", "--checkpoint", "memory://bucket/no", "--output", str(tmp_path / "out")]) == 2
    assert "nothing lies at memory://bucket/no" in capsys.readouterr().err
