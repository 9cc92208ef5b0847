"""Checkpoints of a run, training or generation: written in the background, complete or absent whenever it is killed.

FOLDER/00000200/state/             the arrays, one flat Orbax tree named by their paths in the state
FOLDER/00000200/record/metadata    JSON: their shapes, types and sums, the run's position and its settings
"""

import contextlib
import gc
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from rich.console import Console

from rfjax.errors import UserError, nearest
from rfjax.io.atomic import temporary_name
from rfjax.io.checkpoints import DamagedCheckpointError, open_arrays, readable

_UNFINISHED = (".*.part", "*.orbax-checkpoint-tmp*")
"""What a killed process leaves behind: checkpoints half removed, and half written."""
_DAMAGED = ".damaged"
_SHOWN = 200
"""Characters of a library's message that are worth a line."""


class Checkpoints:
    """The checkpoints of one run, used as a context manager: leaving it waits for the last one.

    On several processes every method is called on each, and the folder is one that all of them see.
    """

    def __init__(self, folder: Path, keep: int, report: Callable[[str], None] | None = None):
        """Describe the folder; nothing is made before the context is entered.

        Args:
            folder: Where the checkpoints are, or will be.
            keep: How many of the newest stay.
            report: Takes a line about a checkpoint that could not be saved or read; by default it goes to stderr.
        """
        self._folder = folder.absolute()
        self._keep = keep
        self._report = report or (lambda line: Console(stderr=True).print(line, markup=False, soft_wrap=True))
        self._pending: int | None = None
        self._quiet = contextlib.ExitStack()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    def save(self, step: int, state: Any, position: Any, settings: dict[str, Any]) -> bool:
        """Start to save a checkpoint, once the one before is done; `state` may be donated right after.

        Args:
            step: Names the checkpoint; where it exists already, nothing is done.
            state: Pytree of arrays.
            position: Where the run stands beside its arrays, JSON-able; equal on all processes.
            settings: What the run was started with, JSON-able.

        Returns:
            Whether saving was begun. A checkpoint that cannot be begun, or later not be finished, is reported in one
            line and leaves nothing behind, and the older ones stay.
        """
        self.wait()
        if step in self.steps:
            return True
        arrays = _by_path(state)
        record = {
            "arrays": {path: [list(leaf.shape), leaf.dtype.name] for path, leaf in arrays.items()},
            "sums": _sums(arrays),
            "position": position,
            "settings": settings,
        }
        parts = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record))
        self._pending = step
        try:
            self._writer.save(self._path(step), args=parts)
        except Exception as error:  # Orbax does not say what it may raise
            self._failed(error)
            return False
        return True

    def wait(self) -> bool:
        """Wait for the checkpoint that is being saved; then remove the oldest ones.

        Returns:
            False where it could not be saved.
        """
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return False
        if self._pending is not None:
            self._pending = None
            self._on_disk(lambda: [_remove(self._path(step)) for step in self.steps[: -self._keep]])
        return True

    def restore(self, step: int | None, like: Any) -> tuple[int, Any, Any]:
        """Read a checkpoint, every array straight to its sharding, which need not be that it was saved with.

        Args:
            step: The checkpoint's, or None for the newest one that is not damaged; those that are get another name.
            like: The state as `jax.ShapeDtypeStruct`s with shardings.

        Returns:
            The step, the state and the position.

        Raises:
            UserError: there is no checkpoint, all are damaged, or the state has other arrays, shapes or types.
        """
        steps = self.steps
        if step is not None and step not in steps:
            known = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"{self._folder} has no checkpoint of step {step}; {known}")
        for number in [step] if step is not None else reversed(steps):
            try:
                return number, *_read(self._path(number), like)
            except DamagedCheckpointError as error:
                if step is not None:
                    raise
                self.set_aside(number, error)
        self.check_none_damaged()
        raise UserError(f"{self._folder} has no checkpoint that can be restored")

    def settings(self, step: int) -> dict[str, Any]:
        """Return what the run that wrote a checkpoint was started with.

        Raises:
            UserError: the checkpoint is missing or damaged.
        """
        return _read_record(self._path(step))["settings"]

    def check_none_damaged(self) -> None:
        """Refuse to begin anew beside checkpoints that were set aside.

        Raises:
            UserError: there are such.
        """
        aside = sorted(path.name for path in self._folder.glob(f"*{_DAMAGED}"))
        if aside:
            raise UserError(
                f"{self._folder} has no checkpoint that can be restored, only {', '.join(aside)}; give one its former "
                f"name if it may be sound, or remove {'it' if len(aside) == 1 else 'them'} to begin anew"
            )

    def __enter__(self) -> "Checkpoints":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self._folder}: {error.strerror or error}") from None
        self._clean()
        self._quiet.enter_context(_quiet_orbax())
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.wait()
        self._writer.close()
        self._quiet.close()

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}"

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, the newest last."""
        return sorted(int(path.name) for path in self._folder.glob("*") if path.name.isdigit() and path.is_dir())

    def _failed(self, error: Exception) -> None:
        full = "RESOURCE_EXHAUSTED" in str(error) or "No space" in str(error)
        reason = "no space left on the disk" if full else _line(error)
        self._report(f"warning: the checkpoint of step {self._pending} is not saved: {reason}; the older ones stay")
        self._pending = None
        self._clean()

    def set_aside(self, step: int, error: Exception) -> None:
        """Give a damaged checkpoint another name and report it."""
        path = self._path(step)
        aside = path.with_name(f"{path.name}{_DAMAGED}")
        instead = ", and the one before is tried" if any(other < step for other in self.steps) else ""
        self._report(f"warning: {_line(error)}; it is now called {aside.name}{instead}")
        self._on_disk(lambda: (shutil.rmtree(aside, ignore_errors=True), path.rename(aside)))

    def _clean(self) -> None:
        self._on_disk(
            lambda: [
                shutil.rmtree(path, ignore_errors=True) for name in _UNFINISHED for path in self._folder.glob(name)
            ]
        )

    def _on_disk(self, change: Callable[[], object]) -> None:
        """Let one process change the folder, while the others wait."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                change()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("rfjax.io.run_checkpoints")


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep what Orbax says of a failing disk off the console; it raises as well, and that is reported in a line.

    The first write that fails ends its event loop. Of the others asyncio then finds some failed, some unfinished and
    some never begun, and says so by its logger, by warnings and by exceptions that nobody can catch.
    """
    loggers, previous = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def not_of_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "orbax" not in logging.Formatter().format(record)

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    for logger in loggers:
        logger.addFilter(not_of_orbax)
    sys.unraisablehook = hook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
            yield
            gc.collect()  # the event loops that failed say it when they are forgotten
    finally:
        sys.unraisablehook = previous
        for logger in loggers:
            logger.removeFilter(not_of_orbax)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN] or type(error).__name__


def _remove(path: Path) -> None:
    # Renamed first: what is half removed must not look complete.
    doomed = path.rename(temporary_name(path))
    shutil.rmtree(doomed, ignore_errors=True)


def _by_path(tree: Any) -> dict[str, Any]:
    """Arrays by their paths; those without elements, which cannot be stored, are left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves if leaf.size}


def _sums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """The sum of every array's bits as whole numbers modulo 2**32: any bit that flips on the disk changes it."""
    return {path: int(total) for path, total in jax.device_get(_bit_sums(arrays)).items()}


@jax.jit
def _bit_sums(arrays):
    def total(x):
        bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


def _read_record(folder: Path) -> dict[str, Any]:
    with readable(folder):
        record = json.loads((folder / "record" / "metadata").read_text(encoding="utf-8"))
        return {name: record[name] for name in ("arrays", "sums", "position", "settings")}


def _read(folder: Path, like: Any) -> tuple[Any, Any]:
    with _together():
        record = _read_record(folder)
    wanted = _by_path(like)
    _check_sizes(folder, record["arrays"], wanted)
    with _together():
        with readable(folder):
            stores = open_arrays(folder / "state", wanted)
        arrays = {path: _read_array(folder, stores[path], leaf) for path, leaf in wanted.items()}
    if _sums(arrays) != record["sums"]:
        raise DamagedCheckpointError(f"{folder} is damaged: its arrays are not those that were saved")
    found = iter(arrays.values())
    state = jax.tree.map(
        lambda leaf: next(found) if leaf.size else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        like,
    )
    return state, record["position"]


def _read_array(folder: Path, store: tensorstore.TensorStore, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    def read(index):
        with readable(folder):
            return store[index].read().result()

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Let the block fail on all processes if it does on one: they go on with the same checkpoint."""
    failure = None
    try:
        yield
    except DamagedCheckpointError as error:
        failure = error
    if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.array(failure is not None))):
        failure = failure or DamagedCheckpointError("the checkpoint is damaged, as another process found")
    if failure is not None:
        raise failure


def _check_sizes(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for path, leaf in wanted.items():
        if path not in found:
            raise UserError(f"the checkpoint {folder} lacks {path}, which this run has{nearest(path, found)}")
        shape, dtype = found[path]
        if tuple(shape) != leaf.shape or dtype != leaf.dtype.name:
            raise UserError(
                f"the checkpoint {folder} has {path} as {dtype}{list(shape)}; this run needs "
                f"{leaf.dtype.name}{list(leaf.shape)}"
            )
    for path in found.keys() - wanted.keys():
        raise UserError(f"the checkpoint {folder} has {path}, which this run has not{nearest(path, wanted)}")
