import dataclasses
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from toy_runs import EXAMPLES, line_setup, run_config, self_forcing_setup, teacher_setup

from rfjax.errors import UserError
from rfjax.io.run_checkpoints import Checkpoints
from rfjax.training import loop
from rfjax.training.config import (
    CheckpointConfig,
    EMAConfig,
    MeshConfig,
    OptimizerConfig,
    SelfForcingOptions,
    TeacherOptions,
)
from rfjax.training.loop import best_networks, mesh_of, train

SETUPS = {"teacher": teacher_setup, "muon": teacher_setup, "self_forcing": self_forcing_setup}
CONFIGS = {
    "teacher": run_config("teacher", ema=EMAConfig(decay=0.5), checkpoint=CheckpointConfig(keep=3)),
    "muon": run_config(
        "teacher", optimizer=OptimizerConfig(name="muon", learning_rate=1e-2), checkpoint=CheckpointConfig(keep=3)
    ),
    "self_forcing": run_config(
        "self_forcing", ema=EMAConfig(decay=0.5, from_step=2), checkpoint=CheckpointConfig(keep=3)
    ),
}


def learn(config, setup, folder, stop_after=None, console=None):
    """Train; with `stop_after`, as if a signal came during that step."""
    asked = iter(range(1, 1000))
    stop = (lambda: False) if stop_after is None else (lambda: next(asked) >= stop_after)
    return train(config, setup, mesh_of(config), folder, console or Console(quiet=True), stop)


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "muon", "self_forcing"])
def test_a_run_that_was_stopped_twice_ends_with_the_same_bits(stage, tmp_path):
    config, setup = CONFIGS[stage], SETUPS[stage]()
    whole = learn(config, setup, tmp_path / "whole")
    assert int(whole.step) == config.steps
    for stop_after in (1, 3):  # the second time counts from where the first left off
        part = learn(config, setup, tmp_path / "parts", stop_after)
    assert int(part.step) == 4
    assert_same_bits(whole, learn(config, setup, tmp_path / "parts"))
    for newest in ("00000006", "00000004"):  # killed before they were complete: steps are done once more
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / newest)
    assert_same_bits(whole, learn(config, setup, tmp_path / "parts"))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["teacher", pytest.param("self_forcing", marks=pytest.mark.slow)])
def test_everybody_whose_turn_it_is_learns(stage, dtype, tmp_path):
    config, setup = dataclasses.replace(CONFIGS[stage], steps=2, dtype=dtype), SETUPS[stage]()
    state = learn(config, setup, tmp_path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    for player, networks in setup.params.items():
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), networks, state.params[player])
        assert max(jax.tree.leaves(moved)) > 1e-4, player  # a critic's rate is 1e-4 by default
    first = setup.stage.players[0]
    assert jax.tree.structure(best_networks(setup, state)) == jax.tree.structure(setup.params[first])


def test_a_batch_in_parts_teaches_what_the_whole_does(tmp_path):
    runs = [
        learn(run_config("teacher", accumulate=parts), line_setup(), tmp_path / str(parts)).params
        for parts in (1, 2, 4)
    ]
    for other in runs[1:]:
        np.testing.assert_allclose(other["model"]["line"]["slope"], runs[0]["model"]["line"]["slope"], rtol=1e-5)
    assert float(runs[0]["model"]["line"]["slope"]) == pytest.approx(0.06, rel=0.1)  # six Adam steps of 0.01


def test_the_average_is_of_the_parameters_from_its_first_step_on(tmp_path):
    def slopes(steps, **ema):
        config = run_config("teacher", steps=steps, ema=EMAConfig(**ema) if ema else None)
        state = learn(config, line_setup(), tmp_path / f"{steps}{ema}")
        return float(best_networks(line_setup(), state)["line"]["slope"])

    plain = [slopes(steps) for steps in (1, 2, 3)]
    averaged = slopes(3, decay=0.5, from_step=2)  # the first step's is itself
    assert averaged == pytest.approx(0.25 * plain[0] + 0.25 * plain[1] + 0.5 * plain[2], rel=1e-5)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    setup = line_setup()
    config = run_config("teacher", checkpoint=CheckpointConfig(every=2))
    good = learn(dataclasses.replace(config, steps=2), setup, tmp_path)
    bad = dataclasses.replace(setup, source=[{"x": np.float32(np.nan), "y": np.float32(0)}] * EXAMPLES)
    with pytest.raises(UserError, match=r"diverged: model/.* of step 3 is nan; the last good checkpoint is .* step 2"):
        learn(config, bad, tmp_path)
    assert_same_bits(good.params, learn(dataclasses.replace(config, steps=2), setup, tmp_path).params)


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    learn(run_config("teacher", steps=1), line_setup(), tmp_path)
    with pytest.raises(UserError, match="the run in this folder has batch_size 4, this one 2"):
        learn(run_config("teacher", steps=2, batch_size=2), line_setup(), tmp_path)
    assert int(learn(run_config("teacher", steps=2), line_setup(), tmp_path).step) == 2


def test_where_a_run_goes_on_is_said(tmp_path):
    said = []
    for steps in (1, 3, 3):
        file = io.StringIO()
        learn(run_config("teacher", steps=steps), line_setup(), tmp_path, console=Console(file=file, width=200))
        said.append(file.getvalue().splitlines())
    assert said[0][0] == "compiling"
    assert said[1][:2] == [f"{tmp_path}: going on after step 1 of 3", "compiling"]
    assert ["examples/s" in line for line in said[1][2:]] == [False, True]
    assert said[2] == [f"{tmp_path}: all steps are done"]


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    learn(run_config("teacher", steps=3), line_setup(), tmp_path)
    with pytest.raises(UserError, match="steps is 2, but the run in this folder has done 3; ask for as many or more"):
        learn(run_config("teacher", steps=2), line_setup(), tmp_path)
    assert int(learn(run_config("teacher", steps=3), line_setup(), tmp_path).step) == 3


def test_a_run_that_is_older_than_an_option_goes_on(tmp_path, monkeypatch):
    config = run_config("teacher", steps=1, teacher=TeacherOptions())
    learn(config, line_setup(), tmp_path)
    old = config.to_dict()
    del old["remat"], old["teacher"]["train_text_encoder"]
    monkeypatch.setattr(Checkpoints, "settings", lambda self, step: old)
    assert int(learn(dataclasses.replace(config, steps=2), line_setup(), tmp_path).step) == 2
    old["batch_size"] = 3
    with pytest.raises(UserError, match="the run in this folder has batch_size 3, this one 4"):
        learn(dataclasses.replace(config, steps=3), line_setup(), tmp_path)


def test_a_run_that_diverged_goes_on_with_another_learning_rate(tmp_path):
    options = SelfForcingOptions(critic=OptimizerConfig(learning_rate=1e-5))
    config = run_config("self_forcing", self_forcing=SelfForcingOptions())
    gentler = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-6), self_forcing=options)
    before, after = config.to_dict(), gentler.to_dict()
    assert before != after
    assert loop._bound(before) == loop._bound(after)
    assert loop._bound(before) != loop._bound(dataclasses.replace(config, seed=1).to_dict())
    learn(run_config("teacher", steps=1), line_setup(), tmp_path)
    slower = run_config("teacher", steps=2, optimizer=OptimizerConfig(learning_rate=1e-9, clip_norm=1.0))
    then, now = learn(run_config("teacher", steps=1), line_setup(), tmp_path), learn(slower, line_setup(), tmp_path)
    assert int(now.step) == 2
    with pytest.raises(UserError, match="has optimizer 'adamw', this one 'muon'"):
        learn(run_config("teacher", steps=3, optimizer=OptimizerConfig(name="muon")), line_setup(), tmp_path)
    np.testing.assert_allclose(*(state.params["model"]["line"]["slope"] for state in (then, now)), rtol=1e-6)


def test_a_refused_run_leaves_the_configuration_of_the_first(tmp_path):
    learn(run_config("teacher", steps=1), line_setup(), tmp_path)
    written = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="batch_size"):
        learn(run_config("teacher", batch_size=2), line_setup(), tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == written


def test_what_could_not_be_saved_is_not_called_saved(tmp_path, monkeypatch):
    config = run_config("teacher", checkpoint=CheckpointConfig(every=1))
    learn(dataclasses.replace(config, steps=1), line_setup(), tmp_path)
    monkeypatch.setattr(Checkpoints, "wait", lambda checkpoints: False)
    with pytest.raises(UserError, match=r"stopped after step 2, which could not be saved; .* that of step 1"):
        learn(config, line_setup(), tmp_path, stop_after=1)


def test_a_run_does_not_begin_anew_beside_damaged_checkpoints(tmp_path, capsys):
    config = run_config("teacher", steps=1)
    learn(config, line_setup(), tmp_path)
    (tmp_path / "checkpoints" / "00000001" / "record" / "metadata").write_text("{")
    for said in ("no checkpoint that can be restored", r"only 00000001\.damaged; .* or remove it to begin anew"):
        with pytest.raises(UserError, match=said):
            learn(config, line_setup(), tmp_path)


def test_devices_that_do_not_divide_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="does not make 1 devices"):
        learn(run_config("teacher", mesh=MeshConfig(data=3)), line_setup(), tmp_path)
    assert not list(tmp_path.iterdir())
