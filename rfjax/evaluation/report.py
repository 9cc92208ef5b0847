"""The report of a study: one HTML file that needs nothing else, neither scripts nor the network."""

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from rfjax.evaluation import report_plots as plots
from rfjax.evaluation.frames import opencv, resized
from rfjax.evaluation.looks import find_axis, looks_of, some
from rfjax.evaluation.measures import SCALARS, Quantity
from rfjax.evaluation.results import Result
from rfjax.evaluation.tables import Spread, by_variant, scalars, spread
from rfjax.io.atomic import replacing
from rfjax.io.video_reader import read_frames

_SHOWN = 12
"""Variants of which a timeline and frames are shown, where a study has more."""
_MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_THUMBNAIL = 220
"""Pixels of the longer side of a shown frame."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1140px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p, figcaption, li { color: #555; margin: .3rem 0 } img { max-width: 100%; height: auto } figure { margin: .6rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
td { white-space: nowrap }
th, td { text-align: right; padding: .2rem .45rem; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 } th small, td small { color: #777 }
th small, td small { display: block; font-weight: 400 } .best { font-weight: 600 } .key { border-left: .6em solid }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .strip { display: flex; gap: 4px }
.strip img { flex: 1 1 0; min-width: 0 } code { font-size: 13px }
"""


def write_report(path: Path, title: str, results: Sequence[Result]) -> None:
    """Write the report of a study's videos, at least one, whole or not at all.

    Args:
        path: of the HTML file.
        title: of the study.
        results: its videos, in the order of the study.

    Raises:
        UserError: the file cannot be written, or a video cannot be read.
    """
    html = _page(title, results)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _page(title: str, results: Sequence[Result]) -> str:
    variants = list({result.variant.name: result.variant for result in results}.values())
    axis = find_axis(variants)
    canvas = plots.Canvas(results, looks_of(variants, axis), axis)
    lines = _distinguished(canvas)
    sections = [
        _head(title, results),
        _section("Measures", _measures_table(canvas), _TABLE_NOTE),
        axis
        and _section(
            f"Against {axis.setting}", _picture(plots.against_setting(canvas), "measures by setting"), _AXIS_NOTE
        ),
        _section(
            "Over time", _picture(plots.over_time(lines), "measures by second"), _TIME_NOTE + _left_out(lines, canvas)
        ),
        _section(
            "Motion against consistency",
            _picture(plots.motion_and_consistency(canvas), "similarity by motion"),
            _SCATTER_NOTE,
        ),
        _selected(canvas),
        _examples(canvas, "What each chunk attended to", _timelines, _TIMELINE_NOTE),
        _examples(canvas, "Frames", _strips, _FRAMES_NOTE),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


_TABLE_NOTE = (
    "Mean over a variant's videos ± their standard deviation; the best mean of a column is bold. No measure is a "
    "verdict: noise has much motion, and a still picture is consistent. How they are computed: docs/measures.md."
)
_PAIRED = "A video counts by how it differs from those of the same prompt and noise under the other variants."
_AXIS_NOTE = f"Line: mean; band: ± standard deviation. {_PAIRED} Coloured levels: variants beside the axis."
_TIME_NOTE = "Mean over a variant's videos in each second; less than half a second at the end is left out."
_SCATTER_NOTE = f"Large: mean of a variant; small: its videos. {_PAIRED} Upper right is better, unless motion is noise."
_SELECTED_NOTE = "How far before a chunk the frames lie that its policy chose by score, over all chunks and videos."
_TIMELINE_NOTE = "The first video of each variant; the folder has one for every video."
_FRAMES_NOTE = "The first video of each variant at 0, 25, 50, 75 and 100% of its length."


def _section(title: str, body: str, note: str) -> str:
    return f"<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n{body}"


def _head(title: str, results: Sequence[Result]) -> str:
    record = results[0].record
    settings, video, model = record["settings"], record["video"], record["model"]
    prompts = list(dict.fromkeys(result.record["prompt"] for result in results))
    count = len(by_variant(results))
    facts = [
        f"{_plural(len(results), 'video')} of {_plural(count, 'variant')}; {video['seconds']:.4g} s each, "
        f"{settings['height']}x{settings['width']} pixels, {settings['fps']} frames a second, "
        f"{settings['latent_frames']} latent frames; seed {settings['seed']}",
        f"{Path(model['path']).name}, {settings['dtype']}, on {record['device']['kind']}; "
        f"rfjax {record['versions']['rfjax']}, JAX {record['versions']['jax']}",
        *([f"Note: {model['description']}"] if model["description"] else []),
    ]
    lines = "\n".join(f"<p>{escape(fact)}</p>" for fact in facts)
    items = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    summary = f"<details><summary>{_plural(len(prompts), 'prompt')}</summary><ul>{items}</ul></details>"
    return f"<h1>{escape(title)}</h1>\n{lines}\n{summary}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _measures_table(canvas: plots.Canvas) -> str:
    videos = canvas.videos
    columns: list[tuple[str, str, dict[str, Spread], set[str]]] = []
    for quantity in SCALARS:
        values = {name: spread(given) for name, given in scalars(canvas.results, quantity.name).items()}
        columns.append((quantity.title, quantity.unit, values, _best(quantity, values)))
    attended = {name: Spread(float(group[0].record["attended_frames"]), math.nan) for name, group in videos.items()}
    seconds = {name: spread([video.chunk_seconds for video in group]) for name, group in videos.items()}
    columns += [("attended", "latent frames", attended, set()), ("time", "s a chunk", seconds, set())]
    head = "".join(f"<th>{escape(title)}<small>{escape(unit) or '&nbsp;'}</small></th>" for title, unit, *_ in columns)
    rows = []
    for name, group in videos.items():
        first = f'<td class="key" style="border-left-color:{canvas.looks[name].color}">{escape(name)}</td>'
        cells = "".join(
            f"<td{' class=best' * (name in best)}>{_with_spread(values[name])}</td>" for _, _, values, best in columns
        )
        rows.append(f"<tr>{first}<td>{len(group)}</td>{cells}</tr>")
    return f'<div class="wide"><table>\n<tr><th>variant</th><th>videos</th>{head}</tr>\n{"".join(rows)}\n</table></div>'


def _best(quantity: Quantity, values: dict[str, Spread]) -> set[str]:
    known = {name: value.mean for name, value in values.items() if not math.isnan(value.mean)}
    if quantity.better == "neither" or len(known) < 2:
        return set()
    best = (max if quantity.better == "higher" else min)(known.values())
    shown = {name for name, mean in known.items() if _number(mean) == _number(best)}
    return shown if len(shown) < len(known) else set()


def _with_spread(value: Spread) -> str:
    if math.isnan(value.mean):
        return "–"
    deviation = "" if math.isnan(value.deviation) else f"<small>± {value.deviation:.2g}</small>"
    return f"{_number(value.mean)}{deviation}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _distinguished(canvas: plots.Canvas) -> plots.Canvas:
    """Leave out lines where there are more than a picture can tell apart."""
    kept = {*some(canvas.beside, plots.MOST_LINES), *some(canvas.swept, plots.MOST_LINES)}
    results = [video for name, videos in canvas.videos.items() if name in kept for video in videos]
    return plots.Canvas(results, canvas.looks, canvas.axis)


def _left_out(shown: plots.Canvas, canvas: plots.Canvas) -> str:
    return f" {len(shown.videos)} of {len(canvas.videos)} variants." if len(shown.videos) < len(canvas.videos) else ""


def _selected(canvas: plots.Canvas) -> str:
    pictures = plots.selected_frames(canvas)
    return (
        _section(
            "Selected frames",
            "".join(_picture(picture, "histogram of distances") for picture in pictures),
            _SELECTED_NOTE,
        )
        if pictures
        else ""
    )


def _examples(canvas: plots.Canvas, title: str, draw: Callable[[dict[str, Result]], str], note: str) -> str:
    """Show something of the first video of each variant, or of some variants where there are many."""
    names = some(list(canvas.videos), _SHOWN)
    if len(names) < len(canvas.videos):
        note += f" {len(names)} of {len(canvas.videos)} variants, evenly spaced."
    return _section(title, draw({name: canvas.videos[name][0] for name in names}), note)


def _timelines(examples: dict[str, Result]) -> str:
    figures = []
    for name, result in examples.items():
        try:
            picture = (result.folder / result.record["timeline"]).read_bytes()
        except OSError:
            continue  # removed by hand; it says nothing that metadata.json does not
        figures.append(f"<figure>{_picture(picture, name)}<figcaption>{escape(name)}</figcaption></figure>")
    return f'<div class="pair">{"".join(figures)}</div>'


def _strips(examples: dict[str, Result]) -> str:
    figures = []
    for name, result in examples.items():
        pictures = "".join(_image("jpeg", picture, name) for picture in thumbnails(result.path))
        figures.append(f'<figure><div class="strip">{pictures}</div><figcaption>{escape(name)}</figcaption></figure>')
    return "".join(figures)


def thumbnails(path: Path) -> list[bytes]:
    """Return five frames of a video, from its first to its last, as small JPEG files.

    Raises:
        UserError: the video cannot be read.
    """
    cv2 = opencv()
    frames = read_frames(path)
    last = max(frames.announced - 1, 0)
    wanted = [round(moment * last) for moment in _MOMENTS]
    pictures: dict[int, bytes] = {}
    for number, frame in enumerate(frames):
        if number in wanted:
            small = resized(frame, _THUMBNAIL)
            _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 90])
            pictures[number] = encoded.tobytes()
    return [pictures[number] for number in wanted]


def _picture(png: bytes, description: str) -> str:
    return _image("png", png, description)


def _image(kind: str, content: bytes, description: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{data}">'
