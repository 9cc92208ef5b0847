"""What lets `rfjax generate` go on inside its videos: the batch's state, kept now and then in the output folder.

OUTPUT/.rfjax/process-K/state/   the newest states of process K, from `rfjax.io.run_checkpoints`
OUTPUT/.rfjax/process-K/reels/   the finished chunks of its unfinished videos, a folder each
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rfjax.commands.plan import Plan
from rfjax.errors import UserError
from rfjax.io.checkpoints import DamagedCheckpointError
from rfjax.io.outputs import differing
from rfjax.io.reels import DamagedReelError, Reel
from rfjax.io.reports import working_folder
from rfjax.io.run_checkpoints import Checkpoints
from rfjax.memory import Trace
from rfjax.sampling.batch import Batch, BatchState
from rfjax.sampling.jobs import Job
from rfjax.sampling.pipeline import VideoChunk
from rfjax.sampling.rolling_batch import RollingBatch

_OF_STATE = {"places", "latent_frames"}
"""Settings of a state that are not the run's."""
_KEPT = 2
"""States that stay: if the newest is damaged, there is the one before."""


@dataclasses.dataclass(frozen=True)
class KeptPlace:
    """A place of a batch whose state was kept."""

    job: Job
    chunk: int
    """Index of the chunk to come."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """A batch whose state was kept."""

    batch: Batch
    """As new, without its state."""
    latent_frames: int
    """Of the longest video that it may take."""
    state: BatchState
    places: list[KeptPlace | None]


class Keeper:
    """The kept states of one process, used as a context manager; leaving it waits for the last one."""

    def __init__(self, plan: Plan, every: int):
        """Describe them.

        Args:
            plan: of the run.
            every: chunks of the batch between two states; 0 keeps none, but goes on with one that is there.
        """
        self.every = every
        self._plan = plan
        self._folder = _folder(plan)
        self._stack = contextlib.ExitStack()
        self._checkpoints: Checkpoints | None = None
        self._steps = 0

    def restore(self, make: Callable[[int, int], Batch | RollingBatch]) -> Kept | None:
        """Return the newest state that is not damaged, or None.

        Args:
            make: makes a batch of so many places for videos of at most so many latent frames.

        Raises:
            UserError: the state belongs to a run with other settings.
        """
        checkpoints = self._checkpoints
        while checkpoints is not None and (step := checkpoints.latest) is not None:
            try:
                settings = checkpoints.settings(step)
                _check_same(self._plan, settings)
                frames = settings["latent_frames"]
                batch = make(settings["places"], frames)
                assert isinstance(batch, Batch), "the settings hold the sampler, and no other keeps a state"
                _, state, position = checkpoints.restore(step, batch.state_like())
                return Kept(batch, frames, state, [_place(entry) for entry in position])
            except DamagedCheckpointError as error:
                checkpoints.set_aside(step, error)
        return None

    def due(self) -> bool:
        """Count a chunk of the batch, and tell whether its state is to be kept now."""
        self._steps += 1
        return self.every > 0 and self._steps % self.every == 0

    def save(self, state: BatchState, places: Sequence[KeptPlace | None], latent_frames: int) -> None:
        """Begin to keep a state; it may be donated right after. If it cannot be written, a warning says so."""
        assert self._checkpoints is not None
        self._checkpoints.wait()  # until then the newest is not the last
        settings = _settings(self._plan) | {"places": len(places), "latent_frames": latent_frames}
        position = [None if place is None else dataclasses.asdict(place) for place in places]
        self._checkpoints.save((self._checkpoints.latest or 0) + 1, state, position, settings)

    def reel(self, job: Job) -> Reel:
        """Return where the chunks of an unfinished video are."""
        return Reel(self._folder / "reels" / hashlib.sha256(job.video.encode()).hexdigest()[:16])

    def clear(self) -> None:
        """Remove what is kept: nothing is unfinished any more."""
        self._close()
        discard(self._plan)

    def __enter__(self) -> "Keeper":
        if self.every or _states(self._plan).exists():
            checkpoints = Checkpoints(_states(self._plan), _KEPT)
            self._checkpoints = self._stack.enter_context(checkpoints)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._stack.close()
        self._checkpoints = None


def as_kept(plan: Plan) -> Plan:
    """Return the plan with as many places as the state has that the output folder keeps, on as many devices as divide.

    Raises:
        UserError: that state belongs to a run with other settings.
    """
    folder = _states(plan)
    if not folder.exists():
        return plan
    settings = _newest(Checkpoints(folder, _KEPT))
    if settings is None:
        return plan
    _check_same(plan, settings)
    places = settings["places"]
    devices = next(count for count in range(plan.devices, 0, -1) if places % count == 0)
    return dataclasses.replace(plan, places=places, mesh=dataclasses.replace(plan.mesh, data=devices))


def _newest(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return the settings of the newest state whose record can be read; `Keeper.restore` speaks of the others."""
    for step in reversed(checkpoints.steps):
        with contextlib.suppress(DamagedCheckpointError):
            return checkpoints.settings(step)
    return None


def discard(plan: Plan) -> None:
    """Remove what was kept."""
    for name in ("state", "reels"):
        shutil.rmtree(_folder(plan) / name, ignore_errors=True)


def to_reel(frames: np.ndarray, trace: Trace, seconds: float) -> dict[str, np.ndarray]:
    """Return a chunk as named arrays."""
    parts = {f"trace.{field.name}": np.asarray(getattr(trace, field.name)) for field in dataclasses.fields(trace)}
    return {"frames": frames, "seconds": np.asarray(seconds), **parts}


def from_reel(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, VideoChunk]:
    """Return the frames of a chunk from a reel, and the chunk without them.

    Raises:
        DamagedReelError: it lacks something.
    """
    parts: dict[str, Any] = {
        name.removeprefix("trace."): jnp.asarray(array) for name, array in arrays.items() if name.startswith("trace.")
    }
    try:
        return arrays["frames"], without_pixels(arrays["frames"], Trace(**parts), float(arrays["seconds"]))
    except (KeyError, TypeError) as error:
        raise DamagedReelError(f"a finished chunk lacks a part ({error})") from None


def without_pixels(frames: np.ndarray, trace: Trace, seconds: float) -> VideoChunk:
    """Return what a record needs of a chunk; a view of the frames would keep them."""
    return VideoChunk(frames[None, :0].copy(), trace, seconds)


def _folder(plan: Plan) -> Path:
    return working_folder(plan.output, plan.processes.index)


def _states(plan: Plan) -> Path:
    return _folder(plan) / "state"


def _settings(plan: Plan) -> dict[str, Any]:
    """What a state depends on; videos in it may have any lengths."""
    return {name: value for name, value in plan.settings.items() if name != "latent_frames"}


def _check_same(plan: Plan, stored: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(_settings(plan)))
    for name in (*wanted, *(stored.keys() - _OF_STATE)):
        there, here = stored.get(name), wanted.get(name)
        if there != here:
            raise UserError(
                f"{plan.output} keeps the state of {differing(name, there, here)}; choose another --output, or "
                "--overwrite to begin anew"
            )
    frames, longest = plan.settings["latent_frames"], stored["latent_frames"]
    if frames > longest:
        raise UserError(
            f"{plan.output} keeps the state of videos of at most {longest} latent frames, this run asks for {frames}; "
            "finish that run first, choose another --output, or --overwrite to begin anew"
        )


def _place(entry: dict[str, Any] | None) -> KeptPlace | None:
    return None if entry is None else KeptPlace(Job(**entry["job"]), entry["chunk"])
