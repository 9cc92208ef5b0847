"""The work of `rfjax generate`: videos take their places in a batch, and leave them as files.

A place whose video has ended takes the next job. Chunks go into the video's file as they come and, where the state is
kept, into a reel, from which a later run writes the beginning of that file again.
"""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rfjax.commands.interruptions import Interruptions
from rfjax.commands.keeping import Keeper, Kept, KeptPlace, from_reel, to_reel, without_pixels
from rfjax.commands.plan import Plan
from rfjax.commands.progress import ChunkProgress
from rfjax.commands.records import write_records
from rfjax.io.manifest import Manifest
from rfjax.io.meanwhile import Aside
from rfjax.io.reels import DamagedReelError, Reel
from rfjax.io.video import VideoWriter
from rfjax.models.model import Model
from rfjax.sampling.batch import Batch, Dispatched, Occupant, Piece
from rfjax.sampling.budget import Budget
from rfjax.sampling.jobs import Job, steps_needed
from rfjax.sampling.pipeline import NotFiniteError, VideoChunk, keys_from_seed
from rfjax.sampling.rolling_batch import Fetched, RollingBatch
from rfjax.sampling.switching import Switch

OUT_OF_MEMORY = "the device ran out of memory"


@dataclasses.dataclass(frozen=True)
class Run:
    """What all batches share."""

    plan: Plan
    budget: Budget
    model: Model
    encode: Callable[[str], Float[Array, "1 T D"]]
    """From a prompt to its embeddings."""
    switches: list[Switch]
    """Changes of prompt, with embeddings of a single sample."""
    progress: ChunkProgress
    interruptions: Interruptions
    manifest: Manifest
    keeper: Keeper
    done: list[Job]
    """Videos that are complete; it grows."""

    def batch(self, places: int, latent_frames: int) -> Batch | RollingBatch:
        """Return empty places for videos of at most so many latent frames."""
        return empty_places(self.plan, self.model, self.switches, places, latent_frames)

    def occupant(self, job: Job) -> Occupant:
        """Return a job's video as it takes its place."""
        return Occupant(self.encode(job.prompt), keys_from_seed(self.plan.settings["seed"], [job.sample])[0])


def empty_places(
    plan: Plan, model: Model, switches: Sequence[Switch], places: int, latent_frames: int
) -> Batch | RollingBatch:
    """Return so many empty places, of the plan's sampler.

    Args:
        plan: of the run.
        model: that makes the videos.
        switches: changes of prompt, with embeddings of a single sample.
        places: videos made together.
        latent_frames: of the longest.
    """
    size = plan.video.latent_height, plan.video.latent_width
    shape = (places, latent_frames, *size, model.config.transformer.in_dim)
    if plan.sampler == "rolling":
        return RollingBatch(model, plan.policy, shape)
    repeated = [
        dataclasses.replace(switch, prompt_embeds=jnp.repeat(switch.prompt_embeds, places, axis=0))
        for switch in switches
    ]
    return Batch(model, plan.policy, shape, repeated)


def produce(run: Run) -> dict[Job, str]:
    """Make all missing videos; one that fails is tried once more, in a smaller batch.

    Returns:
        Why the videos failed that did so twice.

    Raises:
        UserError: a file cannot be written.
        KeyboardInterrupt: the run is told to stop; the state is kept if that was asked for.
    """
    plan, failures, tried = run.plan, {}, set()
    queue, places = collections.deque(plan.queue), plan.places
    kept = run.keeper.restore(run.batch)
    while queue:
        lost = _Production(run, places, queue, kept).work()
        kept, places = None, max(plan.devices, places // 2 // plan.devices * plan.devices)
        for job, reason in lost.items():
            if job in tried:
                failures[job] = reason
                run.manifest.failed(job.video, reason)
            else:
                tried.add(job)
                queue.append(job)
                run.manifest.pending(job.video)
    run.keeper.clear()
    return failures


@dataclasses.dataclass(eq=False)
class _Seat:
    """A video in its place."""

    job: Job
    length: int
    """Chunks of the video."""
    writer: VideoWriter
    reel: Reel | None
    sent: int = 0
    """Chunks that were dispatched."""
    made: list[VideoChunk] = dataclasses.field(default_factory=list)
    """Finished chunks, without their pixels."""
    lost: bool = False
    """Whether it failed; what is still on the way is ignored."""


class _Production:
    """One batch, until the queue is empty or the device's memory is not enough for so many places."""

    def __init__(self, run: Run, places: int, queue: collections.deque[Job], kept: Kept | None):
        longest = run.plan.settings["latent_frames"]
        self._run, self._queue, self._kept = run, queue, kept
        self._places = places if kept is None else len(kept.places)
        self._latent_frames = longest if kept is None else kept.latent_frames
        self._batch = run.batch(places, longest) if kept is None else kept.batch
        self._seats: dict[int, _Seat] = {}
        self._open: dict[_Seat, None] = {}
        """Videos that have begun and not ended; some have no place any more, but a chunk on its way."""
        self._pending: tuple[Dispatched | Fetched, dict[int, _Seat]] | None = None
        self._lost: dict[Job, str] = {}
        self._recording = Aside[_Seat]()
        """Complete videos whose records are being written, which takes as long as a chunk of a small model."""
        self._since = time.perf_counter()

    def work(self) -> dict[Job, str]:
        """Return the jobs that failed, with their reasons; those that were not begun stay in the queue."""
        try:
            self._restore()
            left = [seat.length - seat.sent for seat in self._seats.values()]
            queued = [self._chunks(job) for job in self._queue]
            self._run.progress.expect(steps_needed(left, queued, self._places))
            while self._queue or self._seats:
                self._run.interruptions.check()
                self._step()
            self._deliver()
            self._note_recorded(wait=True)
        except KeyboardInterrupt:
            self._keep()
            self._note_recorded(wait=True)
            raise
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self._lose(list(self._open), OUT_OF_MEMORY)
            self._note_recorded(wait=True)
        finally:
            for seat in self._open:
                seat.writer.abort()
            self._recording.close()
        return self._lost

    def _step(self) -> None:
        """Fill the places, dispatch a chunk of each, and take in the chunks before while the devices work."""
        self._admit()
        try:
            made = self._batch.step()
        except NotFiniteError as error:
            self._deliver()
            self._lose(list(self._seats.values()), str(error))
            return
        riding = dict(self._seats)
        for place, seat in riding.items():
            seat.sent += 1
            if seat.sent == seat.length:
                del self._seats[place]
        self._deliver()
        self._pending = made, riding
        if self._run.keeper.due():
            self._keep()

    def _admit(self) -> None:
        together = bool(self._run.switches) or self._run.plan.sampler == "rolling"
        if together and self._seats:
            return  # such videos begin together
        new: dict[int, Occupant] = {}
        for place in range(self._places):
            if self._queue and place not in self._seats:
                job = self._queue.popleft()
                self._seats[place] = self._seat(job)
                new[place] = self._run.occupant(job)
        if new:
            self._run.progress.label(self._numbers())
        self._batch.admit(new)

    def _seat(self, job: Job) -> _Seat:
        """Begin a video's files."""
        settings = self._run.plan.settings
        reel = self._run.keeper.reel(job) if self._run.keeper.every else None
        path = self._run.plan.output / job.video
        writer = VideoWriter(path, settings["height"], settings["width"], settings["fps"])
        seat = _Seat(job, self._chunks(job), writer, reel)
        self._open[seat] = None
        self._run.manifest.running(job.video, 0)
        return seat

    def _restore(self) -> None:
        """Go on with a kept state: its videos begin again from their reels, unless they are complete or not wanted."""
        if self._kept is None:
            return
        occupants: dict[int, Occupant] = {}
        for place, kept in enumerate(self._kept.places):
            if kept is None or kept.job not in self._queue:
                continue
            reel = self._run.keeper.reel(kept.job)
            seat = self._seat(kept.job)
            try:
                for frames, chunk in map(from_reel, reel.chunks(kept.chunk)):
                    seat.writer.write(frames)
                    seat.made.append(chunk)
            except DamagedReelError as error:
                print(f"rfjax: warning: {error}; {kept.job.video} begins anew", file=sys.stderr)
                self._close(seat)
                continue
            seat.sent = kept.chunk
            self._queue.remove(kept.job)
            self._seats[place] = seat
            occupants[place] = self._run.occupant(kept.job)
            self._run.manifest.running(kept.job.video, kept.chunk)
        # An empty place is at the chunk of the others, which may all have begun together.
        some = next((kept.chunk for kept in self._kept.places if kept is not None), 0)
        chunks = [some if kept is None else kept.chunk for kept in self._kept.places]
        assert isinstance(self._batch, Batch)
        self._batch.restore(occupants, chunks, self._kept.state)
        if self._seats:
            self._run.progress.label(self._numbers())

    def _deliver(self) -> None:
        """Take in the chunks that were dispatched last."""
        if self._pending is None:
            return
        made, riding = self._pending
        pieces = made.fetch()
        self._pending, now = None, time.perf_counter()
        seconds, self._since = now - self._since, now
        riding = {place: seat for place, seat in riding.items() if not seat.lost}
        for place, seat in riding.items():
            if pieces[place].finite:
                self._take(seat, pieces[place], seconds)
            else:
                self._lose([seat], self._not_finite(seat))
        self._run.progress.advance(sum(len(pieces[place].frames) for place in riding))
        self._note_recorded()

    def _take(self, seat: _Seat, piece: Piece, seconds: float) -> None:
        seat.writer.write(piece.frames)
        if seat.reel is not None:
            seat.reel.add(len(seat.made), to_reel(piece.frames, piece.trace, seconds))
        seat.made.append(without_pixels(piece.frames, piece.trace, seconds))
        if len(seat.made) < seat.length:
            self._run.manifest.running(seat.job.video, len(seat.made))
            return
        seat.writer.close()
        del self._open[seat]
        given = self._run.plan.of(seat.job), self._run.budget, seat.made, {0: seat.job}, self._places
        self._recording.begin(seat, functools.partial(write_records, *given))

    def _note_recorded(self, wait: bool = False) -> None:
        """Note which complete videos have their records."""
        for seat in self._recording.ended(wait):
            self._run.manifest.done(seat.job.video)
            self._run.done.append(seat.job)
            if seat.reel is not None:
                seat.reel.remove()

    def _keep(self) -> None:
        """Keep the state after the last chunk that was dispatched, where states are kept."""
        keeper, batch = self._run.keeper, self._batch
        if not keeper.every or batch.state is None:
            return
        self._deliver()
        seats = [self._seats.get(place) for place in range(self._places)]
        places = [None if seat is None else KeptPlace(seat.job, seat.sent) for seat in seats]
        keeper.save(batch.state, places, self._latent_frames)

    def _lose(self, seats: list[_Seat], reason: str) -> None:
        for seat in seats:
            self._lost[seat.job] = reason
            self._close(seat)
        self._seats = {place: seat for place, seat in self._seats.items() if not seat.lost}

    def _close(self, seat: _Seat) -> None:
        seat.lost = True
        seat.writer.abort()
        self._open.pop(seat, None)
        if seat.reel is not None:
            seat.reel.remove()

    def _chunks(self, job: Job) -> int:
        return job.latent_frames // self._run.plan.config.chunk_frames

    def _not_finite(self, seat: _Seat) -> str:
        index, size = len(seat.made), self._run.plan.config.chunk_frames
        return (
            f"the latents of chunk {index + 1} of {seat.length} (latent frames {index * size} to "
            f"{(index + 1) * size - 1}) hold NaN or infinity; try --dtype float32, or check the checkpoint's weights"
        )

    def _numbers(self) -> str:
        """Say which of the videos are being made."""
        done, count = len(self._run.done) + len(self._recording), len(self._seats)
        total = len(self._run.plan.missing)
        return f"video {done + 1} of {total}" if count == 1 else f"videos {done + 1}-{done + count} of {total}"
