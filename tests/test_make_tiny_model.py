"""scripts/make_tiny_model.sh with commands that only look for what they read and make what they write."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = (
    f"#!{sys.executable}"
    + r"""
import os, sys
from pathlib import Path
import yaml

words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1] if name in words else None
if words[0] == "-c":  # is there an accelerator?
    sys.exit("ACCELERATOR" not in os.environ)
if "train" in words:
    values = yaml.safe_load(Path(f"configs/train/{option('--config')}.yaml").read_text())
    player = values.get("self_forcing") or {}
    reads = [values["init"], values["data"]["path"], player.get("teacher"), player.get("weak_teacher")]
    writes = Path(option("--output"), "model")
elif words[0].endswith("make_random_checkpoint.py"):
    reads, writes = [], Path(words[2])
elif words[0].endswith(("cast_checkpoint.py", "grow_checkpoint.py", "separate_things.py")):
    reads, writes = [words[1]], Path(words[2])
else:
    reads, writes = [option("--checkpoint"), option("--dataset"), option("--prompts")], Path(option("--output"))
gone = [path for path in reads if path and not Path(path).exists()]
if gone or writes.exists():
    sys.exit(f"{writes}: {gone} not there" if gone else f"{writes} is made twice")
stopped = os.environ.get("STOPPED") == str(writes)
(writes.parent if stopped else writes).mkdir(parents=True)
if writes.exists():
    (writes / "settings").write_text(" ".join(words[words.index("--set") + 1:]) if "--set" in words else "")
print("made", writes, flush=True)
"""
)


@pytest.fixture
def make(tmp_path):
    """Run the script in a checkout with fake commands; return its exit code, what was made, and its error lines."""
    shutil.copytree(ROOT / "configs" / "train", tmp_path / "configs" / "train")
    (tmp_path / "scripts").mkdir()
    shutil.copy2(ROOT / "scripts" / "make_tiny_model.sh", tmp_path / "scripts")
    for name in ("rfjax", "python"):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(FAKE)
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    def run(*words, stopped=""):
        path = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "STOPPED": stopped}
        done = subprocess.run(
            ["scripts/make_tiny_model.sh", *words], cwd=tmp_path, env=os.environ | path, capture_output=True, text=True
        )
        made = [line.removeprefix("made runs/") for line in done.stdout.splitlines() if line.startswith("made ")]
        return done.returncode, made, done.stderr.splitlines()

    return run


def test_every_stage_finds_what_it_reads_and_is_run_once(make):
    code, made, errors = make()
    assert (code, errors) == (0, [])
    trained = [path.removesuffix("/model") for path in made if path.endswith("/model")]
    assert trained[:1] + trained[-9:] == [
        *("vae_small", "vae_final", "pictures", "short", "teacher", "score", "causal", "ode", "self_forcing", "decoder")
    ]
    assert made[-1] == "moving_shapes"
    assert make() == (0, [], [])


@pytest.mark.parametrize(
    ("machine", "settings"), [({}, "steps=2700 batch_size=32 dtype=float32"), ({"ACCELERATOR": "1"}, "")]
)
def test_a_cpu_learns_less_of_the_longest_stage(make, tmp_path, monkeypatch, machine, settings):
    for name, value in machine.items():
        monkeypatch.setenv(name, value)
    assert make()[0] == 0
    assert (tmp_path / "runs/score/model/settings").read_text() == settings


def test_a_stage_that_was_told_to_stop_goes_on(make):
    code, before, errors = make("runs", stopped="runs/teacher/model")
    assert (code, before[-1], errors) == (0, "teacher/model", [])
    code, after, errors = make("runs")
    assert (code, after[0], after[-1], errors) == (0, "teacher/model", "moving_shapes", [])


def test_a_student_of_the_shipped_teacher_needs_three_checkpoints(make, tmp_path):
    """As docs/tiny_model.md says."""
    for name in ("vae_final", "teacher", "score"):
        (tmp_path / "elsewhere" / name / "model").mkdir(parents=True)
    code, made, errors = make("elsewhere", "causal")
    assert (code, errors) == (0, [])
    assert made[:2] == ["separated", "clips"]
    trained = [path.removesuffix("/model") for path in made if path.endswith("/model")]
    assert trained == ["causal", "ode", "self_forcing", "decoder"]
    assert (tmp_path / "runs").is_symlink()


def test_mistakes_are_one_line(make, tmp_path):
    code, made, errors = make("runs", "casual")
    assert (code, made) == (2, [])
    assert errors == ["there is no casual to begin from; vae_small, pictures, short, teacher, causal or decoder"]
    (tmp_path / "runs").mkdir(exist_ok=True)
    code, made, errors = make("elsewhere")
    assert (code, made) == (2, [])
    assert errors == [f"{tmp_path}/runs is a folder; move it away, or give no other"]
