"""Whether a video of moving shapes shows what was asked for, and how it moves, flickers and drifts.

Things are read `PER_SECOND` times a second by `rfjax.evaluation.shapes`; a video is measured in windows of
`WINDOW_SECONDS`. Lengths are in heights of the picture.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from rfjax.data.shapes import FPS, Scene
from rfjax.errors import UserError
from rfjax.evaluation.frames import opencv
from rfjax.evaluation.shapes import Reading, Thing, backdrop_mask, lab, read_frame

Rgb = tuple[float, float, float]

PER_SECOND = 4
"""Pictures a second in which things are looked for."""
WINDOW_SECONDS = 5
MOST = 0.75
"""Least share of a window's pictures that have to be right."""
DECIDED = 0.1
"""Least share of a window's pictures in which a thing's kind can be told, others hiding it in the rest."""
JUMP = 0.5
"""Least way in heights from one picture that is read to the next that is no motion; the data's are below 0.13."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What was measured in a window; NaN is what nothing could be measured for."""

    seconds: int
    """Where in the video the window ends."""
    things: bool
    """Whether it shows every thing in its colour and kind, and no other thing."""
    colours: bool
    """Whether it shows things of the colours asked for and no others, of whatever kinds."""
    kinds: bool
    """Whether it shows things of the kinds asked for, of whatever colours."""
    background: bool
    """Whether the background is the one asked for."""
    motion: float
    """Mean speed of things in heights a second; turning in place is none."""
    jumps: float
    """Share of steps that are jumps."""
    flicker: float
    """Mean absolute difference in luma of neighbouring frames where both show the backdrop, as share of the range."""
    area_change: float
    """Mean relative change of a thing's area from one picture that is read to the next."""
    background_drift: float
    """Distance of the background's colour to that in the first second of the video, in CIELAB units."""
    colour_drift: float
    """The same of the things, by the names of their colours."""


def measure_windows(frames: UInt8[np.ndarray, "T H W 3"], scene: Scene) -> list[Window]:
    """Measure a video of `FPS` frames a second in whole windows.

    Args:
        frames: the video.
        scene: what was asked for; its motions do not matter, except that all things have to stay.

    Raises:
        UserError: the video is shorter than a window, or OpenCV is not installed.
    """
    length = WINDOW_SECONDS * FPS
    if len(frames) < length:
        raise UserError(f"a video of {len(frames)} frames was to be measured; {length} or more are needed")
    readings = read_video(frames)
    count = WINDOW_SECONDS * PER_SECOND
    return [
        Window(
            seconds=(index + 1) * WINDOW_SECONDS,
            **shown(part := readings[index * count : (index + 1) * count], scene),
            **_steps(part),
            flicker=flicker(frames[index * length : (index + 1) * length]),
            **drift(readings[:PER_SECOND], part),
        )
        for index in range(len(frames) // length)
    ]


def read_video(frames: UInt8[np.ndarray, "T H W 3"]) -> list[Reading]:
    """Read `PER_SECOND` pictures a second of a video of `FPS` frames a second."""
    return [read_frame(frame) for frame in frames[:: FPS // PER_SECOND]]


def shown(readings: Sequence[Reading], scene: Scene) -> dict[str, Any]:
    """Tell what a stretch of video shows of a scene: the truth fields of `Window`.

    A thing is shown when its colour is there in most of the pictures and has its kind in most of those in which the
    kind can be told, which must not be too few. Most is `MOST`; a kind cannot be told where another thing hides a part.
    """
    colours = {shape.colour for shape in scene.shapes}
    present = all(_share([bool(_of(r, colour)) for r in readings]) >= MOST for colour in colours)
    alone = _share([not _others(r, colours) for r in readings]) >= MOST
    kinds = collections.Counter(shape.kind for shape in scene.shapes)
    return {
        "things": present and alone and all(_has_kind(readings, shape.colour, shape.kind) for shape in scene.shapes),
        "colours": present and alone,
        "kinds": _mostly([None if any(t.undecided for t in r.things) else kinds <= _kinds(r) for r in readings]),
        "background": _share([r.background == scene.background for r in readings]) >= MOST,
    }


def _has_kind(readings: Sequence[Reading], colour: str, kind: str) -> bool:
    """Tell whether most things of a colour are of that kind."""
    seen = [things for reading in readings if (things := _of(reading, colour))]
    return _mostly([None if things[0].undecided else things[0].kind == kind for things in seen], len(readings))


def _of(reading: Reading, colour: str) -> list[Thing]:
    """Return the things of a colour, the largest first."""
    return sorted((t for t in reading.things if t.colour == colour), key=lambda thing: -thing.area)


def _others(reading: Reading, colours: set[str]) -> bool:
    """Tell whether there are things of other colours, or two of one."""
    named = [thing.colour for thing in reading.things]
    return len(set(named)) < len(named) or not set(named) <= colours


def _kinds(reading: Reading) -> collections.Counter:
    return collections.Counter(thing.kind for thing in reading.things)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _mostly(right: Sequence[bool | None], pictures: int | None = None) -> bool:
    """Tell whether most of what is decided is right, and enough of all pictures is."""
    decided = [value for value in right if value is not None]
    return len(decided) >= DECIDED * (pictures or len(right)) and _share(decided) >= MOST


def _whole(reading: Reading) -> dict[str | None, Thing]:
    """Return the things that nothing hides, by their colours, of which each is the only one."""
    named = collections.Counter(thing.colour for thing in reading.things)
    return {thing.colour: thing for thing in reading.things if not thing.hidden and named[thing.colour] == 1}


def _steps(readings: Sequence[Reading]) -> dict[str, Any]:
    """Return what is measured on a thing in neighbouring pictures: fields of `Window`."""
    neighbours = itertools.pairwise([_whole(reading) for reading in readings])
    pairs = [(first[name], second[name]) for first, second in neighbours for name in first.keys() & second.keys()]
    ways = np.array([np.subtract(second.centre, first.centre) for first, second in pairs]).reshape(-1, 2)
    lengths = np.hypot(*ways.T)
    areas = [abs(second.area - first.area) / first.area for first, second in pairs]
    return {
        "motion": _mean(lengths[lengths < JUMP]) * PER_SECOND,
        "jumps": _mean(lengths >= JUMP),
        "area_change": _mean(areas),
    }


def flicker(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return how much the backdrop changes: the field of `Window`."""
    cv2 = opencv()
    lumas = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255 for frame in frames]
    masks = [backdrop_mask(frame) for frame in frames]
    pairs = zip(itertools.pairwise(lumas), itertools.pairwise(masks), strict=True)
    return _mean([_mean(np.abs(second - first)[both & mask]) for (first, second), (both, mask) in pairs])


def drift(first: Sequence[Reading], later: Sequence[Reading]) -> dict[str, Any]:
    """Return how far colours are from those of the first pictures: fields of `Window`."""
    before, after = _colours(first), _colours(later)
    return {
        "background_drift": _distance([r.background_rgb for r in first], [r.background_rgb for r in later]),
        "colour_drift": _mean([_distance(before[name], after[name]) for name in before.keys() & after.keys()]),
    }


def _colours(readings: Sequence[Reading]) -> dict[str, list[Rgb]]:
    """Return the colours of all things seen by their names."""
    colours = collections.defaultdict(list)
    for thing in itertools.chain.from_iterable(reading.things for reading in readings):
        if thing.colour:
            colours[thing.colour].append(thing.rgb)
    return colours


def _distance(first: Sequence[Rgb], second: Sequence[Rgb]) -> float:
    """Return the distance of two mean colours in CIELAB units."""
    means = np.array([np.mean(first, axis=0), np.mean(second, axis=0)])
    return float(np.linalg.norm(np.subtract(*lab(means))))


def _mean(values: Sequence[float] | Float[np.ndarray, "N"] | Bool[np.ndarray, "N"]) -> float:
    """Return the mean of what is not NaN, or NaN."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if known.size else math.nan
