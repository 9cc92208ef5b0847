"""How things are measured: compiled ahead, run in turns, taken at the median."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A function compiled for its arguments."""

    call: Any
    """Takes the arguments that are not static."""
    seconds: float
    """What tracing and compiling took."""


def compile_ahead(function: Any, *arguments: Any) -> Compiled:
    """Compile a jitted function for arguments; leading static ones are given here alone."""
    since = time.perf_counter()
    call = function.lower(*arguments).compile()
    return Compiled(call, time.perf_counter() - since)


def in_turns(
    tasks: Mapping[Name, Callable[[], Any]], rounds: Mapping[Name, int], on_round: Callable[[int, int], None]
) -> dict[Name, list[float]]:
    """Return the durations of each task in seconds, until its results are there.

    All tasks run once before any runs again, so that a slow spell of the machine falls on all of them; the first round
    warms up and does not count.

    Args:
        tasks: return what is to be waited for.
        rounds: how many times each is measured; those measured less often sit the last rounds out.
        on_round: is told each round's number, 0 for the warm-up, and that of the last.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in tasks}
    last = max(rounds.values())
    for number in range(last + 1):
        on_round(number, last)
        for name, task in tasks.items():
            if number > rounds[name]:
                continue
            since = time.perf_counter()
            jax.block_until_ready(task())
            if number:
                seconds[name].append(time.perf_counter() - since)
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median of the ratios of two tasks, round by round: what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
