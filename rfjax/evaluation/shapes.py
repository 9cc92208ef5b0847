"""What single pictures of moving shapes show, read by classical vision: which colours and kinds, and where.

A picture is a backdrop, which brightens evenly from the bottom to the top, with things of named colours before it, as
`rfjax.data.shapes` draws them and an autoencoder may have blurred them. Lengths are in heights of the picture.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from rfjax.data.shapes import BACKGROUNDS, COLOURS, FPS, KINDS, SIDES, Scene, Shape, render
from rfjax.evaluation.frames import opencv, resized

Mask = Bool[np.ndarray, "H W"]
Picture = Float32[np.ndarray, "H W 3"]

_ROWS = 64
"""Height in pixels at which pictures are read."""
_NEAR_BACKDROP = 40.0
"""Farthest from the median, in grey levels, that a pixel may be to tell the colour of the backdrop."""
_NAMED = 35.0
"""Farthest from a named colour, in CIELAB units, that goes by its name; the nearest two are 34 apart."""
_NAMED_BACKDROP = 18.0
"""The same for backgrounds; the nearest two are 24 apart."""
_STRANGE = 30.0
"""Least distance of an unnamed thing from the backdrop, in CIELAB units."""
_SMALLEST = 0.01
"""Least area of a thing in squared heights: a fifth of the smallest that is drawn."""
_EDGE = 2
"""Pixels around those of a thing's colour that it may cover in part."""
_TOUCHING = 4
"""Most pixels of mixed colours between two things that touch."""
_SIDE, _SPREAD = 48, 22.0
"""Side of the square in which kinds are compared, and the root of the area that a thing is scaled to there."""
_FINER = 3
"""How many times finer than pixels outlines are drawn."""
_TURNS = 12
"""Angles of a template with corners, over its symmetry."""
_BLURS = (0.5, 1.0, 1.5, 2.0)
"""Blurs of the templates, in pixels."""
_ALIKE = 0.8
"""Least overlap with a template that decides the kind."""
_ALIKE_PARTLY = 0.88
"""The same where a part may be hidden: half a ring is not to pass for something else."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """A thing seen in a picture."""

    colour: str | None
    """Nearest of `COLOURS`, or None if it is near none."""
    kind: str | None
    """Most similar of `KINDS`, or None if it is similar to none."""
    match: float
    """Overlap with that kind's best template: intersection over union, from 0 to 1."""
    centre: tuple[float, float]
    """x and y of the centroid in heights."""
    area: float
    """In squared heights."""
    rgb: tuple[float, float, float]
    """Median of its inner pixels, from 0 to 255."""
    hidden: bool
    """Whether it touches another thing or the edge of the picture, which may hide a part of it."""

    @property
    def undecided(self) -> bool:
        """Whether what is hidden keeps the kind from being told, which says nothing against it."""
        return self.hidden and self.kind is None


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str | None
    """Nearest of `BACKGROUNDS`, or None if it is near none."""
    background_rgb: tuple[float, float, float]
    """In the middle row, from 0 to 255."""
    things: tuple[Thing, ...]


def read_frame(frame: UInt8[np.ndarray, "H W 3"]) -> Reading:
    """Find the things in a picture.

    Raises:
        UserError: OpenCV is not installed.
    """
    picture = resized(frame, round(_ROWS * max(frame.shape[:2]) / frame.shape[0])).astype(np.float32)
    backdrop = _backdrop(picture)
    middle = backdrop[len(backdrop) // 2, 0]
    things = [_thing(picture, backdrop, *part) for part in _parts(picture, backdrop)]
    return Reading(_nearest(middle, BACKGROUNDS, _NAMED_BACKDROP), _triple(middle), tuple(things))


def backdrop_mask(frame: UInt8[np.ndarray, "H W 3"]) -> Mask:
    """Tell which pixels show the backdrop."""
    picture = frame.astype(np.float32)
    return np.abs(picture - _backdrop(picture)).max(axis=-1) < _NEAR_BACKDROP


def lab(rgb: Float[np.ndarray, "*shape 3"]) -> Float32[np.ndarray, "*shape 3"]:
    """Return CIELAB (D65) of sRGB from 0 to 255."""
    flat = rgb.reshape(1, -1, 3).astype(np.float32) / 255
    return opencv().cvtColor(flat, opencv().COLOR_RGB2Lab).reshape(rgb.shape)


def _backdrop(picture: Picture) -> Float32[np.ndarray, "H 1 3"]:
    """Fit the backdrop's colour, linear from row to row, to the pixels near the median: most are the backdrop's."""
    height = (np.arange(len(picture), dtype=np.float32) + 0.5) / len(picture) - 0.5
    fitted = np.broadcast_to(np.median(picture[::2, ::2], axis=(0, 1)), (len(picture), 1, 3)).astype(np.float32)
    for _ in range(2):
        near = (np.abs(picture - fitted).max(axis=-1) < _NEAR_BACKDROP).astype(np.float32)
        weight = near.sum(axis=1)
        total = max(weight.sum(), 1.0)
        rows = (picture * near[..., None]).sum(axis=1)
        centre, mean = (weight @ height) / total, rows.sum(axis=0) / total
        from_centre = height - centre
        slope = from_centre @ (rows - weight[:, None] * mean) / max(weight @ from_centre**2, 1e-6)
        fitted = (mean + from_centre[:, None] * slope)[:, None].astype(np.float32)
    return fitted


def _parts(picture: Picture, backdrop: Float32[np.ndarray, "H 1 3"]) -> Iterator[tuple[str | None, Mask, Mask]]:
    """Yield the colour of each thing, its pixels, and those of all other things."""
    seen, names = lab(picture), list(COLOURS)
    from_backdrop = np.sqrt(((seen - lab(backdrop)) ** 2).sum(axis=-1))
    known = lab(np.array(list(COLOURS.values()), np.float32))
    from_names = np.stack([np.sqrt(((seen - colour) ** 2).sum(axis=-1)) for colour in known])
    nearest, distance = from_names.argmin(axis=0), from_names.min(axis=0)
    found: list[tuple[str | None, Mask]] = []
    for index, name in enumerate(names):
        mask = (nearest == index) & (distance < _NAMED) & (distance < from_backdrop)
        found += [(name, part) for part in _connected(mask)]
    taken = np.any([part for _, part in found], axis=0) if found else np.zeros(seen.shape[:2], bool)
    # Edges are mixtures of colours, so what is left counts only away from what was found.
    found += [(None, part) for part in _connected((from_backdrop > _STRANGE) & ~_grown(taken, 3))]
    for name, part in _pieced_together(found):
        others = [other for _, other in found if not (other & part).any()]
        yield name, part, np.any(others, axis=0) if others else np.zeros_like(part)


def _connected(mask: Mask) -> list[Mask]:
    """Return the parts of a mask that are large, and thick somewhere, which edges are not."""
    cv2 = opencv()
    thick = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0
    if not thick.any():
        return []
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    enough = _SMALLEST * mask.shape[0] ** 2
    large = [label for label in range(1, count) if statistics[label, cv2.CC_STAT_AREA] >= enough]
    return [part for label in large if (thick & (part := labels == label)).any()]


def _pieced_together(found: list[tuple[str | None, Mask]]) -> list[tuple[str | None, Mask]]:
    """Join the pieces of one colour into which another thing divides what is behind it."""
    joined: list[tuple[str | None, Mask]] = []
    for name in dict.fromkeys(name for name, _ in found):
        pieces = [part for other, part in found if other == name]
        before = [part for other, part in found if other != name]
        divided = [
            p for p in pieces if name is not None and any((_grown(p, _TOUCHING) & other).any() for other in before)
        ]
        whole = [piece for piece in pieces if not any(piece is other for other in divided)]
        joined += [(name, part) for part in whole]
        joined += [(name, np.any(divided, axis=0))] if divided else []
    return joined


def _grown(mask: Mask, pixels: int) -> Mask:
    """Return a mask with the pixels around it, so many wide."""
    square = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    return opencv().dilate(mask.astype(np.uint8), square) > 0


def _thing(
    picture: Picture, backdrop: Float32[np.ndarray, "H 1 3"], colour: str | None, part: Mask, others: Mask
) -> Thing:
    """Describe one thing."""
    height = len(picture)
    rgb = _own_colour(picture, backdrop, part)
    outline = _outline(_cover(picture, backdrop, rgb, _grown(part, _EDGE) & ~others))
    match, kind = max(_overlaps(outline.patch))
    edge = part[0].any() or part[-1].any() or part[:, 0].any() or part[:, -1].any()
    hidden = bool(edge or (_grown(part, _TOUCHING) & others).any())
    alike = match >= (_ALIKE_PARTLY if hidden else _ALIKE)
    return Thing(
        colour=colour,
        kind=kind if alike else None,
        match=match,
        centre=(outline.x / height, outline.y / height),
        area=outline.area / height**2,
        rgb=_triple(rgb),
        hidden=hidden,
    )


def _own_colour(picture: Picture, backdrop: Float32[np.ndarray, "H 1 3"], part: Mask) -> Float32[np.ndarray, "3"]:
    """Return the median of the third of a thing's pixels that differ most from the backdrop: those farthest inside."""
    pixels = picture[part]
    contrast = np.linalg.norm(pixels - np.broadcast_to(backdrop, picture.shape)[part], axis=-1)
    return np.median(pixels[contrast >= np.quantile(contrast, 2 / 3)], axis=0)


def _cover(
    picture: Picture, backdrop: Float32[np.ndarray, "H 1 3"], rgb: Float[np.ndarray, "3"], where: Mask
) -> Float32[np.ndarray, "H W"]:
    """Return the share (0..1) of a thing's colour in each pixel, the rest being the backdrop's."""
    way = rgb.astype(np.float32) - backdrop
    share = ((picture - backdrop) * way).sum(axis=-1) / np.maximum((way**2).sum(axis=-1), 1.0)
    return (np.clip(share, 0, 1) * where).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Outline:
    """Where a thing covers at least half, which blur and noise change little."""

    x: float
    """Of the centroid, in pixels."""
    y: float
    area: float
    """In pixels."""
    patch: Bool[np.ndarray, "S S"]
    """Moved to the middle of a square, and scaled to the area that all have there."""


def _outline(cover: Float32[np.ndarray, "H W"]) -> _Outline:
    """Outline a thing between the pixels of its cover."""
    cv2 = opencv()
    fine = cv2.resize(cover, None, fx=_FINER, fy=_FINER, interpolation=cv2.INTER_LINEAR) > 0.5
    area = max(fine.sum() / _FINER**2, 1.0)
    y, x = ((np.argwhere(fine) + 0.5) / _FINER).mean(axis=0) if fine.any() else (0.0, 0.0)
    scale = _SPREAD / area**0.5
    # Pixels' centres are at whole numbers for OpenCV and half a pixel farther here.
    shift = [_SIDE / 2 - 0.5 - scale * (along - 0.5) for along in (x, y)]
    patch = cv2.warpAffine(cover, np.array([[scale, 0, shift[0]], [0, scale, shift[1]]], np.float32), (_SIDE, _SIDE))
    return _Outline(float(x), float(y), float(area), patch > 0.5)


def _overlaps(patch: Bool[np.ndarray, "S S"]) -> list[tuple[float, str]]:
    """Return the best intersection over union with the templates of each kind."""
    overlaps = []
    for kind, templates in _templates().items():
        common, either = templates & patch, templates | patch
        overlaps.append((float((common.sum(axis=(1, 2)) / either.sum(axis=(1, 2))).max()), kind))
    return overlaps


@functools.cache
def _templates() -> dict[str, Bool[np.ndarray, "N S S"]]:
    """Return how each kind looks at every angle, sharp and blurred, made as what is compared with it."""
    return {
        kind: np.stack([_drawn(kind, turn, blur) for turn in range(_turns(kind)) for blur in _BLURS]) for kind in KINDS
    }


def _turns(kind: str) -> int:
    return _TURNS if kind in SIDES else 1


def _drawn(kind: str, turn: int, blur: float) -> Bool[np.ndarray, "S S"]:
    """Outline a kind, turned by so many parts of its symmetry and blurred by so many pixels."""
    sides = SIDES.get(kind, 1)
    shape = Shape("red", kind, "turns", 0.2, (0.5, 0.5), (0.0, 0.0), 0.0, FPS * 2 * np.pi / sides / _TURNS, 0.0)
    frame = render(Scene("dark", (shape,), 0), turn + 1, _ROWS, _ROWS)[-1].astype(np.float32)
    frame = opencv().GaussianBlur(frame, (0, 0), blur)
    backdrop = _backdrop(frame)
    ((_, part, _),) = _parts(frame, backdrop)
    return _outline(_cover(frame, backdrop, _own_colour(frame, backdrop, part), _grown(part, _EDGE))).patch


def _nearest(rgb: Float[np.ndarray, "3"], named: dict[str, tuple[int, int, int]], farthest: float) -> str | None:
    distances = np.linalg.norm(lab(np.array(list(named.values()), np.float32)) - lab(rgb), axis=-1)
    return list(named)[distances.argmin()] if distances.min() < farthest else None


def _triple(rgb: Float[np.ndarray, "3"]) -> tuple[float, float, float]:
    red, green, blue = (float(level) for level in rgb)
    return red, green, blue
