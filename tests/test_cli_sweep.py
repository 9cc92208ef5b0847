"""`rfjax sweep` from the command line to the files, on a checkpoint of golden sizes with random weights."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from conftest import compilations
from test_cli_generate import make_checkpoint, names, records

from rfjax import cli
from rfjax.commands import sweep_run
from rfjax.commands.sweep_plan import make_sweep
from rfjax.errors import UserError
from rfjax.evaluation import results
from rfjax.evaluation.measures import SCALARS
from rfjax.io.video import VideoWriter, read_video
from rfjax.sampling import rollout

WEIGHTS = {"policy": "relax_forcing", "settings": {"redundancy_weight": [0.5, 1, 9]}}
SINK = {"policy": "attention_sink", "settings": {"tail_frames": 3}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def write_study(path: str = "s.yaml", **changes: Any) -> None:
    values = {
        "description": "A study",
        "prompts": ["a cat"],
        "latent_frames": 6,
        "height": 16,
        "width": 32,
        "policies": [SINK],
        **changes,
    }
    Path(path).write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))


@pytest.fixture
def sweep(checkpoint, tmp_path, monkeypatch, capsys):
    """Run `rfjax sweep s.yaml --output out` in an empty folder; return exit code, printed lines and error lines."""
    monkeypatch.chdir(tmp_path)
    write_study()

    def run(*flags: str, study: str = "s.yaml"):
        base = [] if "--checkpoint" in flags else ["--checkpoint", str(checkpoint)]
        output = [] if "--output" in flags else ["--output", "out"]
        code = cli.main(["sweep", study, *base, *output, *flags])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def table(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


REPORT = {"report.html", "results.csv", "series.csv", "study.yaml", "vbench"}


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_from_file_to_report(sweep, checkpoint):
    write_study(prompts=["a cat", "a dog"], policies=[WEIGHTS, SINK], seed=3)
    jax.clear_caches()
    code, out, err = sweep("--together", "2")
    assert (code, err) == (0, [])
    assert re.match(
        r"CPU \(\d+ cores\): tiny \(\d+K parameters, float32\), 4 variants in 2 compilations, 8 vid", out[0]
    )
    assert re.search(r"8 videos to make, memory [\d.e-]+ GB \([\d.]+ of [\d.]+ GB in all\)$", out[0])
    assert out[1] == "note: random weights"
    assert out[2] == "a video is 16x32 pixels, 21 frames, 1.312 s at 16 fps: 6 latent frames in 2 chunks"
    assert out[3] == "relax_forcing,redundancy_weight=0.5 and 1 more: videos 1-2 of 8: compiling"
    assert out[-1] == "report.html, results.csv and series.csv in out"
    assert compilations(rollout.step) == 2

    folders = [f"relax_forcing,redundancy_weight={weight}" for weight in ("0.5", "1", "9")]
    assert names("out") == {*folders, "attention_sink,tail_frames=3", *REPORT}
    for folder in folders:
        assert names(f"out/{folder}") == {
            *("a cat-0.mp4", "a dog-0.mp4", "memory_timeline.png", "a dog-0.timeline.png"),
            *("metadata.json", "measures.json"),
        }
    rows = table("out/results.csv")
    assert [row["policy.redundancy_weight"] for row in rows] == ["0.5", "0.5", "1.0", "1.0", "9.0", "9.0", "", ""]
    assert [row["prompt"] for row in rows] == ["a cat", "a dog"] * 4
    assert {row["videos_together"] for row in rows} == {"2", "1"}
    assert all(float(row[quantity.name]) >= 0 for row in rows for quantity in SCALARS if quantity.name != "repetition")
    assert len(table("out/series.csv")) == 16
    assert "A study" in Path("out/report.html").read_text()

    flags = ["--prompt", "a dog", "--latent-frames", "6", "--height", "16", "--width", "32", "--seed", "3"]
    policy = ["--policy", "relax_forcing", "--set", "redundancy_weight=9"]
    assert cli.main(["generate", "--checkpoint", str(checkpoint), "--output", "alone", *flags, *policy]) == 0
    alone, swept = records("alone")["a dog-0.mp4"], records(f"out/{folders[2]}")["a dog-0.mp4"]
    assert alone.keys() == swept.keys()
    assert alone["settings"] == swept["settings"]
    difference = np.abs(
        read_video("alone/a dog-0.mp4").astype(int) - read_video(f"out/{folders[2]}/a dog-0.mp4").astype(int)
    )
    assert difference.mean() < 0.5


@pytest.mark.slow
def test_a_study_resumes_grows_and_measures_once(sweep, monkeypatch):
    write_study(policies=[WEIGHTS])
    assert sweep()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*.mp4")}
    assert len(before) == 3
    Path("out/relax_forcing,redundancy_weight=1/a cat-0.mp4").unlink()
    measured = []
    original = results.measure
    monkeypatch.setattr(results, "measure", lambda *given: measured.append(1) or original(*given))
    write_study(policies=[WEIGHTS, {"policy": "relax_forcing"}], description="Grown")
    code, out, _ = sweep("--format", "parquet")
    assert code == 0
    assert "4 variants in 1 compilation, 2 videos to make" in out[0]
    assert "2 of 4 videos are in out already" in out
    assert len(measured) == 2
    after = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*.mp4")}
    assert {path for path in before if after[path] == before[path]} == {
        Path(f"out/relax_forcing,redundancy_weight={weight}/a cat-0.mp4") for weight in ("0.5", "9")
    }
    assert {name for name in names("out") if "." in name and "=" not in name} == {
        *("report.html", "results.parquet", "series.parquet", "study.yaml")
    }
    assert "4 videos of 4 variants" in Path("out/report.html").read_text()

    monkeypatch.setattr(sweep_run, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert sweep(study="out/study.yaml")[0] == 0
    assert len(measured) == 2


@pytest.mark.slow
def test_another_study_needs_overwrite(sweep):
    assert sweep()[0] == 0
    content = Path("out/attention_sink,tail_frames=3/a cat-0.mp4").read_bytes()
    write_study(seed=5)
    code, _, err = sweep()
    assert code == 2
    assert err == [
        "rfjax: error: out/attention_sink,tail_frames=3 holds videos made with seed 0, this run has 5; "
        "choose another --output, or --overwrite"
    ]
    write_study(policies=[WEIGHTS])
    code, _, err = sweep()
    assert code == 2
    assert re.match(
        r"rfjax: error: out holds another study, with \{'policy': 'attention_sink', .* --overwrite$", err[0]
    )
    write_study(seed=5)
    assert Path("out/attention_sink,tail_frames=3/a cat-0.mp4").read_bytes() == content
    assert sweep("--overwrite")[0] == 0
    assert Path("out/attention_sink,tail_frames=3/a cat-0.mp4").read_bytes() != content
    assert yaml.safe_load(Path("out/study.yaml").read_text())["seed"] == 5


@pytest.mark.slow
def test_batches_of_variants_and_prompts_are_filled_up_and_written_once(sweep, monkeypatch):
    sizes = []
    original = sweep_run.decode_stream
    monkeypatch.setattr(
        sweep_run,
        "decode_stream",
        lambda model, chunks, shape: sizes.append(shape[0]) or original(model, chunks, shape),
    )
    write_study(policies=[WEIGHTS], num_samples=3)
    code, out, _ = sweep("--together", "2", "--batch-size", "2")
    assert code == 0
    assert sizes == [4] * 4  # 3 variants and 3 samples, in pairs
    assert len(list(Path("out").glob("*/*.mp4"))) == 9
    assert re.match(r"relax_forcing,redundancy_weight=9: video 9 of 9: chunk 8 of 8, ", out[-3])
    rows = table("out/results.csv")
    assert {row["videos_together"] for row in rows} == {"4"}
    motion = [[float(row["motion"]) for row in rows if row["sample"] == str(sample)] for sample in range(3)]
    for same in motion:  # the first two chunks choose nothing, so that the weight has no effect
        assert same == pytest.approx([same[0]] * 3, rel=0.02)
    assert np.ptp([same[0] for same in motion]) > 0.05 * motion[0][0]


@pytest.mark.slow
def test_interruption_keeps_what_is_complete_and_reports_it(sweep, monkeypatch):
    write_study(prompts=["a cat", "a dog"])
    original, calls = sweep_run.decode_stream, []

    def interrupted(*given):
        calls.append(None)
        chunks = original(*given)
        yield next(chunks)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from chunks

    monkeypatch.setattr(sweep_run, "decode_stream", interrupted)
    code, out, err = sweep()
    assert code == 130
    assert err == ["rfjax: interrupted; 1 of 2 videos are complete in out"]
    assert out[-1] == "report.html, results.csv and series.csv in out"
    assert names("out") == {"attention_sink,tail_frames=3", *REPORT}
    assert names("out/attention_sink,tail_frames=3") == {
        *("a cat-0.mp4", "memory_timeline.png", "metadata.json", "measures.json")
    }
    assert "1 video of 1 variant" in Path("out/report.html").read_text()


@pytest.mark.slow
def test_nan_names_the_variant_and_leaves_no_video(sweep, tmp_path):
    bad = make_checkpoint(tmp_path / "bad", head_scale=float("nan"))
    code, _, err = sweep("--checkpoint", str(bad))
    assert code == 2
    assert len(err) == 1
    assert re.match(r"rfjax: error: attention_sink,tail_frames=3: the latents of chunk 1 of 2 .* NaN", err[0])
    assert names("out/attention_sink,tail_frames=3") == set()


@pytest.mark.slow
def test_video_that_no_metadata_knows_is_left_out(sweep):
    Path("out/attention_sink,tail_frames=3").mkdir(parents=True)
    Path("out/attention_sink,tail_frames=3/a cat-0.mp4").write_text("mine")
    write_study(prompts=["a cat", "a dog"])
    code, out, _ = sweep()
    assert code == 0
    assert out[3].startswith("left as they are and out of the report, though metadata.json in out/attention_sink,tail")
    assert [row["prompt"] for row in table("out/results.csv")] == ["a dog"]
    assert Path("out/attention_sink,tail_frames=3/a cat-0.mp4").read_text() == "mine"


# --- plans -----------------------------------------------------------------------------------------------------------


def plan_of(monkeypatch, sweep, *flags: str):
    seen = []
    monkeypatch.setattr(sweep_run, "sweep", lambda args: seen.append(make_sweep(args)))
    assert sweep(*flags) == (0, [], [])
    return seen[0]


def test_fifty_weights_share_one_compilation(sweep, monkeypatch):
    weights = {"redundancy_weight": {"from": 0, "to": 4, "steps": 50}, "history_frames": [1, 2]}
    write_study(policies=[{"policy": "relax_forcing", "settings": weights}, SINK], prompts=["a cat", "a dog"])
    plan = plan_of(monkeypatch, sweep, "--together", "8")
    assert plan.compilations == 3
    assert plan.missing == 202
    assert {step.size for step in plan.steps} == {8, 1}
    assert len(plan.steps) == 2 * (7 + 7 + 1)
    made = [
        (member.variant.name, job)
        for step in plan.steps
        for member, jobs in step.videos.items()
        for job in jobs.values()
    ]
    assert len(made) == len(set(made)) == 202
    for step in plan.steps:
        assert len({jax.tree.structure(member.plan.policy) for member in step.members}) == 1


def test_only_what_lacks_is_planned_and_batches_go_job_by_job(sweep, monkeypatch):
    write_study(policies=[WEIGHTS], prompts=["a cat", "a dog"])
    folder = Path("out/relax_forcing,redundancy_weight=1")
    folder.mkdir(parents=True)
    (folder / "a cat-0.mp4").touch()
    plan = plan_of(monkeypatch, sweep, "--together", "3")
    order = [
        ([m.variant.settings["redundancy_weight"] for m in s.members], [j.prompt for j in s.jobs]) for s in plan.steps
    ]
    assert order == [([0.5, 9.0], ["a cat"]), ([0.5, 1.0, 9.0], ["a dog"])]


def test_prompts_come_from_a_file_beside_the_study(sweep, monkeypatch):
    Path("deep").mkdir()
    Path("deep/prompts.txt").write_text("a cat\na dog\na cat\n")
    write_study("deep/s.yaml", prompts=None, prompt_file="prompts.txt", num_samples=2)
    seen = []
    monkeypatch.setattr(sweep_run, "sweep", lambda args: seen.append(make_sweep(args)))
    assert sweep(study="deep/s.yaml")[0] == 0
    assert seen[0].resolved["prompts"] == ["a cat", "a dog"]
    assert "prompt_file" not in seen[0].resolved
    assert seen[0].missing == 4


# --- failures --------------------------------------------------------------------------------------------------------

ERRORS = {
    "no study": (
        [],
        {"study": "nothing"},
        r"no preset 'nothing' in configs/sweeps; there are: policies, redundancy_wei",
    ),
    "missing file": ([], {"study": "none.yaml"}, "cannot read the configuration none.yaml"),
    "unknown key": ([], {"polices": []}, "s.yaml.polices is not a known setting; did you mean 'policies'"),
    "unknown policy": (
        [],
        {"policies": [{"policy": "attention"}]},
        r"s.yaml: policies\[0\]: unknown policy 'attention'",
    ),
    "duplicate": ([], {"policies": [SINK, SINK]}, r"s.yaml: policies\[1\] makes .* already"),
    "height": ([], {"height": 20}, r"error: s.yaml: height is 20; it must be a multiple of 16, such as 16 or 32$"),
    "length": ([], {"latent_frames": 7}, r"error: s.yaml: latent_frames is 7; it must be a multiple of the chunk's 3"),
    "empty prompt": ([], {"prompts": ["a cat", " "]}, r"s.yaml: prompts\[1\] is ' '; it needs at least one word"),
    "missing prompts": ([], {"prompts": None, "prompt_file": "p.txt"}, "cannot read the prompt file p.txt"),
    "policy too large": (
        [],
        {"policies": [{"policy": "relax_forcing", "settings": {"reservoir_frames": 5}}]},
        "reservoir_frames is 5",
    ),
    "dtype": (["--dtype", "half"], {}, "dtype is 'half'; it must be float32 or bfloat16"),
    "checkpoint": (["--checkpoint", "nowhere"], {}, "the checkpoint folder nowhere does not exist"),
    "together": (["--together", "0"], {}, "argument --together: '0' is not a whole number from 1"),
    "format": (["--format", "xlsx"], {}, "argument --format: invalid choice: 'xlsx'"),
    "output is a file": (["--output", "s.yaml"], {}, "the output folder s.yaml cannot be made: s.yaml is not a folder"),
    "flag": (["--togther", "2"], {}, "unknown argument '--togther'; did you mean '--together'?"),
}


@pytest.mark.parametrize(("flags", "changes", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_mistake_is_one_line_and_nothing_is_written(sweep, monkeypatch, flags, changes, message):
    monkeypatch.setattr(sweep_run, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    study = changes.pop("study", "s.yaml") if "study" in changes else "s.yaml"
    write_study(**changes)
    before = sorted(Path().rglob("*"))
    code, _, err = sweep(*flags, study=study)
    assert code == 2
    assert len(err) == 1
    assert re.search(message, err[0]), err[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(("module", "flags"), [("cv2", []), ("pyarrow", ["--format", "parquet"])])
def test_missing_package_names_the_extra(sweep, monkeypatch, module, flags):
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = sweep(*flags)
    assert (code, out) == (2, [])
    assert err[0].endswith('pip install "rfjax[study]"')
    assert not Path("out").exists()


def test_what_does_not_fit_is_refused_before_loading(sweep, monkeypatch):
    monkeypatch.setattr(sweep_run, "device_limit", lambda device: 10**6)
    monkeypatch.setattr(sweep_run, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    write_study(policies=[WEIGHTS])
    code, _, err = sweep("--together", "3")
    assert code == 2
    assert re.match(r"rfjax: error: relax_forcing,redundancy_weight=0.5: this run needs about .*--together$", err[0])
    assert not Path("out").exists()


@pytest.mark.slow
def test_disk_that_is_full_leaves_nothing_half_written(sweep, monkeypatch):
    def fail(writer):
        writer.abort()
        raise UserError("the disk is full")

    monkeypatch.setattr(VideoWriter, "close", fail)
    assert sweep()[0] == 2
    assert names("out") == {"attention_sink,tail_frames=3", "study.yaml"}
    assert names("out/attention_sink,tail_frames=3") == set()


@pytest.mark.slow
def test_killed_process_leaves_complete_files_and_goes_on(checkpoint, tmp_path, sweep):
    write_study(num_samples=6)
    command = [sys.executable, "-m", "rfjax.cli", "sweep", "s.yaml", "--output", "out", "--checkpoint", str(checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    folder = tmp_path / "out" / "attention_sink,tail_frames=3"
    try:
        deadline = time.monotonic() + 240
        while not (folder / "measures.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    for video in folder.glob("*.mp4"):
        assert len(read_video(video)) == 21
    json.loads((folder / "metadata.json").read_text())
    assert not (tmp_path / "out" / "report.html").exists()
    assert sweep()[0] == 0
    assert "6 videos of 1 variant" in Path("out/report.html").read_text()


def test_help_says_it_all_and_does_not_import_jax():
    code = (
        "import sys, contextlib\nfrom rfjax import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['sweep', '--help'])\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("--together", "policies:", "steps: 50", "report.html", "results.csv", "redundancy_weight"):
        assert word in done.stdout


def test_the_study_in_the_help_is_one(tmp_path):
    from rfjax.commands.sweep import _STUDY
    from rfjax.evaluation.study import expand_variants, load_study

    text = _STUDY.partition("\n\n")[2].partition("\n\nPaths")[0]
    (tmp_path / "help.yaml").write_text(text)
    assert len(expand_variants(load_study(tmp_path / "help.yaml"), tmp_path / "help.yaml")) == 57
