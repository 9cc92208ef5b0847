"""Scenes of moving shapes: what is in them, where it is at any time, what they are called and how they look.

Lengths are in heights of the picture: x runs from 0 to the aspect ratio, y from 0 (top) to 1. Times are in seconds.
"""

import dataclasses
import itertools
import json
import math
import zlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8

from rfjax.errors import UserError

FPS = 16
COLOURS = {
    "red": (225, 35, 40),
    "green": (35, 170, 65),
    "blue": (35, 80, 235),
    "yellow": (250, 222, 35),
    "purple": (165, 50, 212),
}
BACKGROUNDS = {"dark": (26, 28, 36), "gray": (126, 128, 132), "sand": (196, 180, 148), "brown": (82, 62, 52)}
KINDS = ("circle", "square", "triangle", "ring")
VERBS = {
    "bounces": "bounces",
    "circles": "goes around",
    "turns": "turns",
    "crosses": "crosses",
    "appears": "appears",
    "leaves": "leaves",
}
STAYING = ("bounces", "circles", "turns")
PASSING = ("crosses", "appears", "leaves")
WORDINGS = 3

GROWING_SECONDS = 0.5
HELD_OUT_SHARE = 0.1
STAYING_SHARE = 0.72
SHADING = 0.06
# The radius is that of the circle around a shape, so that shapes with corners need a larger one to look as large.
RADII = {
    "circle": (0.15, 0.21),
    "square": (0.18, 0.24),
    "triangle": (0.19, 0.24),
    "ring": (0.16, 0.22),
}
SIDES = {"square": 4, "triangle": 3}
RING_HOLE = 0.5


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape and its motion; settings that its motion does not use are 0."""

    colour: str
    """One of `COLOURS`."""
    kind: str
    """One of `KINDS`."""
    motion: str
    """One of `VERBS`."""
    radius: float
    """Radius of the circle around the shape, in heights."""
    place: tuple[float, float]
    """Where x and y begin, as a share (0..1) of the way that the shape has in the picture."""
    velocity: tuple[float, float]
    """Heights a second; walls reflect it, except for shapes that cross or leave."""
    orbit: float
    """Radius of the circle on which the shape goes around, in heights."""
    rate: float
    """Speed of going around or turning, in radians a second, clockwise."""
    start: float
    """When the shape appears, or begins to leave, in seconds."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two moving shapes before a plain background."""

    background: str
    """One of `BACKGROUNDS`."""
    shapes: tuple[Shape, ...]
    """From back to front."""
    wording: int
    """Which of the wordings (0..`WORDINGS` - 1) the caption has."""

    def to_json(self) -> str:
        """Write the exact parameters."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        shapes = [
            Shape(**{**shape, "place": tuple(shape["place"]), "velocity": tuple(shape["velocity"])})
            for shape in values["shapes"]
        ]
        return cls(values["background"], tuple(shapes), values["wording"])


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the S shapes of a scene are at T times."""

    centre: Float[np.ndarray, "T S 2"]
    """x and y in heights."""
    angle: Float[np.ndarray, "T S"]
    """Clockwise turn in radians."""
    scale: Float[np.ndarray, "T S"]
    """Size as a share of the full one; 0 before the shape appears."""


def held_out(scene: Scene) -> bool:
    """Tell whether the scene's set of (colour, kind) is one of the tenth that training never shows."""
    things = sorted(f"{shape.colour} {shape.kind}" for shape in scene.shapes)
    return zlib.crc32(", ".join(things).encode()) % 1000 < 1000 * HELD_OUT_SHARE


def random_scene(rng: np.random.Generator, split: str) -> Scene:
    """Draw a scene: for "train" of sets of things that are not held out, for "test" of those that are."""
    while True:
        scene = _any_scene(rng)
        if held_out(scene) == (split == "test"):
            return scene


def staying_scenes(rng: np.random.Generator, split: str, count: int) -> list[Scene]:
    """Draw scenes of a split all of whose things stay in the picture."""
    scenes = (random_scene(rng, split) for _ in itertools.count())
    staying = (scene for scene in scenes if all(shape.motion in STAYING for shape in scene.shapes))
    return list(itertools.islice(staying, count))


def _any_scene(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, 3))
    stays = rng.random(count) < STAYING_SHARE
    if count > 1 and not stays.any():
        stays[rng.integers(count)] = True
    # Two shapes begin on two sides, lest one hides the other at once, and have two colours.
    sides = rng.permutation(count)
    colours = rng.choice(list(COLOURS), count, replace=False)
    shapes = tuple(
        _random_shape(rng, str(colour), bool(stay), (int(side) / count, (int(side) + 1) / count))
        for colour, stay, side in zip(colours, stays, sides, strict=True)
    )
    return Scene(_choice(rng, BACKGROUNDS), shapes, int(rng.integers(WORDINGS)))


def _random_shape(rng: np.random.Generator, colour: str, stays: bool, side: tuple[float, float]) -> Shape:
    kind = _choice(rng, KINDS)
    motions = STAYING if stays else PASSING
    motion = _choice(rng, [name for name in motions if name != "turns" or kind in SIDES])
    radius = _uniform(rng, *RADII[kind])
    place = (_uniform(rng, *side), _uniform(rng, 0.0, 1.0))
    speed = _uniform(rng, 0.25, 0.5)
    drift = _course(rng, speed / 5)
    still = Shape(colour, kind, motion, radius, place, (0.0, 0.0), 0.0, 0.0, 0.0)
    match motion:
        case "bounces":
            return dataclasses.replace(still, velocity=_course(rng, speed))
        case "circles":
            orbit = _uniform(rng, 0.14, 0.25)
            return dataclasses.replace(still, orbit=orbit, rate=_sign(rng) * round(speed / orbit, 3))
        case "turns":
            return dataclasses.replace(still, velocity=drift, rate=_sign(rng) * _uniform(rng, 1.2, 2.4))
        case "crosses":
            way = _sign(rng)
            return dataclasses.replace(still, place=(float(way < 0), place[1]), velocity=(way * speed, 0.0))
        case "appears":
            return dataclasses.replace(still, velocity=drift, start=_uniform(rng, 0.3, 1.5))
        case _:
            return dataclasses.replace(still, velocity=_course(rng, speed), start=_uniform(rng, 0.5, 2.0))


def _choice(rng: np.random.Generator, names: Iterable[str]) -> str:
    return str(rng.choice(list(names)))


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 3)


def _sign(rng: np.random.Generator) -> float:
    return float(rng.choice([-1.0, 1.0]))


def _course(rng: np.random.Generator, speed: float) -> tuple[float, float]:
    """A velocity well away from the axes, so that it shows in both."""
    angle = rng.uniform(np.pi / 8, 3 * np.pi / 8)
    return _sign(rng) * round(speed * math.cos(angle), 3), _sign(rng) * round(speed * math.sin(angle), 3)


def caption(scene: Scene) -> str:
    """Say what is in a scene, as in "a red circle bounces and a blue square turns on a dark background"."""
    things = [f"a {shape.colour} {shape.kind}" for shape in scene.shapes]
    verbs = [VERBS[shape.motion] for shape in scene.shapes]
    doing = " and ".join(f"{thing} {verb}" for thing, verb in zip(things, verbs, strict=True))
    match scene.wording:
        case 0:
            return f"{doing} on a {scene.background} background"
        case 1:
            return f"on a {scene.background} background, {doing}"
        case _:
            that = ", ".join(f"{thing} that {verb}" for thing, verb in zip(things, verbs, strict=True))
            return f"{that}, {scene.background} background"


def places(scene: Scene, times: Float[np.ndarray, " T"], aspect: float) -> Places:
    """Say where the shapes are at any times, in a picture `aspect` times as wide as high.

    Raises:
        UserError: the picture is higher than wide, where shapes need not fit in.
    """
    if aspect < 1:
        raise UserError(f"the picture of a scene is {aspect:g} times as wide as high; it needs 1 or more")
    tracks = [_track(shape, times, aspect) for shape in scene.shapes]
    return Places(*(np.stack(parts, axis=1) for parts in zip(*tracks, strict=True)))


def _track(
    shape: Shape, times: Float[np.ndarray, " T"], aspect: float
) -> tuple[Float[np.ndarray, "T 2"], Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Centre, angle and scale of one shape."""
    margin = np.full(2, shape.radius + shape.orbit)
    if shape.motion == "crosses":
        margin[0] = -shape.radius
    room = np.array([aspect, 1.0]) - 2 * margin
    moving = np.maximum(times - shape.start, 0) if shape.motion == "leaves" else times
    way = np.array(shape.place) * room + moving[:, None] * np.array(shape.velocity)
    if shape.motion not in ("crosses", "leaves"):
        way = room - np.abs(way % (2 * room) - room)
    turned = shape.rate * times
    around = shape.orbit * np.stack([np.cos(turned), np.sin(turned)], axis=1)
    angle = turned if shape.motion == "turns" else np.zeros_like(times)
    scale = np.ones_like(times)
    if shape.motion == "appears":
        scale = np.clip((times - shape.start) / GROWING_SECONDS, 0, 1)
    return margin + way + around, angle, scale


def render(scene: Scene, frames: int, height: int, width: int) -> UInt8[np.ndarray, "T H W 3"]:
    """Draw the first `frames` frames of a scene, `FPS` a second, antialiased.

    Raises:
        UserError: the picture is higher than wide.
    """
    where = places(scene, np.arange(frames) / FPS, width / height)
    light = np.linspace(1 + SHADING, 1 - SHADING, height, dtype=np.float32)[:, None]
    planes = [np.tile(light * level, (frames, 1, width)) for level in BACKGROUNDS[scene.background]]
    for index, shape in enumerate(scene.shapes):
        centre, angle, scale = where.centre[:, index], where.angle[:, index], where.scale[:, index]
        cover = np.clip(0.5 - height * _distance(shape, centre, angle, scale, height, width), 0, 1)
        for plane, level in zip(planes, COLOURS[shape.colour], strict=True):
            plane += cover * (level - plane)
    return np.stack([(plane + 0.5).astype(np.uint8) for plane in planes], axis=-1)


def _distance(
    shape: Shape,
    centre: Float[np.ndarray, "T 2"],
    angle: Float[np.ndarray, " T"],
    scale: Float[np.ndarray, " T"],
    height: int,
    width: int,
) -> Float[np.ndarray, "T H W"]:
    """Signed distance of pixels from the outline, in heights, negative inside; exact near its straight parts."""
    x = (np.arange(width) + 0.5) / height - centre[:, :1]
    y = (np.arange(height) + 0.5) / height - centre[:, 1:]
    x, y = x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32)
    # A shape that is not there yet is farther than a pixel from everything.
    size = np.where(scale > 0, shape.radius * scale, -1).astype(np.float32)[:, None, None]
    if shape.kind not in SIDES:
        middle, half = ((1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2) if shape.kind == "ring" else (0, 1)
        from_middle = np.sqrt(x**2 + y**2)
        return (np.abs(from_middle - middle * size) if middle else from_middle) - half * size
    sides, farthest = SIDES[shape.kind], np.float32(-np.inf)
    for side in range(sides):
        # One corner points up, except that a square stands on its side.
        facing = angle + math.pi * ((2 * side + 1) / sides - 0.5 + (shape.kind == "square") / 4)
        facing = facing.astype(np.float32)[:, None, None]
        farthest = np.maximum(farthest, np.cos(facing) * x + np.sin(facing) * y)
    return farthest - math.cos(math.pi / sides) * size
