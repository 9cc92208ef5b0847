"""`rfjax data` from the command line: every kind is built and read, mistakes are one line and leave nothing."""

import re
import sys
from pathlib import Path

import pytest
from tiny_data import make_tiny_checkpoint, write_video

from rfjax import cli
from rfjax.commands import data as commands
from rfjax.data.reading import open_dataset

SMALL = ["--frames", "5", "--height", "16", "--width", "24"]
SHAPES = ["moving-shapes", "--clips", "2", "--test-clips", "1", *SMALL]


@pytest.fixture
def data(tmp_path, monkeypatch, capsys):
    """Run `rfjax data` in an empty folder; return exit code, printed lines and error lines."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        code = cli.main(["data", *words])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def test_shapes_are_drawn_encoded_and_followed(data):
    checkpoint = ["--checkpoint", str(make_tiny_checkpoint(Path("tiny")))]
    assert data(*SHAPES, "--output", "shapes") == (0, [], ["2 clips to train on and 1 to test with in shapes"])
    assert len(open_dataset("shapes", "train")) == 2
    latents = ["latents", "--dataset", "shapes", "--output", "latents", "--batch-size", "2", *checkpoint]
    code, _, lines = data(*latents, "--embed-prompts")
    assert (code, lines[-1]) == (0, "3 clips encoded in latents")
    assert open_dataset("latents", "test")[0]["latents"].shape == (2, 2, 3, 4)
    assert "prompt_embeds" in open_dataset("latents", "train")[1]
    code, _, lines = data(*latents)
    assert code == 2
    assert lines == ["rfjax: error: latents already holds files; the output must be a new or empty folder"]
    trajectories = ["trajectories", "--prompts", "shapes", "--output", "ways", "--count", "2", *checkpoint]
    code, _, lines = data(*trajectories, "--solver-steps", "4", "--latent-frames", "3", "--batch-size", "1")
    assert (code, lines[-1]) == (0, "2 trajectories made in ways")
    assert open_dataset("ways", "train")[1]["trajectory"].shape == (5, 3, 2, 4, 4)


def test_a_student_redraws_clips(data):
    make_tiny_checkpoint(Path("tiny"))
    data(
        "moving-shapes",
        "--clips",
        "2",
        "--test-clips",
        "1",
        "--frames",
        "9",
        "--height",
        "16",
        "--width",
        "32",
        "--output",
        "shapes",
    )
    redrawn = ["redrawn", "--dataset", "shapes", "--checkpoint", "tiny", "--output", "redrawn", "--batch-size", "1"]
    code, _, lines = data(*redrawn, "--seed", "1")
    assert (code, lines[-1]) == (0, "3 clips redrawn in redrawn")
    example = open_dataset("redrawn", "train")[1]
    assert (example["video"].shape, example["latents"].shape) == ((9, 16, 32, 3), (3, 2, 4, 4))
    code, _, lines = data(*redrawn[:-3], "other", "--frames", "5")
    assert code == 2
    assert lines == [
        "rfjax: error: clips of 5 frames have 2 latent frames, and the student makes chunks of 3; "
        "9 frames, for one, would do"
    ]


def test_a_video_folder_is_cut(data):
    write_video(Path("videos") / "a.mp4", [100] * 6)
    Path("captions.jsonl").write_text('{"file": "a.mp4", "caption": "gray"}')
    code, _, lines = data(
        "video-folder", "--videos", "videos", "--captions", "captions.jsonl", "--output", "clips", *SMALL
    )
    assert (code, lines[-1]) == (0, "1 clips in train, of 1 videos; 0 skipped, see skipped.csv in clips")
    assert open_dataset("clips", "train")[0]["caption"] == "gray"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no kind given; there are: moving-shapes, video-folder, latents, redrawn, trajectories"),
        (["moving_shapes"], "unknown kind 'moving_shapes'; there are: .* did you mean 'moving-shapes'"),
        ([*SHAPES], "the following arguments are required: --output"),
        ([*SHAPES, "--output", "x", "--clip", "3"], "unknown argument '--clip'; did you mean '--clips'"),
        (
            [*SHAPES, "--output", "x", "--frames", "80"],
            "--frames is 80; 1 plus a multiple of 4 is needed, such as 77 or 81",
        ),
        ([*SHAPES, "--output", "x", "--height", "20"], "--height is 20; a multiple of 8 is needed, such as 16 or 24"),
        ([*SHAPES, "--output", "x", "--width", "4"], "--width is 4; a multiple of 8 is needed, such as 8"),
        ([*SHAPES, "--output", "x", "--width", "8"], "width of moving shapes is 8"),
        (["video-folder", "--videos", "none", "--output", "x"], "the videos none are not a folder that exists"),
        (["video-folder", "--videos", ".", "--output", "x", "--test-share", "1"], "'1' is not a share from 0 to 0.9"),
        (["latents", "--dataset", "none", "--checkpoint", "none", "--output", "x"], "the dataset none does not exist"),
        (
            ["latents", "--dataset", ".", "--checkpoint", ".", "--output", "x", "--dtype", "float8"],
            "dtype is 'float8'; it must be float32 or bfloat16",
        ),
        (
            [
                "trajectories",
                "--prompts",
                "none",
                "--checkpoint",
                ".",
                "--output",
                "x",
                "--count",
                "1",
                "--guidance",
                "w",
            ],
            "'w' is not a guidance from 0 to 100",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(data, tmp_path, words, message):
    code, _, lines = data(*words)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("rfjax: error: ")
    assert re.search(message, lines[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [[], ["moving-shapes"], ["video-folder"], ["latents"], ["redrawn"], ["trajectories"]])
def test_help(data, capsys, kind):
    with pytest.raises(SystemExit) as exit:
        data(*kind, "--help")
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: rfjax data {' '.join(kind)}".rstrip() in printed
    assert ("--output DIR" if kind else "trajectories") in printed


def test_missing_packages_are_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    code, _, lines = data(*SHAPES, "--output", "x")
    assert code == 2
    assert lines == ['rfjax: error: building datasets needs more packages; pip install "rfjax[train]"']


def test_an_interruption_says_how_to_go_on(data, monkeypatch):
    make_tiny_checkpoint(Path("tiny"))
    data(*SHAPES, "--output", "shapes")
    words = ["latents", "--dataset", "shapes", "--output", "out", "--checkpoint", "tiny", "--batch-size", "2"]
    report = commands._Progress.__call__

    def interrupt(self, *numbers):
        report(self, *numbers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commands._Progress, "__call__", interrupt)
        code, _, lines = data(*words)
    assert (code, lines[-1]) == (130, "rfjax: interrupted; 2 clips encoded: the same command goes on from there")
    assert not Path("out").exists()
    code, _, lines = data(*words)
    assert (code, lines[0]) == (0, "2 of 3 clips encoded before")
    assert [len(open_dataset("out", split)) for split in ("train", "test")] == [2, 1]
