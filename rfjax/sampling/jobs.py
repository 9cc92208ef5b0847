"""Which videos a run makes, and in what batches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

from rfjax.io.names import video_name

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to be made."""

    prompt: str
    sample: int
    """Number of the video among those of its prompt, from 0; it chooses the noise."""

    @property
    def video(self) -> str:
        """File name of the video."""
        return video_name(self.prompt, self.sample)


def expand(prompts: Sequence[str], samples: int) -> list[Job]:
    """Return the jobs of `samples` videos a prompt, prompt by prompt; a repeated prompt counts once."""
    return [Job(prompt, sample) for prompt in dict.fromkeys(prompts) for sample in range(samples)]


def batches(items: Sequence[Item], batch_size: int, devices: int = 1) -> list[list[Item]]:
    """Split jobs, or whatever is made together, into the fewest batches, as equal as can be.

    Since a program is compiled for one batch size, all batches have the same: the last is filled up by repeating its
    last item.

    Args:
        items: to be split.
        batch_size: the most items that a device works on together.
        devices: that share each batch; its size is a multiple of their number.
    """
    if not items:
        return []
    count = math.ceil(len(items) / (batch_size * devices))
    size = math.ceil(len(items) / (count * devices)) * devices
    filled = [*items, *[items[-1]] * (count * size - len(items))]
    return [filled[i : i + size] for i in range(0, len(filled), size)]
