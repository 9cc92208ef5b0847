"""The measures of a video; formulas and sources are in `docs/measures.md`."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from rfjax.errors import UserError
from rfjax.evaluation import frames as measured
from rfjax.evaluation import repetition


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """What was measured on one video; NaN is what the video is too short for.

    The series have a value a second (the mean over its frames; the last second may be shorter), and a scalar without
    another meaning is the mean over all frames. What is measured on two neighbouring frames belongs to the second one.
    """

    motion: float
    """Mean length of the optical flow, in diagonals of the frame a second."""
    temporal_flickering: float
    """VBench's score: 1 minus the mean absolute difference of neighbouring frames divided by 255."""
    flicker: float
    """Mean absolute difference of neighbouring frames that motion does not explain, as a share of the grey range."""
    similarity: float
    """Mean SSIM to the first frame."""
    colour_drift: float
    """Mean distance of the colour statistics to those of the first second, in CIELAB units."""
    repetition: float
    """How strongly the second half of the video returns to what was shown before: 0 not at all, 1 a loop."""
    saturation: float
    """Mean chroma in CIELAB units."""
    sharpness: float
    """Mean variance of the Laplacian, in squared grey levels."""
    motion_series: Float[np.ndarray, "S"]
    """`motion` in each second."""
    flicker_series: Float[np.ndarray, "S"]
    """`flicker` in each second."""
    similarity_series: Float[np.ndarray, "S"]
    """`similarity` in each second."""
    colour_drift_series: Float[np.ndarray, "S"]
    """`colour_drift` in each second."""
    repetition_series: Float[np.ndarray, "S"]
    """How strongly each second returns to what was shown before; NaN in the first two, or three."""
    saturation_series: Float[np.ndarray, "S"]
    """`saturation` in each second."""
    sharpness_series: Float[np.ndarray, "S"]
    """`sharpness` in each second."""


@dataclasses.dataclass(frozen=True)
class Quantity:
    """How a field of `Measures` is shown."""

    name: str
    """The field."""
    title: str
    """In words."""
    unit: str
    """Empty for a pure number."""
    better: Literal["higher", "lower", "neither"]
    """Which values are better."""


SCALARS = (
    Quantity("motion", "motion", "diagonals/s", "higher"),
    Quantity("temporal_flickering", "temporal flickering (VBench)", "", "higher"),
    Quantity("flicker", "flicker", "of grey range", "lower"),
    Quantity("similarity", "similarity to first frame", "SSIM", "higher"),
    Quantity("colour_drift", "colour drift", "CIELAB units", "lower"),
    Quantity("repetition", "repetition", "", "lower"),
    Quantity("saturation", "saturation", "CIELAB chroma", "neither"),
    Quantity("sharpness", "sharpness", "grey levels²", "neither"),
)
"""The scalar fields of `Measures`."""

SERIES = tuple(
    dataclasses.replace(quantity, name=f"{quantity.name}_series")
    for quantity in SCALARS
    if quantity.name != "temporal_flickering"
)
"""The fields of `Measures` with a value a second."""


def measure(frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float | int) -> Measures:
    """Measure a video, frame by frame: what is kept of each is below 2 kB.

    Args:
        frames: RGB frames of one size; an array `[T, H, W, 3]` is one such, `rfjax.io.video_reader.read_frames`
            another.
        fps: frames a second.

    Raises:
        UserError: there is no frame, their sizes differ, `fps` is not above 0, or OpenCV is not installed.
    """
    if not 0 < fps < float("inf"):
        raise UserError(f"frames a second must be a number above 0, not {fps}")
    record = _Record()
    for frame in frames:
        record.add(frame)
    return record.measures(fps)


class _Record:
    """What is kept of the frames seen so far."""

    def __init__(self):
        self._first: measured.View | None = None
        self._last: measured.View | None = None
        self._frames: list[tuple[float, float, float]] = []
        self._pairs: list[tuple[float, float, float]] = [(np.nan, np.nan, np.nan)]
        self._colours: list[np.ndarray] = []
        self._thumbnails: list[np.ndarray] = []

    def add(self, frame: UInt8[np.ndarray, "H W 3"]) -> None:
        """Measure one more frame.

        Raises:
            UserError: its size differs from that of the frames before.
        """
        view = measured.view(frame)
        self._first = self._first or view
        if self._last is not None:
            self._pairs.append(_pair(self._last, view))
        statistics, chroma = measured.colour_statistics(view.small)
        similarity = measured.structural_similarity(self._first.luma, view.luma)
        self._frames.append((similarity, chroma, measured.sharpness(view.luma)))
        self._colours.append(statistics)
        self._thumbnails.append(measured.resized(view.luma, repetition.SIDE))
        self._last = view

    def measures(self, fps: float | int) -> Measures:
        """Return the measures of all frames.

        Raises:
            UserError: there was none.
        """
        if not self._frames:
            raise UserError("the video to be measured holds no frame")
        similarity, saturation, sharpness = np.array(self._frames).T
        motion, difference, unexplained = np.array(self._pairs).T
        second = (np.arange(len(self._frames)) // fps).astype(int)
        colours = np.stack(self._colours)
        by_frame = {
            "motion": motion * fps,
            "flicker": unexplained / 255,
            "similarity": similarity,
            "colour_drift": np.linalg.norm(colours - colours[second == 0].mean(axis=0), axis=1),
            "repetition": repetition.returns(np.stack(self._thumbnails), fps),
            "saturation": saturation,
            "sharpness": sharpness,
        }
        scalars = {name: _mean(values) for name, values in by_frame.items()}
        scalars["repetition"] = _mean(by_frame["repetition"][len(self._frames) // 2 :])
        scalars["temporal_flickering"] = 1 - _mean(difference) / 255
        series = {f"{name}_series": _per_second(values, second) for name, values in by_frame.items()}
        fields: dict[str, Any] = {**scalars, **series}
        return Measures(**fields)


def _pair(last: measured.View, view: measured.View) -> tuple[float, float, float]:
    """Return flow length, difference and unexplained difference of two neighbouring frames."""
    if last.rgb.shape != view.rgb.shape:
        sizes = " and ".join(f"{shape[0]}x{shape[1]}" for shape in (last.rgb.shape, view.rgb.shape))
        raise UserError(f"the frames of a video must have one size, and these have {sizes}")
    flow = measured.optical_flow(last.luma, view.luma)
    return (
        measured.flow_length(flow, view.rgb.shape[:2]),
        measured.absolute_difference(last.rgb, view.rgb),
        measured.unexplained_difference(last.luma, view.luma, flow),
    )


def _mean(values: Float[np.ndarray, "T"]) -> float:
    """Return the mean of what is not NaN, or NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _per_second(values: Float[np.ndarray, "T"], second: Int[np.ndarray, "T"]) -> Float[np.ndarray, "S"]:
    """Return the mean over each second, NaN where nothing is known."""
    return np.array([_mean(values[second == number]) for number in range(second[-1] + 1)])
