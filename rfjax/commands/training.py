"""What `rfjax train` does around the loop: the folder, the signals, the export."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from rfjax.commands.interruptions import Interruptions, Terminated
from rfjax.errors import UserError
from rfjax.io.outputs import make_folder
from rfjax.io.ownership import owning
from rfjax.models.functional import Params
from rfjax.parallel.processes import ALONE, Processes
from rfjax.sampling.budget import out_of_memory_says
from rfjax.training.config import TrainConfig
from rfjax.training.export import export
from rfjax.training.loop import CHECKPOINTS, best_networks, mesh_of, train
from rfjax.training.setup import Setup, prepare

MODEL = "model"
_LESS_MEMORY = "a larger accumulate (both with --set) or mesh.fsdp on more devices need less"


def run(config: TrainConfig, folder: Path, processes: Processes | None = ALONE) -> None:
    """Train a stage in a folder and export its model.

    Args:
        config: of the run.
        folder: of the run.
        processes: that train together; None asks the cluster who they are.

    Raises:
        UserError: an input is wrong, the folder cannot be written or is another run's now, or the loss diverged.
        KeyboardInterrupt: Ctrl-C was pressed, or `Terminated` by SIGTERM before the first step or after the last; the
            state is saved.
    """
    _keep_cpu()
    if processes != ALONE:
        _join(processes)
    if config.sample is not None and jax.process_count() > 1:
        raise UserError("several processes make no sample videos; leave sample out with --set sample=null")
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)
    mesh = mesh_of(config)
    smaller = "data.crop" if config.stage == "vae" else "remat"
    # Whole networks are loaded; the first device alone would have to hold all of them.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        setup = prepare(config)
    with _first_process_owning(folder), out_of_memory_says(f"{smaller}, {_LESS_MEMORY}"):
        _train(config, setup, mesh, folder, console)


def _train(config: TrainConfig, setup: Setup, mesh: jax.sharding.Mesh, folder: Path, console: Console) -> None:
    """Train until the end or a signal, and export at the end."""
    console.print(_summary(config, setup.params), markup=False)
    began = time.monotonic()
    with Interruptions() as interruptions:
        state = train(config, setup, mesh, folder, console, lambda: _anyone(interruptions.noted is not None))
        done = int(state.step)
        if done < config.steps:
            console.print(f"stopped after step {done} of {config.steps}, which is saved; the same command goes on")
            with contextlib.suppress(Terminated):
                interruptions.check()
            return
    networks = _whole(best_networks(setup, state))
    if jax.process_index() == 0:
        export(config, setup, networks, folder / MODEL)
        console.print(f"{folder / MODEL} after {time.monotonic() - began:.0f} s", markup=False)
    if jax.process_count() > 1:  # JAX ends a process that writes while the others have left
        multihost_utils.sync_global_devices("rfjax.commands.training")


def _keep_cpu() -> None:
    """Let JAX have the CPU, on which networks are loaded, where JAX_PLATFORMS names other devices alone."""
    platforms = jax.config.values["jax_platforms"]
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def _join(processes: Processes | None) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        if processes is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(processes.address, processes.count, processes.index)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--processes found no others (auto: of a TPU pod slice or Slurm): {reason}") from None


def _anyone(noted: bool) -> bool:
    """Whether it is so in any process: all save and leave after the same step."""
    return noted if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(noted)).any())


def _whole(networks: Params) -> Params:
    """Copy to the host what may lie on the devices of several."""
    if jax.process_count() == 1:
        return jax.device_get(networks)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), networks)


def _first_process_owning(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Make the folder and keep it for this run; of several processes the first does."""
    if jax.process_index():
        return contextlib.nullcontext()
    make_folder(folder)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if names and CHECKPOINTS not in names:
        raise UserError(
            f"--output {folder} holds {names[0]} but no run; an empty folder is needed, or that of a run to go on with"
        )
    return owning(folder)


def _summary(config: TrainConfig, params: dict[str, dict[str, Params]]) -> str:
    """Say what learns, on what."""
    sizes = {
        name if player in ("model", "generator") else player: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for player, networks in params.items()
        for name, tree in networks.items()
    }
    networks = ", ".join(f"{name} {size / 1e6:.1f}M" for name, size in sizes.items())
    device = jax.devices()[0]
    return (
        f"{config.stage}: {networks} parameters; {config.steps} steps of {config.batch_size} on "
        f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    )
