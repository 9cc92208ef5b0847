"""`rfjax compile` leaves `rfjax generate` nothing to compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_data import make_tiny_checkpoint

from rfjax import cli

DECODING = {"_decode_init", "_decode_first", "_decode_next", "_decode_mixed"}
ROLLING = {"_empty", "enter", "advance", "finish"}
OURS = {"step", "_begin", "_text", "_emptied", "encode_tokens"} | DECODING | ROLLING
"""Programs, beside which there are small ones of JAX."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--prompt-file", "prompts.jsonl", "--batch-size", "2"],
        ["--prompt", "a star", "--latent-frames", "6", "--mesh", "data=2", "--num-samples", "2"],
        ["--prompt", "a star", "--latent-frames", "6", "--sampler", "rolling"],
    ],
    ids=["lengths", "devices", "rolling"],
)
def test_nothing_is_left_to_compile(tmp_path, more):
    make_tiny_checkpoint(tmp_path / "tiny")
    lines = ['{"prompt": "a star", "latent_frames": 9}', '{"prompt": "a circle", "latent_frames": 3}']
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines, '{"prompt": "a red star", "latent_frames": 3}']))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"JAX_NUM_CPU_DEVICES": "2"}

    def run(command: str) -> tuple[list[str], set[str]]:
        line = [sys.executable, "-m", "rfjax.cli", command, "--checkpoint", "tiny", *more]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), {path.name for path in (tmp_path / "cache").rglob("jit_*-cache")}

    out, compiled = run("compile")
    assert f"{len(compiled)} programs compiled in " in out[-1]
    assert not (tmp_path / "outputs").exists()
    _, after = run("generate")
    left = {name.split("-")[0].removeprefix("jit_") for name in after - compiled}
    assert not left & OURS


def test_without_a_cache_there_is_nothing_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compile", "--prompt", "a star"]) == 2
    assert "compiled programs are not kept here; set JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().err
    assert not list(Path().iterdir())
