"""Pictures of what a rollout remembered."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rfjax.io.atomic import replacing
from rfjax.memory import BLEND, HISTORY, SINK, TAIL, Trace


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One kind of cell of the picture."""

    label: str
    """What the legend says."""
    color: str
    grows: str
    """Where a cell too thin to see is widened to: "up", "down" or "both"."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """Neighbouring frames of one chunk's column."""

    chunk: int
    low: int
    """First frame."""
    high: int
    """Frame after the last."""
    share: float = 1.0
    """Part of the layers and tokens that attend to them."""


# The colour-blind-safe palette of Okabe and Ito, for the roles of a trace.
_ROLES = {
    SINK: _Layer("sink: the first frames, always kept", "#0072B2", "up"),
    TAIL: _Layer("tail: the newest frames", "#009E73", "down"),
    HISTORY: _Layer("history: selected from the past", "#D55E00", "both"),
    BLEND: _Layer("blend of frames: at the newest of them", "#CC79A7", "both"),
}
_OWN = _Layer("own chunk: being generated", "#F0B400", "up")
_CANDIDATE = _Layer("candidate: scored, not selected", "#B5B5B5", "both")
_PAST = _Layer("past, not attended", "#F0F0F0", "both")

_PLACE = (0.07, 0.09, 0.86, 0.8)
"""Left, bottom, width and height of the axes; finding them by Matplotlib's layout takes as long as all the rest."""
_FAINTEST = 0.3
"""Strength of the colour of a frame that hardly any layer or token attends to."""
_THINNEST = 1 / 140
"""Least height of a cell as a part of the axis, so that a single frame of a long video can be seen."""
_SHORTEST = 4
"""Least chunks on the axis, so that the legend has its empty corner."""
_SEPARATE = 20
"""Up to so many chunks there is room to draw every column and every frame apart."""


def memory_timeline(
    trace: Trace, chunk_frames: int, path: str | Path, title: str, *, sample: int = 0, seconds_per_frame: float = 0.25
) -> None:
    """Draw which latent frames each chunk attended to, as a PNG.

    The horizontal axis counts chunks, the vertical one latent frames and, on the right, seconds of video. A frame that
    only some layers attend to, or of which only some tokens are attended, is paler.

    Args:
        trace: of a whole rollout, leading axes [chunks, B].
        chunk_frames: latent frames a chunk.
        path: of the picture; it appears when complete.
        title: line above the picture.
        sample: which of the B samples to draw.
        seconds_per_frame: duration of a latent frame, 4 / 16 for Wan.

    Raises:
        UserError: `path` cannot be written.
    """
    frames, roles, candidates = (np.asarray(a)[:, sample] for a in (trace.frames, trace.roles, trace.candidates))
    candidates = candidates[..., None]  # whole frames
    chunks, total = len(frames), len(frames) * chunk_frames
    figure = Figure(figsize=(10, 6), dpi=160)
    axes = figure.add_axes(_PLACE)
    axes.set_xlim(0.5, max(chunks, _SHORTEST) + 0.5)
    axes.set_ylim(0, max(chunks, _SHORTEST) * chunk_frames)
    drawn = _draw(axes, frames, roles, candidates, chunk_frames)
    _label_axes(axes, chunk_frames, seconds_per_frame)
    most = int((frames >= 0).all(axis=(1, 3)).sum(axis=1).max()) + chunk_frames
    summary = f"A column is one chunk. It attends to at most {most} latent frames, its own included, of {total}."
    _write_header(axes, title, summary)
    handles = [Patch(facecolor=layer.color, label=layer.label) for layer in drawn]
    axes.legend(handles=handles, loc="upper left", fontsize=11, handlelength=1.2, handleheight=1.0, edgecolor="none")
    with replacing(path) as temporary, warnings.catch_warnings():
        # A prompt in the title may need characters that the font lacks: they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(str(temporary))


def _draw(
    axes: Axes,
    frames: Int[np.ndarray, "chunks Y S P"],
    roles: Int[np.ndarray, "chunks Y S P"],
    candidates: Int[np.ndarray, "chunks Y candidates 1"],
    chunk_frames: int,
) -> list[_Layer]:
    """Draw the cells from the background to the front; return the layers present, in the legend's order."""
    starts = np.arange(len(frames)) * chunk_frames
    past = [_Run(chunk, 0, int(start)) for chunk, start in enumerate(starts) if start]
    own = [_Run(chunk, int(start), int(start) + chunk_frames) for chunk, start in enumerate(starts)]
    layers = {
        _PAST: past,
        _CANDIDATE: _runs(candidates, candidates >= 0),
        **{layer: _runs(frames, (roles == role) & (frames >= 0)) for role, layer in _ROLES.items()},
        _OWN: own,
    }
    for layer, runs in layers.items():
        _draw_runs(axes, runs, layer)
    order = (_OWN, _ROLES[TAIL], _ROLES[BLEND], _ROLES[HISTORY], _CANDIDATE, _ROLES[SINK], _PAST)
    return [layer for layer in order if layers[layer]]


def _runs(frames: Int[np.ndarray, "chunks Y S P"], present: Bool[np.ndarray, "chunks Y S P"]) -> list[_Run]:
    """Return every run of neighbouring frames among those `present` that are attended alike."""
    whole = frames.shape[1] * frames.shape[3]
    runs = []
    for chunk, (row, mask) in enumerate(zip(frames, present, strict=True)):
        kept, counts = np.unique(row[mask], return_counts=True)
        shares = np.minimum(counts / whole, 1.0)
        breaks = np.flatnonzero((np.diff(kept) > 1) | (np.diff(shares) != 0)) + 1
        for run, share in zip(np.split(kept, breaks), np.split(shares, breaks), strict=True):
            if len(run):
                runs.append(_Run(chunk, int(run[0]), int(run[-1]) + 1, float(share[0])))
    return runs


def _draw_runs(axes: Axes, runs: list[_Run], layer: _Layer) -> None:
    chunks, height = axes.get_xlim()[1] - 0.5, axes.get_ylim()[1]
    half = 0.43 if chunks <= _SEPARATE else 0.5
    if chunks <= _SEPARATE and layer is not _PAST:
        runs = [_Run(run.chunk, frame, frame + 1, run.share) for run in runs for frame in range(run.low, run.high)]
    corners = []
    for run in runs:
        missing = max(0.0, height * _THINNEST - (run.high - run.low))
        bottom = run.low - missing * {"up": 0, "both": 0.5, "down": 1}[layer.grows]
        left, right, top = run.chunk + 1 - half, run.chunk + 1 + half, bottom + run.high - run.low + missing
        corners.append([(left, bottom), (right, bottom), (right, top), (left, top)])
    colors = [_paler(layer.color, run.share) for run in runs]
    edge = "white" if chunks <= _SEPARATE else "none"
    axes.add_collection(PolyCollection(corners, facecolors=colors, edgecolors=edge, linewidths=0.8), autolim=False)


def _paler(color: str, share: float) -> tuple[float, ...]:
    """Mix a colour with that of the past, which is not attended at all."""
    strength = 1.0 if share == 1.0 else _FAINTEST + (1 - _FAINTEST) * share
    return tuple(strength * np.asarray(to_rgb(color)) + (1 - strength) * np.asarray(to_rgb(_PAST.color)))


def _label_axes(axes: Axes, chunk_frames: int, seconds_per_frame: float) -> None:
    axes.set_xlabel(f"chunk, in the order of generation ({chunk_frames} latent frames each)", fontsize=11)
    axes.set_ylabel("latent frame attended to", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))

    def to_seconds(frame: Any) -> Any:
        return frame * seconds_per_frame

    def to_frames(second: Any) -> Any:
        return second / seconds_per_frame

    seconds = axes.secondary_yaxis("right", functions=(to_seconds, to_frames))
    seconds.set_ylabel("seconds of video", fontsize=11)
    for spine in (*axes.spines.values(), *seconds.spines.values()):
        spine.set_color("#BBBBBB")
    for direction in ("top", "right"):
        axes.spines[direction].set_visible(False)
    axes.tick_params(color="#BBBBBB")
    seconds.tick_params(color="#BBBBBB")


def _write_header(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=26, parse_math=False)
    axes.annotate(subtitle, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color="#555555")
