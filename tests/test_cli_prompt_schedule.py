"""`rfjax generate --prompt-schedule` from the command line to the files, with the toy model at a small size."""

import json
from pathlib import Path

import numpy as np
import pytest

from rfjax import cli
from rfjax.io.video import read_video

FLAGS = ("--height", "32", "--width", "32", "--policy", "infinity_rope")
SCHEDULE = "- {at: 0, prompt: a red fox}\n- {at: 0.5, prompt: a blue bear}\n- {at: 1.4, prompt: a boat, cut: true}\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("schedule.yaml").write_text(SCHEDULE, encoding="utf-8")

    def run(*flags):
        code = cli.main(["generate", *FLAGS, *flags])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


@pytest.mark.slow
def test_a_scheduled_video(run):
    """9 video frames, then 12 a chunk: the prompts change with frames 9 and 33, at 0.5625 and 2.0625 s."""
    code, out, _ = run("--prompt-schedule", "schedule.yaml", "--latent-frames", "12", "--output", "scheduled")
    assert code == 0
    assert "prompt changes (recache) at 0.5625, 2.062 (cut) s" in out
    (record,) = json.loads(Path("scheduled/metadata.json").read_text())["videos"]
    assert record["file"] == "a red fox-0.mp4"
    assert record["settings"]["prompt_switch"] == "recache"
    assert record["settings"]["prompt_schedule"][2] == {"at": 1.4, "prompt": "a boat", "cut": True}
    run("--prompt", "a red fox", "--latent-frames", "12", "--output", "alone")
    scheduled, alone = (read_video(Path(folder) / "a red fox-0.mp4") for folder in ("scheduled", "alone"))
    difference = np.abs(scheduled.astype(int) - alone.astype(int)).reshape(len(alone), -1).mean(axis=1)
    assert difference[:9].max() < 1
    assert difference[9:].min() > difference[:9].max()

    code, _, err = run("--prompt-schedule", "schedule.yaml", "--prompt-switch", "plain", "--latent-frames", "12",
                       "--output", "scheduled")  # fmt: skip
    assert code == 2
    assert err[-1].startswith(
        "rfjax: error: scheduled holds videos made with prompt_switch recache, this run has plain"
    )


def test_mistakes_are_one_line(run):
    code, _, err = run("--prompt-schedule", "schedule.yaml", "--seconds", "1")
    assert (code, len(err)) == (2, 1)
    assert "entry 3 is at 1.4 s, later than the last chunk of the 1.312 s begins" in err[0]
    code, _, err = run("--prompt-switch", "plain")
    assert (code, err) == (2, ["rfjax: error: --prompt-switch plain needs --prompt-schedule"])
    code, _, err = run("--prompt-schedule", "schedule.yaml", "--prompt", "a dog")
    assert code == 2
    assert "not allowed with argument --prompt" in err[0]
    assert not Path("outputs").exists()
