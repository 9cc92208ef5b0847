"""Looking at a run's numbers without waiting for the device at every step, and stopping it when they go wrong."""

import math
from collections import deque

import jax

from rfjax.errors import UserError
from rfjax.training.stage import Metrics

WINDOW = 20
"""Updates over which the mean of a loss is watched."""
DIVERGED = 50.0
"""A loss whose mean exceeds the lowest such mean so many times has diverged."""


class DivergedError(UserError):
    """The loss is not a number any more, or far above what it was."""


class Watch:
    """Collects the metrics of steps and gives their means."""

    def __init__(self):
        self._pending: list[tuple[int, Metrics]] = []
        self._recent: dict[str, deque[float]] = {}
        self._lowest: dict[str, float] = {}

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step, which may not be computed yet."""
        self._pending.append((step, metrics))

    def look(self) -> dict[str, float]:
        """Wait for the metrics taken since the last look and return their means.

        Raises:
            DivergedError: a number is not finite, or a loss has grown beyond all measure.
        """
        fetched = jax.device_get([metrics for _, metrics in self._pending])
        means: dict[str, list[float]] = {}
        for (step, _), metrics in zip(self._pending, fetched, strict=True):
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise DivergedError(f"{name} of step {step} is {value}")
                means.setdefault(name, []).append(float(value))
                if name.endswith("/loss"):
                    self._check_growth(name, float(value))
        self._pending.clear()
        return {name: sum(values) / len(values) for name, values in means.items()}

    def _check_growth(self, name: str, value: float) -> None:
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        recent.append(value)
        if len(recent) < WINDOW:
            return
        mean = sum(recent) / WINDOW
        lowest = self._lowest[name] = min(mean, self._lowest.get(name, mean))
        if mean > DIVERGED * lowest > 0:
            raise DivergedError(f"{name} has grown to {mean:.4g} from {lowest:.4g}, as means of {WINDOW} updates")
