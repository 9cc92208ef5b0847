"""`rfjax generate` from the command line to the files, on a checkpoint of golden sizes with random weights."""

import argparse
import dataclasses
import json
import os
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
import tokenizers

from rfjax import cli
from rfjax.commands import generation, production
from rfjax.commands.generate import add_arguments, read_inputs
from rfjax.commands.plan import make_plan
from rfjax.config import load_model_config
from rfjax.errors import UserError
from rfjax.io.checkpoints import load, parameter_trees, save
from rfjax.io.manifest import read_jobs
from rfjax.io.ownership import owning
from rfjax.io.prompts import Request
from rfjax.io.video import VideoWriter, read_video
from rfjax.memory import create
from rfjax.sampling.batch import Batch
from rfjax.sampling.codec import encode_prompt
from rfjax.sampling.pipeline import keys_from_seed
from rfjax.sampling.rollout import rollout

GOLDEN = Path(__file__).parent / "golden"
WORDS = ("<pad>", "</s>", "<unk>", "a", "cat", "dog")


def make_checkpoint(folder: Path, *, head_scale: float = 0.05, **changes) -> Path:
    config = load_model_config(GOLDEN / "config.json")
    assert config.umt5 is not None
    text_encoder = dataclasses.replace(config.umt5, dim=config.transformer.text_dim)
    config = dataclasses.replace(config, umt5=text_encoder, description="random weights", **changes)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (0.05 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 1)).astype(np.float32)

    params = jax.tree.map(draw, parameter_trees(config))
    params["transformer"]["head"]["linear"]["kernel"] *= head_scale / 0.05
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source = folder.with_name(f"{folder.name}-tokenizer")
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    save(folder, config, params, source)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def generate(checkpoint, tmp_path, monkeypatch, capsys):
    """Run `rfjax generate` in an empty folder; return exit code, printed lines and error lines."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, frames: str = "6"):
        length = [] if "--seconds" in flags or "--latent-frames" in flags else ["--latent-frames", frames]
        base = [] if "--checkpoint" in flags else ["--checkpoint", str(checkpoint)]
        code = cli.main(["generate", *base, *length, *flags])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def names(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def records(folder: str | Path) -> dict[str, dict]:
    return {record["file"]: record for record in json.loads(Path(folder, "metadata.json").read_text())["videos"]}


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_prompt_gives_video_metadata_and_timeline(generate):
    code, out, err = generate("--prompt", "a cat", "--latent-frames", "12", "--seed", "7")
    assert (code, err) == (0, [])
    assert re.match(r"CPU \(\d+ cores\): tiny \(\d+K parameters, float32\), relax_forcing attending to 7 ", out[0])
    assert re.search(r"7 latent frames, memory [\d.]+ GB \([\d.]+ of [\d.]+ GB in all\)$", out[0])
    assert out[1] == "note: random weights"
    assert out[2] == "1 video of 48x64 pixels, 45 frames, 2.812 s at 16 fps: 12 latent frames in 4 chunks"
    assert out[3] == "video 1 of 1: compiling"
    assert re.match(r"video 1 of 1: chunk 4 of 4, [\d.]+ frames/s, 0 s left$", out[-2])
    assert out[-1] == "a cat-0.mp4 in outputs"
    assert names("outputs") == {"a cat-0.mp4", "jobs.json", "metadata.json", "memory_timeline.png"}
    assert read_video("outputs/a cat-0.mp4").shape == (45, 48, 64, 3)

    record = records("outputs")["a cat-0.mp4"]
    assert (record["prompt"], record["sample"], record["timeline"]) == ("a cat", 0, "memory_timeline.png")
    assert record["settings"]["policy"]["history_candidates"] == 4
    assert record["settings"]["seed"] == 7
    assert record["model"]["path"].endswith("tiny")
    assert record["versions"].keys() == {"rfjax", "jax", "flax", "python"}
    assert len(record["timings"]["chunk_seconds"]) == 4


def test_every_prompt_of_several_is_asked_for():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--prompt", "a cat ", "--prompt", "a dog"])
    assert read_inputs(args)[0] == [Request("a cat"), Request("a dog")]


@pytest.mark.slow
def test_no_arguments_at_all_make_a_video_with_the_shipped_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "moving_shapes (" in out[0]
    assert "moving shapes" in out[1]
    assert len(names("outputs")) == 4
    (video,) = Path("outputs").glob("*-0.mp4")
    assert len(read_video(video)) == 165


@pytest.mark.slow
def test_selected_frames_and_pixels_are_those_of_the_rollout(generate, checkpoint):
    assert generate("--prompt", "a dog", "--latent-frames", "12", "--seed", "3", "--num-samples", "2")[0] == 0
    model = load(checkpoint)
    embeds = encode_prompt(model, ["a dog"])
    expected = rollout(model, create("relax_forcing"), embeds, (1, 12, 6, 8, 4), key=keys_from_seed(3, [1]))
    selected = [frames[frames >= 0].tolist() for frames in np.asarray(expected.trace.selected_frames)[:, 0, 0]]
    assert records("outputs")["a dog-1.mp4"]["selected_frames"] == selected
    assert [len(frames) for frames in selected] == [0, 0, 1, 1]


@pytest.mark.slow
def test_prompt_file_is_flat_resumes_and_keeps_what_is_there(generate):
    Path("prompts.txt").write_text("a cat\n\n  a dog \r\na cat\n", encoding="utf-8")
    code, out, _ = generate("--prompt-file", "prompts.txt")
    assert code == 0
    assert out[-1] == "2 videos in outputs"
    videos = {"a cat-0.mp4", "a dog-0.mp4"}
    assert names("outputs") == videos | {"jobs.json", "metadata.json", "memory_timeline.png", "a dog-0.timeline.png"}
    assert records("outputs").keys() == videos

    jobs = Path("outputs/jobs.json")  # written again at every start
    before, entries = {path: path.stat().st_mtime_ns for path in Path("outputs").iterdir()}, jobs.read_text()
    code, out, _ = generate("--prompt-file", "prompts.txt")
    assert code == 0
    assert out[-1] == "2 of 2 videos are in outputs already (--overwrite makes them anew)"
    after = {path: path.stat().st_mtime_ns for path in Path("outputs").iterdir()}
    assert {**after, jobs: None} == {**before, jobs: None}
    assert jobs.read_text() == entries

    dog = Path("outputs/a dog-0.mp4")
    content = dog.read_bytes()
    dog.unlink()
    assert generate("--prompt-file", "prompts.txt")[0] == 0
    assert dog.read_bytes() == content
    assert Path("outputs/a cat-0.mp4").stat().st_mtime_ns == before[Path("outputs/a cat-0.mp4")]
    assert records("outputs").keys() == videos


@pytest.mark.slow
def test_moved_checkpoint_resumes_and_other_weights_do_not(generate, checkpoint):
    shutil.copytree(checkpoint, "copy")
    assert generate("--prompt", "a cat", "--checkpoint", "copy")[0] == 0
    Path("copy").rename("moved")
    code, out, _ = generate("--prompt", "a cat", "--checkpoint", "moved")
    assert code == 0
    assert "1 of 1 videos are in outputs already" in out[-1]
    make_checkpoint(Path("copy"), head_scale=0.1)
    code, _, err = generate("--prompt", "a cat", "--checkpoint", "copy")
    assert code == 2
    assert re.match(r"rfjax: error: outputs holds videos made with checkpoint sha256:\w+, this run has sha256:", err[0])


@pytest.mark.slow
def test_other_settings_are_not_mixed_into_a_folder(generate):
    assert generate("--prompt", "a cat", "--seed", "1")[0] == 0
    content = Path("outputs/a cat-0.mp4").read_bytes()
    for prompt in ("a cat", "a dog"):
        code, _, err = generate("--prompt", prompt, "--seed", "2")
        assert code == 2
        assert len(err) == 1
        assert err[0].startswith("rfjax: error: outputs holds videos made with seed 1, this run has 2; choose another")
    assert names("outputs") == {"a cat-0.mp4", "jobs.json", "metadata.json", "memory_timeline.png"}
    assert Path("outputs/a cat-0.mp4").read_bytes() == content

    assert generate("--prompt", "a cat", "--seed", "2", "--overwrite")[0] == 0
    assert Path("outputs/a cat-0.mp4").read_bytes() != content
    assert records("outputs")["a cat-0.mp4"]["settings"]["seed"] == 2


@pytest.mark.slow
def test_second_prompt_in_a_folder_leaves_the_first_timeline_alone(generate):
    assert generate("--prompt", "a cat")[0] == 0
    timeline = Path("outputs/memory_timeline.png").read_bytes()
    assert generate("--prompt", "a dog")[0] == 0
    assert Path("outputs/memory_timeline.png").read_bytes() == timeline
    assert records("outputs")["a dog-0.mp4"]["timeline"] == "a dog-0.timeline.png"


@pytest.mark.slow
def test_video_that_no_metadata_knows_is_left_alone(generate):
    Path("outputs").mkdir()
    Path("outputs/a cat-0.mp4").write_text("mine")
    code, out, _ = generate("--prompt", "a cat")
    assert code == 0
    assert "left as they are, though metadata.json does not know them: a cat-0.mp4" in out
    assert Path("outputs/a cat-0.mp4").read_text() == "mine"


@pytest.mark.slow
def test_prompt_that_is_too_long_is_cut_with_one_warning(generate):
    code, _, err = generate("--prompt", "cat " * 600, "--num-samples", "2")
    assert code == 0
    assert len(err) == 1
    assert re.match(r"rfjax: warning: the prompt 'cat cat .* has 601 tokens; the network reads the first 12$", err[0])


@pytest.mark.slow
def test_seconds_are_rounded_up_and_said(generate):
    code, out, _ = generate("--prompt", "a cat", "--seconds", "1", "--fps", "8")
    assert code == 0
    assert out[2].endswith("9 frames, 1.125 s at 8 fps: 3 latent frames in 1 chunks, 1 s rounded up to whole chunks")
    assert len(read_video("outputs/a cat-0.mp4")) == 9


# --- failures --------------------------------------------------------------------------------------------------------


ERRORS = {
    "long checkpoint": (["--checkpoint", "x" * 300], "cannot look at the checkpoint folder x+: File name too long"),
    "long output": (["--output", "x" * 300], "cannot look at the output folder x+: File name too long"),
    "long prompt file": (["--prompt-file", "x" * 300], "cannot read the prompt file x+: File name too long"),
    "missing checkpoint": (["--checkpoint", "nowhere"], "the checkpoint folder nowhere does not exist"),
    "checkpoint without config": (["--checkpoint", "empty"], "empty has no config.json"),
    "height": (["--height", "500"], "--height is 500; it must be a multiple of 16, such as 496 or 512"),
    "width": (["--width", "8"], "--width is 8; it must be a multiple of 16, such as 16"),
    "zero height": (["--height", "0"], "argument --height: '0' is not a whole number"),
    "zero seconds": (["--seconds", "0"], "argument --seconds: '0' is not a positive, finite number"),
    "negative seconds": (["--seconds", "-3"], "argument --seconds: '-3' is not a positive"),
    "infinite seconds": (["--seconds", "inf"], "argument --seconds: 'inf' is not a positive, finite"),
    "NaN seconds": (["--seconds", "nan"], "argument --seconds: 'nan' is not a positive, finite"),
    "huge seconds": (["--seconds", "1e300"], "--seconds is 1e.300; at 16 fps at most"),
    "partial chunk": (
        ["--latent-frames", "7"],
        "--latent-frames is 7; it must be a multiple of the chunk's 3, such as 6 or 9",
    ),
    "huge length": (["--latent-frames", "9" * 30], "--latent-frames is 9+; at most 1073741823 are possible"),
    "both lengths": (
        ["--latent-frames", "6", "--seconds", "1"],
        "--seconds: not allowed with argument --latent-frames",
    ),
    "fps": (["--fps", "0"], "argument --fps: '0' is not a whole number from 1 to 1000"),
    "batch size": (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number"),
    "samples": (["--num-samples", "-1"], "argument --num-samples: '-1' is not a whole number"),
    "seed": (["--seed", "1.5"], "argument --seed: '1.5' is not a whole number from 0 to 4294967295"),
    "dtype": (["--dtype", "bfloat"], "dtype is 'bfloat'; it must be float32 or bfloat16; did you mean 'bfloat16'"),
    "flag": (["--sed", "1"], "unknown argument '--sed'; did you mean '--seed'?"),
    "shortened flag": (["--overw"], "unknown argument '--overw'; did you mean '--overwrite'?"),
    "flag without value": (["--seed"], "argument --seed: expected one argument"),
    "empty prompt": (["--prompt", "  "], "--prompt is '  '; it needs at least one word"),
    "prompt that cleaning empties": (["--prompt", "&nbsp;"], "--prompt is '&nbsp;'; it needs at least one word"),
    "line that cleaning empties": (
        ["--prompt-file", "blank.txt"],
        "line 4 of the prompt file blank.txt is '&nbsp;'; it needs at least one word",
    ),
    "prompt of bad bytes": (["--prompt", "caf\udce9"], "which is not valid UTF-8"),
    "two sources of prompts": (
        ["--prompt", "a", "--prompt-file", "b"],
        "--prompt-file: not allowed with argument --prompt",
    ),
    "missing prompt file": (["--prompt-file", "none.txt"], "cannot read the prompt file none.txt: No such file"),
    "empty prompt file": (["--prompt-file", "empty.txt"], "the prompt file empty.txt holds no prompt"),
    "prompt file in latin-1": (["--prompt-file", "latin.txt"], r"latin.txt is not UTF-8 \(byte 3\)"),
    "policy": (["--policy", "relaxforcing"], "did you mean 'relax_forcing'?"),
    "setting": (["--set", "history=2"], "did you mean 'history_frames'"),
    "setting without value": (["--set", "history_frames"], "'history_frames' is not KEY=VALUE"),
    "setting as YAML": (["--set", "positions=[true]"], "positions is '.true.'; it must be one of 'hybrid', 'true'"),
    "setting of wrong type": (["--set", "history_frames=many"], "history_frames is 'many'; it must be a whole number"),
    "contradiction": (["--set", "history_frames=5"], "history_candidates is 4; history_frames 5 need at least as many"),
    "small reservoir": (["--set", "reservoir_frames=5"], "reservoir_frames is 5"),
    "output is a file": (
        ["--output", "empty.txt"],
        "the output folder empty.txt cannot be made: empty.txt is not a folder",
    ),
    "output below a file": (["--output", "empty.txt/x"], "the output folder empty.txt/x cannot be made"),
    "foreign metadata": (["--output", "foreign"], "foreign/metadata.json was not written by rfjax"),
}


@pytest.mark.parametrize(("flags", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_mistake_is_one_line_and_nothing_is_written(generate, flags, message):
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n \n")
    Path("blank.txt").write_text("a cat\n\na cat\n&nbsp;\n")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    Path("foreign").mkdir()
    Path("foreign/metadata.json").write_text("[]")
    before = sorted(Path().rglob("*"))
    code, _, err = generate(*flags)
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("rfjax: error: ")
    assert re.search(message, err[0]), err[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command given; there are: generate, compile, convert, sweep, data, train, benchmark"),
        (["generat"], "did you mean 'generate'?"),
        (["--versoin"], "unknown argument '--versoin'; did you mean '--version'?"),
        (["convert", "--transfomer", "x.pt"], "unknown argument '--transfomer'; did you mean '--transformer'?"),
    ],
)
def test_command_itself_may_be_wrong(capsys, argv, message):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["vae", "umt5"])
def test_checkpoint_without_a_network_is_refused(generate, checkpoint, tmp_path, lacking):
    values = json.loads((checkpoint / "config.json").read_text())
    del values[lacking]
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "config.json").write_text(json.dumps(values))
    code, _, err = generate("--checkpoint", "partial")
    assert code == 2
    assert "which generate needs" in err[0]
    assert not Path("outputs").exists()


def test_truncated_checkpoint_is_one_line_and_nothing_is_written(generate, checkpoint):
    shutil.copytree(checkpoint, "broken")
    for path in Path("broken/transformer").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    code, _, err = generate("--checkpoint", "broken", "--prompt", "a cat")
    assert code == 2
    assert len(err) == 1
    assert "broken/transformer" in err[0]
    assert not Path("outputs").exists()


def test_what_does_not_fit_is_refused_before_loading(generate, monkeypatch):
    monkeypatch.setattr(generation, "device_limit", lambda device: 10**6)
    monkeypatch.setattr(generation, "load", lambda *args: pytest.fail("weights were loaded"))
    code, out, err = generate("--prompt", "a cat")
    assert code == 2
    assert out[0].startswith("CPU")
    assert re.search(r"this run needs about [\d.]+ GB of device memory \(weights .*\) and there are 0\.0 GB", err[0])
    assert not Path("outputs").exists()


def test_prompts_and_tokenizer_are_checked_before_loading(generate, checkpoint, monkeypatch):
    monkeypatch.setattr(generation, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    shutil.copytree(checkpoint, "copy")
    Path("copy/tokenizer/tokenizer.json").write_text("{}")
    code, _, err = generate("--checkpoint", "copy")
    assert code == 2
    assert re.match(r"rfjax: error: copy/tokenizer/tokenizer\.json is not a tokenizer\.json", err[0])
    shutil.rmtree("copy/tokenizer")
    assert generate("--checkpoint", "copy")[2] == [
        "rfjax: error: --checkpoint copy has no tokenizer, which generate needs; convert it with one"
    ]
    assert not Path("outputs").exists()


def test_what_is_there_already_needs_no_memory(generate, monkeypatch):
    monkeypatch.setattr(generation, "device_limit", lambda device: 10**6)
    Path("outputs").mkdir()
    Path("outputs/a cat-0.mp4").touch()
    assert generate("--prompt", "a cat")[0] == 0


def test_running_out_of_memory_says_what_is_needed(generate, monkeypatch):
    monkeypatch.setattr(generation, "load", lambda *_, **__: jnp.zeros(2**45, jnp.float32))
    code, _, err = generate("--prompt", "a cat")
    assert code == 2
    assert re.match(r"rfjax: error: the device ran out of memory: this run needs about [\d.]+ GB", err[0])


def test_settings_of_the_policy_are_read_by_their_types(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(generation, "generate", lambda *given: seen.append(make_plan(*given)))
    flags = ["--set", "positions=true", "redundancy_weight=1e-3", "--set", "sink_frames=3"]
    assert cli.main(["generate", "--checkpoint", str(checkpoint), *flags]) == 0
    window = ["--policy", "self_forcing", "--set", "window_frames=none"]
    assert cli.main(["generate", "--checkpoint", str(checkpoint), *window]) == 0
    expected = create("relax_forcing", positions="true", redundancy_weight=1e-3, sink_frames=3)
    assert [plan.policy for plan in seen] == [expected, create("self_forcing", window_frames=None)]


@pytest.mark.slow
def test_video_that_cannot_be_finished_has_no_timeline_and_no_record(generate, monkeypatch):
    def fail(writer):
        writer.abort()
        raise UserError("the disk is full")

    monkeypatch.setattr(VideoWriter, "close", fail)
    assert generate("--prompt", "a cat")[0] == 2
    assert names("outputs") == {"jobs.json"}


@pytest.mark.slow
def test_record_that_cannot_be_written_ends_the_job_which_can_go_on(generate, monkeypatch):
    def fail(*given):
        raise UserError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(production, "write_records", fail)
        code, _, err = generate("--prompt", "a cat")
    assert (code, len(err)) == (2, 1)
    assert "the disk is full" in err[0]
    (entry,) = read_jobs(Path("outputs")).values()
    assert entry["state"] == "pending"
    assert generate("--prompt", "a cat")[0] == 0
    assert names("outputs") == {"a cat-0.mp4", "jobs.json", "metadata.json", "memory_timeline.png"}
    (entry,) = read_jobs(Path("outputs")).values()
    assert entry["state"] == "done"


@pytest.mark.slow
def test_nan_stops_with_the_chunk_named_and_leaves_no_video(generate, tmp_path):
    bad = make_checkpoint(tmp_path / "bad", head_scale=float("nan"))
    code, _, err = generate("--checkpoint", str(bad), "--prompt", "a cat")
    assert code == 2
    assert len(err) == 1
    assert "a cat-0.mp4 failed twice: the latents of chunk 1 of 2 (latent frames 0 to 2) hold NaN or infin" in err[0]
    assert names("outputs") == {"jobs.json"}
    (entry,) = read_jobs(Path("outputs")).values()
    assert entry["state"] == "failed"
    assert entry["reason"].startswith("the latents of chunk 1 of 2")


@pytest.mark.slow
def test_interruption_keeps_finished_videos_and_no_partial_file(generate, monkeypatch):
    Path("prompts.txt").write_text("a cat\na dog\n")
    original, calls = Batch.step, []

    def interrupted(batch):
        calls.append(None)
        if len(calls) == 4:  # the second chunk of the second video
            raise KeyboardInterrupt
        return original(batch)

    monkeypatch.setattr(Batch, "step", interrupted)
    code, _, err = generate("--prompt-file", "prompts.txt")
    assert code == 130
    assert err == ["rfjax: interrupted; 1 of 2 videos are complete in outputs"]
    assert names("outputs") == {"a cat-0.mp4", "jobs.json", "memory_timeline.png", "metadata.json"}
    assert [entry["state"] for entry in read_jobs(Path("outputs")).values()] == ["done", "pending"]
    assert len(read_video("outputs/a cat-0.mp4")) == 21


# --- as a process ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupted_process_leaves_complete_videos(checkpoint, tmp_path, number, code, word):
    flags = ["--num-samples", "1000", "--latent-frames", "6", "--prompt", "a cat", "--output", str(tmp_path / "o")]
    command = [sys.executable, "-m", "rfjax.cli", "generate", "--checkpoint", str(checkpoint), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "o" / "metadata.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert re.fullmatch(rf"rfjax: {word}; \d+ of 1000 videos are complete in .*\n", err)
    assert not [name for name in names(tmp_path / "o") if name.startswith(".")]
    for video in (tmp_path / "o").glob("*.mp4"):
        assert len(read_video(video)) == 21


def test_help_does_not_import_jax():
    code = (
        "import sys, contextlib\nfrom rfjax import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['generate', '--help'])\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--prompt-file" in done.stdout


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_process(checkpoint, tmp_path):
    command = [sys.executable, "-m", "rfjax.cli", "generate", "--checkpoint", str(checkpoint), "--prompt", "a cat"]
    command += ["--latent-frames", "3", "--overwrite", "--output", str(tmp_path / "o")]
    kept = {}
    for name, own in (("default", {}), ("said", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere")})):
        environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / name), "JAX_ENABLE_COMPILATION_CACHE": "true"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | own  # JAX's default is a second
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
        kept[name] = [path.name for path in (tmp_path / name).rglob("jit_*")]
    assert kept["default"]
    assert not kept["said"]
    assert list((tmp_path / "elsewhere").glob("jit_*"))


def test_a_folder_in_use_is_refused_with_its_owner(generate, tmp_path):
    (tmp_path / "outputs").mkdir()
    with owning(tmp_path / "outputs"):
        code, _, err = generate("--prompt", "a cat")
    assert code == 2
    assert re.search(rf"outputs is in use by process {os.getpid()} on \S+; wait for its end, or choose", err[0])
    assert names("outputs") == set()
