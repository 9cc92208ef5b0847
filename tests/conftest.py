"""Checkpoints for tests: golden ones, converted once a session by the project's own converter, and a random one."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_data import make_tiny_checkpoint

from checkpoints_convert.convert import convert
from rfjax.config import load_model_config
from rfjax.io.checkpoints import load

# Every process that a test starts compiles for itself, and nobody's cache folder is touched.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Compiling is most of the suite's time; without LLVM's optimizations it takes a third. XLA's own passes are all there.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """A golden file as a dict; channels of videos and latents, upstream's third axis from the end, go last."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data.files}
    return {key: np.moveaxis(a, -3, -1) if a.ndim >= 5 else a for key, a in arrays.items()}


def golden_json(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def script(name: str) -> ModuleType:
    """The module of `scripts/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compilations(jitted: Any) -> int:
    """How many programs a jitted function holds."""
    return jitted._cache_size()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Self-Forcing's tiny generator (EMA), VAE and UMT5, as a user would convert them."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    convert(
        GOLDEN / "self_forcing_tiny.pt",
        folder,
        vae=GOLDEN / "wan_vae_tiny.pth",
        text_encoder=GOLDEN / "umt5_tiny.pth",
        config=GOLDEN / "config.json",
        dtype="float32",
    )
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of random weights with every network, as small as can be."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def golden_config():
    return load_model_config(GOLDEN / "config.json")
