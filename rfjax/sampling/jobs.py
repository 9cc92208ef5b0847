"""Which videos a run makes, and how they are given to the places of a batch."""

import dataclasses
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from rfjax.io.names import video_name

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to be made."""

    prompt: str
    sample: int
    """Number of the video among those of its prompt, from 0; it chooses the noise."""
    latent_frames: int
    """Length."""

    @property
    def video(self) -> str:
        """File name of the video."""
        return video_name(self.prompt, self.sample)


def expand(lengths: Mapping[str, int], samples: int) -> list[Job]:
    """Return the jobs of `samples` videos a prompt, prompt by prompt, from the latent frames of each prompt."""
    return [Job(prompt, sample, frames) for prompt, frames in lengths.items() for sample in range(samples)]


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """Order jobs so that the places of a batch become empty at about the same time; equal ones keep their order."""
    return sorted(jobs, key=lambda job: -job.latent_frames)


def places_for(count: int, batch_size: int, devices: int = 1) -> int:
    """Return how many of `count` videos to make together: no more than need be for the fewest rounds of equal videos.

    Args:
        count: videos to be made.
        batch_size: the most that a device works on together.
        devices: that share them; the result is a multiple of their number.
    """
    rounds = max(1, math.ceil(count / (batch_size * devices)))
    return max(1, math.ceil(count / (rounds * devices))) * devices


def steps_needed(seated: Iterable[int], queued: Iterable[int], places: int) -> int:
    """Return how many chunks a batch takes, if a place whose video has ended takes the next.

    Args:
        seated: chunks that are left of the videos in their places.
        queued: chunks of those that wait, in the order in which they are taken.
        places: of the batch.
    """
    ends = list(seated)
    ends += [0] * (places - len(ends))
    heapq.heapify(ends)
    for chunks in queued:
        heapq.heapreplace(ends, ends[0] + chunks)
    return max(ends)


def batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Split whatever is made together into the fewest batches, as equal as can be.

    Since a program is compiled for one batch size, all batches have the same: the last is filled up by repeating its
    last item.
    """
    if not items:
        return []
    size = places_for(len(items), batch_size)
    filled = [*items, *[items[-1]] * (-len(items) % size)]
    return [filled[i : i + size] for i in range(0, len(filled), size)]
