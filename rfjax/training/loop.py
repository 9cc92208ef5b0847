"""The one loop of all stages: read, learn, watch, save; a run that was killed goes on as if it had not been."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from rfjax.data.reading import batches
from rfjax.errors import UserError
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
FREE = ("description", "steps", "mesh", "checkpoint", "log_every", "sample")
"""Settings that a run which goes on may change."""


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
        folder: of the run: its checkpoints, metrics and sample videos.
        console: for the metrics.
        stop: asked between steps; where it is true the state is saved and returned.

    Returns:
        The state after the last step done, which is saved.

    Raises:
        UserError: the folder holds another run, or the loss diverged; the last good checkpoint is kept then.
    """
    run = _Run(config, setup, mesh)
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep) as checkpoints,
        Metrics(folder, console, config.steps) as metrics,
    ):
        return run.learn(checkpoints, metrics, stop)


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

    def learn(self, checkpoints: Checkpoints, metrics: Metrics, stop: Callable[[], bool]) -> TrainState:
        """Go from the newest checkpoint, or the beginning, to the last step."""
        config, stage = self.config, self.setup.stage
        reader = self._reader()
        state, first = self._begin(checkpoints, reader)
        metrics.begin(first)
        frozen = place(self.setup.frozen, parameter_sharding(self.mesh, self.setup.frozen))
        preview = config.sample and Preview(config, self.setup, config.sample)
        watch, since, seen = Watch(), time.monotonic(), first
        try:
            for step in range(first, config.steps):
                batch = global_batch(self.mesh, next(reader))
                for player in stage.turn(step):
                    state, numbers = self.updates[player](state, frozen, batch, step)
                    watch.add(step + 1, numbers)
                done, ending = step + 1, stop() or step + 1 == config.steps
                if done % config.log_every == 0 or ending or done == first + 1:
                    means = watch.look() | self._rates(done)
                    now = time.monotonic()
                    metrics.log(done, means, (done - seen) * config.batch_size / (now - since))
                    since, seen = now, done
                if preview is not None and (done % preview.sample.every == 0 or done == config.steps):
                    preview.make(best_networks(self.setup, state), frozen, metrics, done)
                    since, seen = time.monotonic(), done
                if done % config.checkpoint.every == 0 or ending:
                    watch.look()
                    checkpoints.save(done, state, reader.get_state(), config.to_dict())
                if ending:
                    break
        except DivergedError as error:
            checkpoints.wait()
            kept = checkpoints.latest
            last = "there is no checkpoint yet" if kept is None else f"the last good checkpoint is that of step {kept}"
            raise UserError(f"training has diverged: {error}; {last}. A lower learning rate may help") from None
        return state

    def _fresh(self, params: Mapping[str, Any]) -> TrainState:
        first = self.setup.stage.players[0]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=dict(params),
            opt_state={player: self.optimizers[player].init(tree) for player, tree in params.items()},
            ema={} if self.config.ema is None else jax.tree.map(jnp.copy, params[first]),
        )

    def _begin(self, checkpoints: Checkpoints, reader: Any) -> tuple[TrainState, int]:
        if checkpoints.latest is None:
            fresh = jax.jit(self._fresh, out_shardings=self.shardings)
            return fresh(place(self.setup.params, self.shardings.params)), 0
        step, state, position = checkpoints.restore(None, self.like)
        self._compare(checkpoints.settings(step))
        reader.set_state(position)
        return state, step

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
        now = self.config.to_dict()
        for name in sorted((before.keys() | now.keys()) - set(FREE)):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"the run in this folder has {name} {before.get(name)!r}, this one {now.get(name)!r}; choose "
                    "another --output, or the same settings to go on"
                )


def best_networks(setup: Setup, state: TrainState) -> dict[str, Any]:
    """Return what a run exports: the first player's networks, averaged where an average is kept."""
    return state.ema or state.params[setup.stage.players[0]]


def _optimizer_settings(config: TrainConfig, player: str):
    return config.options.critic if player == "critic" else config.optimizer
