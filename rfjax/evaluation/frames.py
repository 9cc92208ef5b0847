"""What is measured on one frame or on two neighbouring ones, with OpenCV."""

import dataclasses
from types import ModuleType

import numpy as np
from jaxtyping import Float, Float32, UInt8

from rfjax.errors import UserError

SIDE = 256
"""Pixels of the longer side of the reduced frame that everything but VBench's own measure is computed on."""
_SHORTEST = 32
"""Pixels that a side of the reduced frame has at least; optical flow fails on fewer."""
_SSIM_SIDE = 64
"""Pixels of the longer side of the luma that frames are compared on: coarse, so that small movements count little."""
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def opencv() -> ModuleType:
    """Return the module `cv2`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise UserError('measuring videos needs OpenCV; pip install "rfjax[study]"') from None
    return cv2


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A frame, and what is computed from it once."""

    rgb: UInt8[np.ndarray, "H W 3"]
    """The frame as it was decoded."""
    small: UInt8[np.ndarray, "h w 3"]
    """The frame reduced to `SIDE` pixels on the longer side, or enlarged to them."""
    luma: UInt8[np.ndarray, "h w"]
    """BT.601 luma of `small`."""


def view(frame: UInt8[np.ndarray, "H W 3"]) -> View:
    """Return a frame with its reduced copies."""
    cv2 = opencv()
    small = resized(frame, SIDE, _SHORTEST)
    return View(frame, small, cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))


def resized(image: UInt8[np.ndarray, "H W *C"], side: int, shortest: int = 1) -> UInt8[np.ndarray, "h w *C"]:
    """Return an image scaled to `side` pixels on the longer side and at least `shortest` on the other."""
    cv2 = opencv()
    height, width = (max(round(size * side / max(image.shape[:2])), shortest) for size in image.shape[:2])
    method = cv2.INTER_AREA if height * width <= image.shape[0] * image.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)


def colour_statistics(small: UInt8[np.ndarray, "h w 3"]) -> tuple[Float[np.ndarray, "6"], float]:
    """Return means and standard deviations of L*, a*, b* (CIELAB of sRGB, D65), and the mean chroma."""
    cv2 = opencv()
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2Lab).astype(np.float64)
    statistics = np.concatenate([lab.mean(axis=(0, 1)), lab.std(axis=(0, 1))])
    return statistics, float(np.hypot(lab[..., 1], lab[..., 2]).mean())


def sharpness(luma: UInt8[np.ndarray, "h w"]) -> float:
    """Return the variance of the Laplacian, in squared grey levels (Pech-Pacheco et al., ICPR 2000)."""
    cv2 = opencv()
    return float(cv2.Laplacian(luma, cv2.CV_64F).var())


def structural_similarity(first: UInt8[np.ndarray, "h w"], second: UInt8[np.ndarray, "h w"]) -> float:
    """Return the mean SSIM of two lumas at `_SSIM_SIDE` pixels on the longer side, 1 for equal ones.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004: Gaussian
    window of 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03.
    """
    cv2 = opencv()

    def local(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    x, y = (resized(image, _SSIM_SIDE).astype(np.float64) for image in (first, second))
    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    return float((luminance * (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)).mean())


def absolute_difference(first: UInt8[np.ndarray, "H W 3"], second: UInt8[np.ndarray, "H W 3"]) -> float:
    """Return the mean absolute difference of two frames in grey levels, as in VBench's `temporal_flickering.py`."""
    return float(opencv().absdiff(first, second).mean())


def optical_flow(first: UInt8[np.ndarray, "h w"], second: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w 2"]:
    """Return by how many pixels (x, y) each pixel of the first luma has moved in the second.

    Kroeger et al., "Fast optical flow using dense inverse search", ECCV 2016; OpenCV's medium preset.
    """
    cv2 = opencv()
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)


def flow_length(flow: Float32[np.ndarray, "h w 2"], size: tuple[int, int]) -> float:
    """Return the mean length of a flow in diagonals of the frame, whose size (rows, columns) was reduced to `h, w`."""
    rows, columns = size
    across, down = flow[..., 0] * (columns / flow.shape[1]), flow[..., 1] * (rows / flow.shape[0])
    return float(np.hypot(across, down).mean() / np.hypot(rows, columns))


def unexplained_difference(
    first: UInt8[np.ndarray, "h w"], second: UInt8[np.ndarray, "h w"], flow: Float32[np.ndarray, "h w 2"]
) -> float:
    """Return the mean absolute difference in grey levels that is left where the second luma is moved back by the flow.

    The warping error of Lai et al., "Learning blind video temporal consistency", ECCV 2018, of absolute instead of
    squared differences. Pixels that moved out of the frame do not count.
    """
    cv2 = opencv()
    height, width = first.shape
    x = np.arange(width, dtype=np.float32) + flow[..., 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[..., 1]
    moved_back = cv2.remap(second.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return float(np.abs(moved_back - first)[inside].sum() / max(inside.sum(), 1))
