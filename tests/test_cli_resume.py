"""A job that is stopped at any moment goes on inside its videos, and ends with the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_data import make_tiny_checkpoint

from rfjax import cli
from rfjax.commands import production
from rfjax.io.manifest import read_jobs
from rfjax.io.ownership import owning
from rfjax.io.run_checkpoints import Checkpoints
from rfjax.io.video import read_video
from rfjax.sampling.batch import Batch, Dispatched

LENGTHS = {"a red circle": 9, "a blue star": 3, "a circle": 6, "a star": 12, "a red star": 6}
"""Latent frames."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "latent_frames": n}) for p, n in LENGTHS.items()))
    return path


@pytest.fixture(scope="module")
def flags(checkpoint, prompts):
    return ["generate", "--checkpoint", str(checkpoint), "--prompt-file", str(prompts), "--batch-size", "2"]


@pytest.fixture(scope="module")
def expected(flags, tmp_path_factory):
    """The videos of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("expected")
    assert cli.main([*flags, "--output", str(folder)]) == 0
    return videos(folder)


@pytest.fixture
def generate(flags, tmp_path, capsys):
    def run(*more: str):
        code = cli.main([*flags, "--output", str(tmp_path / "o"), *more])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def check_complete(folder: Path, expected: dict[str, bytes]) -> None:
    assert videos(folder) == expected
    records = {r["file"]: r for r in json.loads((folder / "metadata.json").read_text())["videos"]}
    assert records.keys() == expected.keys()
    for record in records.values():
        chunks = LENGTHS[record["prompt"]] // 3
        assert len(record["timings"]["chunk_seconds"]) == len(record["selected_frames"]) == chunks
        assert record["settings"]["latent_frames"] == LENGTHS[record["prompt"]]
        assert (folder / record["timeline"]).exists()
    assert {entry["state"] for entry in read_jobs(folder).values()} == {"done"}
    assert not (folder / ".rfjax").exists()


def raise_at(monkeypatch, step: int, error: BaseException) -> list[int]:
    """Let the batch's step of that number fail."""
    original, calls = Batch.step, []

    def one(batch):
        calls.append(len(calls))
        if len(calls) == step:
            raise error
        return original(batch)

    monkeypatch.setattr(Batch, "step", one)
    return calls


def test_videos_of_any_lengths_share_a_batch(generate, expected, tmp_path):
    code, out, _ = generate()
    assert code == 0
    assert re.search(
        r"5 videos of 16x32 pixels, 9 to 45 frames, .* s at 16 fps: 3 to 12 latent frames in 1 to 4", out[1]
    )
    assert re.search(r"chunk 6 of 6", out[-2])  # 12 chunks in two places
    check_complete(tmp_path / "o", expected)
    for prompt, frames in LENGTHS.items():
        assert len(read_video(tmp_path / "o" / f"{prompt}-0.mp4")) == 1 + 4 * (frames - 1)


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 5, 6))])
def test_interrupted_jobs_go_on_where_they_were(generate, expected, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        raise_at(patch, step, KeyboardInterrupt())
        assert generate("--checkpoint-every", "50")[0] == 130
    with monkeypatch.context() as patch:
        calls = raise_at(patch, 100, KeyboardInterrupt())
        assert generate()[0] == 0
    assert len(calls) == 6 - (step - 1)  # nothing is computed twice
    check_complete(tmp_path / "o", expected)


@pytest.mark.parametrize(
    ("every", "step"), [(2, 4), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 3), (2, 6)))]
)
def test_a_crash_loses_what_came_after_the_last_state(generate, expected, tmp_path, monkeypatch, every, step):
    with monkeypatch.context() as patch:
        raise_at(patch, step, RuntimeError("a bug"))
        with pytest.raises(RuntimeError):
            generate("--checkpoint-every", str(every))
    assert generate("--checkpoint-every", str(every))[0] == 0
    check_complete(tmp_path / "o", expected)


def stopped(generate, monkeypatch, step=4) -> None:
    with monkeypatch.context() as patch:
        raise_at(patch, step, KeyboardInterrupt())
        assert generate("--checkpoint-every", "1")[0] == 130


def test_states_that_come_while_others_are_written_are_kept(generate, tmp_path, monkeypatch):
    steps, save = [], Checkpoints.save

    def noted(checkpoints, step, *args):
        steps.append(step)
        return save(checkpoints, step, *args)

    monkeypatch.setattr(Checkpoints, "save", noted)
    assert generate("--checkpoint-every", "1")[0] == 0
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_damaged_state_gives_way_to_the_one_before(generate, expected, tmp_path, monkeypatch):
    stopped(generate, monkeypatch)
    states = sorted((tmp_path / "o/.rfjax/process-0/state").iterdir())
    for path in (states[-1] / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, _, err = generate("--checkpoint-every", "1")
    assert code == 0
    assert "is damaged" in err[0]
    assert "the one before is tried" in err[0]
    check_complete(tmp_path / "o", expected)


@pytest.mark.slow
def test_without_any_sound_state_the_videos_begin_anew(generate, expected, tmp_path, monkeypatch):
    stopped(generate, monkeypatch)
    for path in (tmp_path / "o/.rfjax/process-0/state").glob("*/record/metadata"):
        path.write_text("{")
    assert generate()[0] == 0
    check_complete(tmp_path / "o", expected)


def test_a_damaged_reel_makes_its_video_begin_anew(generate, expected, tmp_path, monkeypatch):
    stopped(generate, monkeypatch)
    reels = list((tmp_path / "o/.rfjax/process-0/reels").glob("*/000000.npz"))
    reels[0].write_bytes(b"")
    code, _, err = generate()
    assert code == 0
    assert "cannot be read" in err[0]
    assert "begins anew" in err[0]
    check_complete(tmp_path / "o", expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "5"], "made with seed 0, this run has 5"),
        (["--policy", "attention_sink"], 'made with policy {"name": "relax_forcing"'),
        (["--fps", "8"], "made with fps 16, this run has 8"),
    ],
)
def test_a_state_of_another_run_is_refused(generate, tmp_path, monkeypatch, more, message):
    stopped(generate, monkeypatch, step=1 + 1)
    for path in (tmp_path / "o").glob("*.mp4"):
        path.unlink()  # the records of videos would refuse the run before
    code, _, err = generate(*more)
    assert code == 2
    assert message in err[0]
    assert "--overwrite" in err[0]


def test_another_model_is_refused(generate, tmp_path, monkeypatch):
    stopped(generate, monkeypatch, step=2)
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    code, _, err = generate("--checkpoint", str(other))
    assert code == 2
    assert "made with checkpoint sha256" in err[0]


@pytest.mark.slow
def test_overwrite_begins_anew(generate, expected, tmp_path, monkeypatch):
    stopped(generate, monkeypatch)
    with monkeypatch.context() as patch:
        calls = raise_at(patch, 100, KeyboardInterrupt())
        assert generate("--overwrite")[0] == 0
    assert len(calls) == 6
    check_complete(tmp_path / "o", expected)


@pytest.mark.slow
def test_a_video_complete_but_for_its_record_is_made_again(generate, expected, tmp_path):
    assert generate()[0] == 0
    folder = tmp_path / "o"
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["videos"] = metadata["videos"][1:]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    jobs = json.loads((folder / "jobs.json").read_text())
    lost = next(job for job in jobs["jobs"] if job["file"] not in {r["file"] for r in metadata["videos"]})
    lost["state"] = "running"
    (folder / "jobs.json").write_text(json.dumps(jobs))
    assert generate()[0] == 0
    check_complete(folder, expected)


def leave_reports_behind(folder: Path, state: str) -> None:
    """As if another process had reported of the videos and died, and the first had not heard of it."""
    own = folder / ".rfjax/process-1"
    own.mkdir(parents=True)
    (own / "metadata.json").write_text((folder / "metadata.json").read_text())
    jobs = json.loads((folder / "jobs.json").read_text())
    jobs["jobs"] = [{**job, "state": state} for job in jobs["jobs"]]
    (own / "jobs.json").write_text(json.dumps(jobs))


def test_what_is_complete_is_recorded_though_the_process_that_made_it_died(generate, expected, tmp_path):
    assert generate()[0] == 0
    folder = tmp_path / "o"
    leave_reports_behind(folder, "done")
    (folder / "metadata.json").unlink()
    jobs = (folder / "jobs.json").read_text()
    (folder / "jobs.json").write_text(jobs.replace('"done"', '"pending"'))
    code, out, _ = generate()
    assert code == 0
    assert "5 of 5 videos are in" in out[-1]
    check_complete(folder, expected)


def test_a_run_with_nothing_to_do_leaves_the_state_of_others(generate, checkpoint, expected, tmp_path, monkeypatch):
    stopped(generate, monkeypatch)
    folder = tmp_path / "o"
    done = next(entry["prompt"] for entry in read_jobs(folder).values() if entry["state"] == "done")
    flags = ["--checkpoint", str(checkpoint), "--latent-frames", str(LENGTHS[done])]
    assert cli.main(["generate", *flags, "--prompt", done, "--output", str(folder)]) == 0
    assert list((folder / ".rfjax/process-0/state").iterdir())
    with monkeypatch.context() as patch:
        calls = raise_at(patch, 100, KeyboardInterrupt())
        assert generate()[0] == 0
    assert len(calls) == 3
    check_complete(folder, expected)


@pytest.mark.slow
def test_what_a_process_that_died_reported_replaces_nothing_newer(generate, tmp_path):
    assert generate()[0] == 0
    leave_reports_behind(tmp_path / "o", "running")
    assert generate("--overwrite", "--seed", "5")[0] == 0
    records = json.loads((tmp_path / "o/metadata.json").read_text())["videos"]
    assert {record["settings"]["seed"] for record in records} == {5}
    assert {entry["state"] for entry in read_jobs(tmp_path / "o").values()} == {"done"}


def test_videos_of_other_settings_are_seen_in_reports_too(generate, tmp_path):
    assert generate()[0] == 0
    leave_reports_behind(tmp_path / "o", "done")
    (tmp_path / "o/metadata.json").unlink()
    code, _, err = generate("--seed", "5")
    assert code == 2
    assert "made with seed 0, this run has 5" in err[0]


def test_a_folder_in_which_another_run_s_process_works_is_refused(generate, tmp_path):
    own = tmp_path / "o/.rfjax/process-3"
    own.mkdir(parents=True)
    with owning(own):
        code, _, err = generate()
    assert code == 2
    assert f"in use by process {os.getpid()}" in err[0]
    assert not videos(tmp_path / "o")


def fail_once_at(monkeypatch, place: int, step: int) -> None:
    """Say of one place's chunk that it is not finite."""
    original, calls = Dispatched.fetch, []

    def fetch(made):
        pieces = original(made)
        calls.append(None)
        if len(calls) == step:
            pieces[place] = type(pieces[place])(pieces[place].frames, pieces[place].trace, False)
        return pieces

    monkeypatch.setattr(Dispatched, "fetch", fetch)


def test_a_video_that_fails_is_tried_again_and_the_others_go_on(generate, expected, tmp_path, monkeypatch):
    fail_once_at(monkeypatch, 0, 2)
    assert generate()[0] == 0
    check_complete(tmp_path / "o", expected)


def test_a_video_that_fails_twice_is_recorded_and_the_others_are_complete(generate, expected, tmp_path, monkeypatch):
    original = production._Production._take

    def take(self, seat, piece, seconds):
        if seat.job.prompt == "a star" and len(seat.made) == 1:
            self._lose([seat], "it cannot be")
        else:
            original(self, seat, piece, seconds)

    monkeypatch.setattr(production._Production, "_take", take)
    code, _, err = generate()
    assert code == 2
    assert err == ["rfjax: error: a star-0.mp4 failed twice: it cannot be; 4 of 5 are complete"]
    found = videos(tmp_path / "o")
    assert found == {name: data for name, data in expected.items() if name != "a star-0.mp4"}
    entry = read_jobs(tmp_path / "o")["a star-0.mp4"]
    assert (entry["state"], entry["reason"]) == ("failed", "it cannot be")


def test_too_little_memory_makes_the_batch_smaller(generate, expected, tmp_path, monkeypatch):
    original, places = Batch.step, []

    def step(batch):
        places.append(len(batch._chunks))
        if len(batch._chunks) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return original(batch)

    monkeypatch.setattr(Batch, "step", step)
    assert generate()[0] == 0
    assert places == [2] + 12 * [1]
    check_complete(tmp_path / "o", expected)


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_state_does_not_stop_the_job(generate, expected, tmp_path, monkeypatch):
    def save(self, step, *_):
        self._report(f"warning: the checkpoint of step {step} is not saved: no space left on the disk")
        return False

    monkeypatch.setattr(Checkpoints, "save", save)
    code, _, err = generate("--checkpoint-every", "2")
    assert code == 0
    assert "no space left" in err[0]
    check_complete(tmp_path / "o", expected)


def test_the_rolling_sampler_keeps_no_state(generate):
    code, _, err = generate("--sampler", "rolling", "--checkpoint-every", "2")
    assert code == 2
    assert "makes videos of one length" in err[0]


def test_states_hold_arrays_without_elements(tmp_path):
    state = {"empty": jnp.zeros((2, 0, 3)), "full": jnp.arange(6.0)}
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.save(1, state, [None], {})
        assert checkpoints.wait()
        _, found, position = checkpoints.restore(None, like)
    assert position == [None]
    assert found["empty"].shape == (2, 0, 3)
    np.testing.assert_array_equal(found["full"], state["full"])


# --- killed processes ------------------------------------------------------------------------------------------------

KILLS = 30


def process_of(command: list[str], cache: Path, devices: int = 1) -> subprocess.Popen:
    """Start a command whose compiled programs are kept."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "rfjax.cli", *command]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_at_thirty_random_moments_the_bytes_are_the_same(flags, expected, tmp_path):
    """Every process but the last is killed, most of them after they have begun to compute."""
    rng, folder, kills, survived = random.Random(0), tmp_path / "o", 0, 0
    command = [*flags, "--output", str(folder), "--checkpoint-every", "1"]
    while kills < KILLS:
        process = process_of(command, tmp_path / "cache")
        while process.poll() is None and not (folder / ".rfjax.lock").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4))
        process.send_signal(signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL)
        _, err = process.communicate(timeout=120)
        if process.returncode == 0:  # it was done before: another round
            check_complete(folder, expected)
            shutil.rmtree(folder)
            survived += 1
            assert survived < KILLS
            continue
        assert process.returncode in (-signal.SIGKILL, 143), err
        kills += 1
    process = process_of(command, tmp_path / "cache")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    check_complete(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(2, 1), (1, 2)], ids=["two then one", "one then two"])
def test_another_number_of_devices_goes_on(flags, expected, tmp_path, devices):
    folder = tmp_path / "o"
    command = [*flags, "--output", str(folder), "--checkpoint-every", "1"]
    per_device = {1: ["--batch-size", "2"], 2: ["--batch-size", "1"]}
    first, then = devices
    process = process_of([*command, *per_device[first]], tmp_path / "cache", first)
    while process.poll() is None and not list(folder.glob(".rfjax/process-0/state/*/record")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    process = process_of([*command, *per_device[then]], tmp_path / "cache", then)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    check_complete(folder, expected)
