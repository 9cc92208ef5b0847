"""The pictures of a study's report, as PNG."""

import io
import math
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rfjax.evaluation.looks import SCALE, Axis, Look
from rfjax.evaluation.measures import SCALARS, SERIES, Quantity
from rfjax.evaluation.results import Result
from rfjax.evaluation.tables import by_variant, paired_scalars, spread

MOST_LINES = 16
"""Lines that a picture can tell apart."""
_WIDTH, _DPI = 11.0, 130
_DARK, _GREY, _PALE = "#333333", "#555555", "#BBBBBB"
_BINS = 24


class Canvas:
    """The variants to be drawn, in order, and how each looks."""

    def __init__(self, results: Sequence[Result], looks: dict[str, Look], axis: Axis | None):
        self.results = results
        self.videos = by_variant(results)
        self.looks = looks
        self.axis = axis

    @property
    def swept(self) -> list[str]:
        """Variants on the axis."""
        return [name for name in self.videos if self.axis and name in self.axis.values]

    @property
    def beside(self) -> list[str]:
        """Variants that the axis does not hold."""
        return [name for name in self.videos if not (self.axis and name in self.axis.values)]


def over_time(canvas: Canvas) -> bytes:
    """Draw each series against the seconds of the video, a line a variant, the mean over its videos.

    A last second of less than half is left out: a few frames vary more than a second of them.
    """
    longest = max(video.record["video"]["seconds"] for video in canvas.results)
    shown = max(math.floor(longest + 0.5), 1)
    figure, panels, key = _grid(len(SERIES), columns=2, height=2.5)
    for axes, quantity in zip(panels, SERIES, strict=True):
        for name, videos in canvas.videos.items():
            series = np.stack([getattr(video.measures, quantity.name)[:shown] for video in videos])
            known = ~np.isnan(series).all(axis=0)
            seconds = np.arange(series.shape[1])[known] + 0.5
            look, on_axis = canvas.looks[name], name in canvas.swept
            marker = {"marker": "o", "markersize": 4} if known.sum() == 1 else {}
            axes.plot(
                seconds,
                np.nanmean(series[:, known], axis=0),
                color=look.color,
                linestyle=look.line,
                linewidth=1.0 if on_axis else 1.7,
                zorder=2 if on_axis else 3,
                **marker,
            )
        axes.set_xlim(0, shown)
        _describe(axes, quantity)
    for axes in panels[-2:]:
        axes.set_xlabel("second of the video", color=_GREY)
    _explain(canvas, key, height=2.5, width=84)
    return _png(figure)


def against_setting(canvas: Canvas) -> bytes:
    """Draw each measure against the setting on the axis: mean and standard deviation; other variants as levels."""
    axis = canvas.axis
    assert axis is not None
    figure, panels, key = _grid(len(SCALARS), columns=3, height=2.5)
    curves = {curve: [n for n in canvas.swept if axis.curves[n] == curve] for curve in axis.curves.values()}
    handles = {}
    for axes, quantity in zip(panels, SCALARS, strict=True):
        values = {name: spread(given) for name, given in paired_scalars(canvas.results, quantity.name).items()}
        for curve, names in curves.items():
            names = sorted(names, key=axis.values.__getitem__)
            x = np.array([axis.values[name] for name in names])
            mean = np.array([values[name].mean for name in names])
            deviation = np.nan_to_num(np.array([values[name].deviation for name in names]))
            look = canvas.looks[names[0]]
            axes.fill_between(x, mean - deviation, mean + deviation, color=_DARK, alpha=0.12, linewidth=0)
            axes.plot(x, mean, color=_DARK, linestyle=look.line, linewidth=1.7, marker=".", markersize=4)
            handles[curve] = _sample(look, _DARK, points=False)
        for name in canvas.beside:
            look = canvas.looks[name]
            axes.axhline(values[name].mean, color=look.color, linestyle=look.line, linewidth=1.7)
            handles[name] = _sample(look, look.color, points=False)
        _describe(axes, quantity)
    for axes in panels[-3:]:
        axes.set_xlabel(axis.setting, color=_GREY)
    _legend(key, handles, width=52)
    return _png(figure)


def motion_and_consistency(canvas: Canvas) -> bytes:
    """Draw similarity to the first frame against motion: a small point a video, a large one the mean of a variant."""
    figure = Figure(figsize=(_WIDTH, 5.0), dpi=_DPI, layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=[1.8, 1])
    key.set_axis_off()
    values = [paired_scalars(canvas.results, name) for name in ("motion", "similarity")]
    for name, videos in canvas.videos.items():
        look, places = canvas.looks[name], [given[name] for given in values]
        if len(videos) > 1:
            axes.plot(*places, look.marker, color=look.color, markersize=3, alpha=0.35, markeredgewidth=0)
        means = [spread(given).mean for given in places]
        axes.plot(*means, look.marker, color=look.color, markersize=9, markeredgecolor="white", markeredgewidth=0.8)
    _style(axes)
    axes.set_xlabel("motion, diagonals of the frame a second", color=_GREY)
    axes.set_ylabel("similarity to the first frame, SSIM", color=_GREY)
    _explain(canvas, key, height=5.0, width=52, points=True)
    return _png(figure)


def selected_frames(canvas: Canvas) -> list[bytes]:
    """Draw how far back the frames lie that were chosen by score: a map along the axis, bars for other variants."""
    distances = {
        name: [distance for video in videos for distance in video.selected_distances]
        for name, videos in canvas.videos.items()
    }
    highest = max((max(values) for values in distances.values() if values), default=0)
    width = max(math.ceil(highest / _BINS), 1)
    edges = np.arange(0.5, highest + width + 0.5, width)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in distances.items() if values}
    swept = {name: shares[name] for name in canvas.swept if name in shares}
    beside = {name: shares[name] for name in canvas.beside if name in shares}
    figures = [_map(canvas.axis, swept, edges)] if canvas.axis and swept else []
    figures += [_bars(canvas, beside, edges)] if beside else []
    return [_png(figure) for figure in figures]


def _bars(canvas: Canvas, shares: dict[str, np.ndarray], edges: np.ndarray) -> Figure:
    columns = min(len(shares), 3)
    figure, panels = _panels(len(shares), columns, rows=math.ceil(len(shares) / columns), height=2.1)
    for axes, (name, share) in zip(panels, shares.items(), strict=False):
        axes.bar(edges[:-1], share, np.diff(edges), align="edge", color=canvas.looks[name].color, edgecolor="white")
        axes.set_title(label(name, 46), loc="left", fontsize=8, parse_math=False)
        axes.set_ylim(0, max(float(other.max()) for other in shares.values()) * 1.05)
        axes.yaxis.set_major_formatter("{x:.0%}")
        _style(axes)
    panels[0].set_ylabel("share of choices", color=_GREY)
    for axes in panels[: len(shares)][-columns:]:
        axes.set_xlabel("latent frames back", color=_GREY)
    return figure


def _map(axis: Axis, shares: dict[str, np.ndarray], edges: np.ndarray) -> Figure:
    """Draw a column a value, one map a curve."""
    curves = {curve: [name for name in shares if axis.curves[name] == curve] for curve in axis.curves.values()}
    curves = {curve: sorted(names, key=axis.values.__getitem__) for curve, names in curves.items() if names}
    figure = Figure(figsize=(_WIDTH, 3.6 * len(curves)), dpi=_DPI, layout="constrained")
    rows = figure.subplots(len(curves), 1, squeeze=False)[:, 0]
    most = max(float(share.max()) for share in shares.values())
    for axes, (curve, names) in zip(rows, curves.items(), strict=True):
        picture = np.stack([shares[name] for name in names], axis=1)
        places = np.arange(len(names) + 1) - 0.5
        mesh = axes.pcolormesh(places, edges, picture, cmap="Greys", vmin=0, vmax=most)
        ticks = np.unique(np.linspace(0, len(names) - 1, 9).round().astype(int))
        axes.set_xticks(ticks, [f"{axis.values[names[tick]]:.3g}" for tick in ticks])
        axes.set_title(label(curve, 120), loc="left", fontsize=10, parse_math=False)
        axes.set_xlabel(axis.setting, color=_GREY)
        axes.set_ylabel("latent frames back", color=_GREY)
        figure.colorbar(mesh, ax=axes, label="share of choices", format="{x:.0%}")
        _style(axes)
    return figure


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes], Axes]:
    """Return a figure with so many panels, and the place of its legend after the last one."""
    figure, cells = _panels(count, columns, count // columns + 1, height)
    return figure, cells[:count], cells[count]


def _panels(count: int, columns: int, rows: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with `rows * columns` places, of which those after the first `count` are empty."""
    figure = Figure(figsize=(_WIDTH, height * rows), dpi=_DPI, layout="constrained")
    cells = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in cells[count:]:
        axes.set_axis_off()
    return figure, cells


def label(name: str, width: int) -> str:
    """Write a variant's name in lines of at most so many characters, if its settings allow it."""
    return textwrap.fill(name.replace(",", ", "), width, break_long_words=False, break_on_hyphens=False)


def _describe(axes: Axes, quantity: Quantity) -> None:
    unit = f", {quantity.unit}" if quantity.unit else ""
    axes.set_title(f"{quantity.title}{unit}", loc="left", fontsize=10)
    if quantity.better != "neither":
        axes.set_title(f"{quantity.better} is better", loc="right", fontsize=8, color=_GREY)
    axes.ticklabel_format(axis="y", useOffset=False)
    _style(axes)


def _style(axes: Axes) -> None:
    for side, spine in axes.spines.items():
        spine.set_color(_PALE)
        spine.set_visible(side in ("left", "bottom"))
    axes.tick_params(color=_PALE, labelsize=9)
    axes.margins(y=0.08)


def _explain(canvas: Canvas, axes: Axes, *, height: float, width: int, points: bool = False) -> None:
    """Put the scale of the axis, if there is one, and the legend of variants into a place of their own.

    Its height is given in inches, and how many characters its width has.
    """
    looks = {name: canvas.looks[name] for name in canvas.beside}
    handles = {name: _sample(look, look.color, points) for name, look in looks.items()}
    top = 1.0
    if canvas.axis is not None:
        looks = {canvas.axis.curves[name]: canvas.looks[name] for name in canvas.swept}
        handles = {curve: _sample(look, _DARK, points) for curve, look in looks.items()} | handles
        values = canvas.axis.values.values()
        scale = ScalarMappable(Normalize(min(values), max(values)), ListedColormap(SCALE))
        place = axes.inset_axes((0.02, 1 - 0.2 / height, 0.8, 0.15 / height))
        bar = axes.figure.colorbar(scale, cax=place, orientation="horizontal")
        bar.set_label(canvas.axis.setting, color=_GREY)
        bar.outline.set_visible(False)
        top = 1 - 0.8 / height
    _legend(axes, handles, width, top)


def _sample(look: Look, color: str, points: bool) -> Line2D:
    """Return what a legend shows of a look."""
    if points:
        return Line2D([], [], color=color, marker=look.marker, linestyle="none")
    return Line2D([], [], color=color, linestyle=look.line, linewidth=1.7)


def _legend(axes: Axes, handles: dict[str, Line2D], width: int, top: float = 1.0) -> None:
    # A label that begins with an underscore would be left out, and a dollar sign would begin a formula.
    labels = [f" {label(name, width)}".replace("$", r"\$") for name in handles]
    legend = axes.legend(
        list(handles.values()),
        labels,
        loc="upper left",
        bbox_to_anchor=(0, top),
        fontsize=8,
        frameon=False,
        labelspacing=0.25,
    )
    legend.set_in_layout(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The name of a user's policy may need characters that the font lacks: they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
