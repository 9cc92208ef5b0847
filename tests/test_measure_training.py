"""scripts/measure_training.py says what a step takes, for every stage."""

import re

import pytest
from conftest import script

SMALL = ("--model", "tiny", "--latent-frames", "6", "--dtype", "float32", "--steps", "1")


@pytest.mark.parametrize(
    ("stage", "players"),
    [
        ("teacher", ["model"]),
        pytest.param("causal-diffusion", ["model"], marks=pytest.mark.slow),
        pytest.param("causal-teacher", ["model"], marks=pytest.mark.slow),
        pytest.param("self_forcing", ["generator", "critic"], marks=pytest.mark.slow),
    ],
)
def test_each_player_of_a_stage_is_measured(stage, players, capsys):
    script("measure_training").main(["--stage", stage, *SMALL])
    told = capsys.readouterr().out
    assert re.findall(r"(\w+): the first step", told) == players
    assert re.findall(r"(\w+): [\d.]+ s a step", told) == players
    assert "process peak bytes" in told


def test_options_of_another_stage_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        script("measure_training").main(["--stage", "teacher", "--policy", "relax_forcing"])
    assert left.value.code == 2
    assert "--policy are of stage self_forcing, not of teacher" in capsys.readouterr().err
