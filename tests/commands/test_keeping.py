"""Which runs may go on with a state; `test_cli_resume.py` lets them."""

from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from rfjax.commands.keeping import as_kept
from rfjax.commands.plan import Plan
from rfjax.errors import UserError
from rfjax.io.run_checkpoints import Checkpoints
from rfjax.parallel.processes import ALONE

SETTINGS = {"seed": 0, "latent_frames": 9}


def plan(folder: Path, settings: dict) -> Plan:
    return mock.NonCallableMock(spec=Plan, output=folder, processes=ALONE, settings=settings)


def keep(folder: Path, settings: dict) -> None:
    with Checkpoints(folder / ".rfjax/process-0/state", 2) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, [], {**settings, "places": 1})


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({}, {"prompt_switch": "plain"}, "made with prompt_switch None, this run has plain"),
        ({"prompt_switch": "plain"}, {}, "made with prompt_switch plain, this run has None"),
    ],
)
def test_a_setting_that_one_run_has_alone_is_named(tmp_path, there, here, message):
    keep(tmp_path, SETTINGS | there)
    with pytest.raises(UserError, match=message):
        as_kept(plan(tmp_path, SETTINGS | here))
