"""The one loop of all stages: read, learn, watch, save; a run that was killed goes on as if it had not been."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from rich.console import Console

from rfjax.data.reading import batches
from rfjax.errors import UserError
from rfjax.io.atomic import replacing
from rfjax.io.checkpoints import DamagedCheckpointError
from rfjax.io.run_checkpoints import Checkpoints
from rfjax.parallel.mesh import check_batch, global_batch, make_mesh, parameter_sharding, place
from rfjax.training.config import TrainConfig
from rfjax.training.metrics import Metrics
from rfjax.training.optimizer import learning_rate, make_optimizer
from rfjax.training.preview import Preview
from rfjax.training.setup import Setup
from rfjax.training.state import TrainState
from rfjax.training.update import make_update
from rfjax.training.watch import DivergedError, Watch

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
FREE = ("description", "steps", "accumulate", "remat", "mesh", "checkpoint", "log_every", "sample")
"""Settings that a run which goes on may change, beside those of its optimizers."""
OPTIMIZERS = ("optimizer", "critic")


def mesh_of(config: TrainConfig) -> jax.sharding.Mesh:
    """Return the mesh of all devices that a run asks for.

    Raises:
        UserError: it does not make as many devices as there are, or the batch does not divide among them.
    """
    mesh = make_mesh(config.mesh.data or 0, config.mesh.fsdp)
    check_batch(config.batch_size, mesh, config.accumulate, jax.process_count())
    return mesh


def train(
    config: TrainConfig,
    setup: Setup,
    mesh: jax.sharding.Mesh,
    folder: Path,
    console: Console,
    stop: Callable[[], bool],
) -> TrainState:
    """Train until the last step, or until `stop` says so; go on with what the folder holds.

    Args:
        config: of the run.
        setup: from `prepare`.
        mesh: from `mesh_of`.
        folder: of the run: its configuration, checkpoints, metrics and sample videos.
        console: for the metrics.
        stop: asked between steps; where it is true the state is saved and returned.

    Returns:
        The state after the last step done, which is saved.

    Raises:
        UserError: the folder holds another run, the state could not be saved before leaving, or the loss diverged;
            the last good checkpoint is kept then.
    """
    run = _Run(config, setup, mesh)
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep) as checkpoints,
        Metrics(folder, console, config.steps) as metrics,
    ):
        state, first, reader = run.begin(checkpoints)
        if jax.process_index() == 0:
            _write_config(config, folder / CONFIG)
        metrics.begin(first)
        if first:
            done = "all steps are done" if first == config.steps else f"going on after step {first} of {config.steps}"
            console.print(f"{folder}: {done}", markup=False)
        if first < config.steps:
            console.print("compiling")
        return run.learn(state, first, reader, checkpoints, metrics, stop)


class _Run:
    """The pieces of a run that do not change."""

    def __init__(self, config: TrainConfig, setup: Setup, mesh: jax.sharding.Mesh):
        self.config, self.setup, self.mesh = config, setup, mesh
        players = setup.stage.players
        turns = self._turns(config.steps)
        settings = {player: _optimizer_settings(config, player) for player in players}
        self.rates = {player: learning_rate(settings[player], turns[player]) for player in players}
        self.optimizers = {player: make_optimizer(settings[player], turns[player]) for player in players}
        like = jax.eval_shape(self._fresh, setup.params)
        self.shardings = parameter_sharding(mesh, like)
        self.like = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like, self.shardings
        )
        self.updates = {
            player: make_update(setup.stage, player, self.optimizers[player], config, setup.model, self.shardings)
            for player in players
        }

    def begin(self, checkpoints: Checkpoints) -> tuple[TrainState, int, Any]:
        """Return the state of the newest checkpoint, or a fresh one, the number of its steps, and the reader there."""
        reader = self._reader()
        if checkpoints.latest is None:
            checkpoints.check_none_damaged()
            fresh = jax.jit(self._fresh, out_shardings=self.shardings)
            return fresh(place(self.setup.params, self.shardings.params)), 0, reader
        with contextlib.suppress(DamagedCheckpointError):  # the one before will be restored
            self._compare(checkpoints.settings(checkpoints.latest))
        step, state, position = checkpoints.restore(None, self.like)
        self._compare(checkpoints.settings(step))
        if step > self.config.steps:
            raise UserError(
                f"steps is {self.config.steps}, but the run in this folder has done {step}; ask for as many or more, "
                "or choose another --output"
            )
        reader.set_state(position)
        return state, step, reader

    def learn(
        self,
        state: TrainState,
        first: int,
        reader: Any,
        checkpoints: Checkpoints,
        metrics: Metrics,
        stop: Callable[[], bool],
    ) -> TrainState:
        """Go from the first step that is missing to the last."""
        config, stage = self.config, self.setup.stage
        frozen = place(self.setup.frozen, parameter_sharding(self.mesh, self.setup.frozen))
        preview = config.sample and Preview(config, self.setup, config.sample)
        watch, since, seen, before = Watch(), time.monotonic(), first, {}
        try:
            for step in range(first, config.steps):
                batch = global_batch(self.mesh, next(reader))
                for player in stage.turn(step):
                    state, numbers = self.updates[player](state, frozen, batch, step)
                    watch.add(step + 1, numbers)
                    jax.block_until_ready(before)  # one update waits at most, so that a signal is soon obeyed
                    before = numbers
                done, told = step + 1, stop()
                ending = told or done == config.steps
                if done % config.log_every == 0 or ending or done == first + 1:
                    means = watch.look() | self._rates(done)
                    now = time.monotonic()
                    # Until the first step has been made, the programs were compiled.
                    speed = None if done == first + 1 else (done - seen) * config.batch_size / (now - since)
                    metrics.log(done, means, speed)
                    since, seen = now, done
                if done % config.checkpoint.every == 0 or ending:
                    watch.look()
                    saved = checkpoints.save(done, state, reader.get_state(), config.to_dict())
                    if told and not (saved and checkpoints.wait()):
                        raise UserError(f"stopped after step {done}, which could not be saved; {_kept(checkpoints)}")
                if told:
                    break
                if preview is not None and (done % preview.sample.every == 0 or ending):
                    preview.make(best_networks(self.setup, state), frozen, metrics, done)
                    since, seen = time.monotonic(), done
        except DivergedError as error:
            checkpoints.wait()
            setting = "self_forcing.critic" if str(error).startswith("critic/") else "optimizer"
            raise UserError(
                f"training has diverged: {error}; {_kept(checkpoints)}. A lower learning rate may help: "
                f"--set {setting}.learning_rate=..."
            ) from None
        return state

    def _fresh(self, params: Mapping[str, Any]) -> TrainState:
        first = self.setup.stage.players[0]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=dict(params),
            opt_state={player: self.optimizers[player].init(tree) for player, tree in params.items()},
            ema={} if self.config.ema is None else jax.tree.map(jnp.copy, params[first]),
        )

    def _reader(self) -> Any:
        return batches(
            self.setup.source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            transforms=self.setup.transforms,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _rates(self, done: int) -> dict[str, float]:
        """Return the learning rates after so many steps."""
        turns = self._turns(done)
        return {
            f"{player}/learning_rate": float(jnp.asarray(rate(turns[player]))) for player, rate in self.rates.items()
        }

    def _turns(self, steps: int) -> dict[str, int]:
        """Count how often each player learns in the first steps."""
        stage = self.setup.stage
        return {player: sum(player in stage.turn(step) for step in range(steps)) for player in stage.players}

    def _compare(self, before: Mapping[str, Any]) -> None:
        # Read and written again, a run that is older than an option has its default.
        older = TrainConfig.from_dict(before, "the run in this folder: train")
        then, now = _bound(older.to_dict()), _bound(self.config.to_dict())
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise UserError(
                    f"the run in this folder has {name} {then.get(name)!r}, this one {now.get(name)!r}; choose "
                    "another --output, or the same settings to go on"
                )


def best_networks(setup: Setup, state: TrainState) -> dict[str, Any]:
    """Return what a run exports: the first player's networks, averaged where an average is kept."""
    return state.ema or state.params[setup.stage.players[0]]


def _optimizer_settings(config: TrainConfig, player: str):
    return config.options.critic if player == "critic" else config.optimizer


def _bound(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may not change: of an optimizer its name alone."""
    return {
        name: value["name"] if name in OPTIMIZERS else _bound(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in FREE
    }


def _kept(checkpoints: Checkpoints) -> str:
    newest = checkpoints.latest
    return "there is no checkpoint yet" if newest is None else f"the last good checkpoint is that of step {newest}"


def _write_config(config: TrainConfig, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
