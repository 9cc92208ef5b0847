"""How strongly a video returns to what it has shown before."""

from collections import deque
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8

WINDOW_SECONDS = 1.0
"""Length of the stretches of video that are compared."""
LAG_SECONDS = 2.0
"""Age that a stretch has at least, to count as earlier."""
SIDE = 32
"""Pixels of the longer side of the lumas that are compared."""
FLOOR = 2.0
"""Change in grey levels (root mean square) below which a return counts less, down to nothing in a still video."""
_BLOCK = 128
"""Frames whose distances to all others are in memory at a time."""


def returns(lumas: UInt8[np.ndarray, "T h w"], fps: float | int) -> Float[np.ndarray, "T"]:
    """Return how strongly the second of video that ends with each frame returns to an earlier one, in [0, 1].

    With d(s, t) the root mean square difference of the seconds that end with s and t, and m(s, t) the mean of d(u, t)
    over all u between s and t:

        R(t) = max over s <= t - 2 seconds of (m(s, t) - d(s, t)) / max(m(s, t), FLOOR), at least 0

    It is 1 where the video is again what it was, after having been something else; 0 where it only moves on, or stands
    still; NaN in the first 3 seconds, which have nothing to be compared with. It reads a self-similarity matrix as
    Cutler and Davis do ("Robust real-time periodic motion detection", IEEE TPAMI 2000), without assuming one period.
    """
    window, lag = max(round(WINDOW_SECONDS * fps), 1), max(round(LAG_SECONDS * fps), 2)
    result = np.full(len(lumas), np.nan)
    for t, squares in enumerate(_window_distances(lumas.reshape(len(lumas), -1), window)):
        earlier = t - lag - window + 2  # whole windows that are old enough
        if earlier < 1:
            continue
        distances = np.sqrt(squares[window - 1 :] / (window * lumas[0].size))
        since = np.cumsum(distances[::-1])[::-1]
        between = np.arange(t - window, lag - 2, -1)
        distances, since = distances[:earlier], since[:earlier]
        mean = (since - distances) / between
        result[t] = np.max((mean - distances) / np.maximum(mean, FLOOR), initial=0)
    return result


def _window_distances(vectors: UInt8[np.ndarray, "T N"], window: int) -> Iterator[Float[np.ndarray, "S"]]:
    """Yield, for each t, the squared distances between the windows that end with t and with every s up to t.

    A window's distance is the sum along a diagonal of the frames' distances; entries s < window - 1 are no whole
    windows. All numbers are whole and below 2^53, so that equal windows are exactly 0 apart.
    """
    total = np.zeros(len(vectors))
    held: deque[np.ndarray] = deque()
    for t, row in enumerate(_frame_distances(vectors)):
        total[1 : t + 1] = total[:t].copy()
        total[0] = 0
        total[: t + 1] += row
        held.append(row)
        if len(held) > window:
            total[window : t + 1] -= held.popleft()
        yield total[: t + 1]


def _frame_distances(vectors: UInt8[np.ndarray, "T N"]) -> Iterator[Float[np.ndarray, "S"]]:
    """Yield, for each t, the squared distances of frame t to the frames up to itself."""
    squares = np.zeros(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        stop = min(start + _BLOCK, len(vectors))
        seen = vectors[:stop].astype(np.float64)
        squares[start:stop] = (seen[start:] ** 2).sum(axis=1)
        distances = squares[start:stop, None] + squares[:stop] - 2 * (seen[start:] @ seen.T)
        for t in range(start, stop):
            yield distances[t - start, : t + 1]
