"""The report: what it says, that it is safe and whole, and what its pictures show."""

import base64
import dataclasses
import io
import re
import socket
from html.parser import HTMLParser
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.image import imread
from study_fakes import make_video, record_of, results_of, variants_of

from rfjax.evaluation import report_plots as plots
from rfjax.evaluation.looks import PALETTE, find_axis, looks_of, some
from rfjax.evaluation.measures import SERIES
from rfjax.evaluation.report import thumbnails, write_report
from rfjax.evaluation.results import Result

THREE = variants_of(
    {"policy": "relax_forcing", "settings": {"redundancy_weight": [0.5, 1]}},
    {"policy": "attention_sink"},
)
MANY = variants_of(
    {"policy": "relax_forcing", "settings": {"redundancy_weight": {"from": 0, "to": 4, "steps": 20}}},
    {"policy": "attention_sink"},
)


class Page(HTMLParser):
    """Texts, images and all tags of a page, which must be closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[str] = []
        self.images: list[tuple[str, bytes]] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            source = dict(attrs)["src"]
            assert source is not None
            assert source.startswith("data:image/")
            kind, _, data = source.partition(";base64,")
            self.images.append((kind.removeprefix("data:image/"), base64.b64decode(data)))
        elif tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def page_of(tmp_path, results: list[Result], title: str = "A study") -> Page:
    make_video(tmp_path)
    write_report(tmp_path / "report.html", title, results)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "video.mp4", "memory_timeline.png"}
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_report_of_three_variants(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was used"))
    page = page_of(tmp_path, results_of(THREE, tmp_path))
    assert "6 videos of 3 variants; 4 s each, 32x48 pixels, 8 frames a second, 12 latent frames; seed 0" in page.text
    assert "Note: random weights" in page.text
    for variant in THREE:
        assert page.texts.count(variant.name) == 3  # in the table, under its timeline and under its frames
    assert "Selected frames" in page.text
    assert "Against" not in page.text
    kinds = [kind for kind, _ in page.images]
    assert kinds == ["png"] * (3 + 3) + ["jpeg"] * 15
    assert [content for _, content in page.images[3:6]] == [b"\x89PNG timeline"] * 3
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_best_means_are_bold_and_spreads_are_told(tmp_path):
    page_of(tmp_path, results_of(THREE, tmp_path))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td.*?</tr>", html)
    assert len(rows) == 3
    assert [len(re.findall("class=best", row)) for row in rows] == [3, 0, 3]  # three are better lower, three higher
    assert "<td class=best>2.12<small>± 0.18</small></td>" in rows[2]
    assert "<td>1<small>± 0</small></td>" in rows[0]  # seconds a chunk


def test_markup_in_names_and_prompts_is_text(tmp_path):
    (variant,) = variants_of({"policy": "attention_sink"})
    prompt = "<script>alert(1)</script> & <b>"
    page = page_of(tmp_path, results_of([variant], tmp_path, prompts=(prompt,)), title="<i>A & B</i>")
    assert prompt in page.texts
    assert page.texts.count("<i>A & B</i>") == 2
    assert not {"script", "b", "i"} & set(page.tags)


def test_many_values_of_a_setting_have_an_axis(tmp_path):
    page = page_of(tmp_path, results_of(MANY, tmp_path))
    assert "Against redundancy_weight" in page.text
    assert "12 of 21 variants, evenly spaced." in page.text
    assert "17 of 21 variants." in page.text  # lines
    assert [kind for kind, _ in page.images] == ["png"] * (4 + 12) + ["jpeg"] * 60


def test_short_videos_without_choices_and_without_timeline_have_a_report(tmp_path):
    (variant,) = variants_of({"policy": "attention_sink"})
    results = results_of([variant], tmp_path, prompts=("a cat",))
    (tmp_path / "other").mkdir()
    make_video(tmp_path / "other", frames=1)
    (tmp_path / "other" / "memory_timeline.png").unlink()
    write_report(
        tmp_path / "report.html", "Short", [Result(variant, tmp_path / "other", results[0].record, results[0].measures)]
    )
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Selected frames" not in page.text
    assert [kind for kind, _ in page.images] == ["png"] * 2 + ["jpeg"] * 5


def test_thumbnails_are_the_frames_they_say(tmp_path):
    make_video(tmp_path)
    files = [np.frombuffer(data, np.uint8) for data in thumbnails(tmp_path / "video.mp4")]
    pictures: list[Any] = [cv2.imdecode(file, cv2.IMREAD_COLOR) for file in files]
    assert [picture.mean() for picture in pictures] == pytest.approx([20, 70, 120, 170, 220], abs=3)
    assert pictures[0].shape == (147, 220, 3)


# --- which look and axis ---------------------------------------------------------------------------------------------


def test_few_variants_have_a_colour_each():
    variants = variants_of(
        {"policy": "attention_sink", "settings": {"tail_frames": [3, 4], "sink_frames": [1, 2, 3, 4, 5]}}
    )
    assert find_axis(variants) is None
    looks = looks_of(variants, None)
    assert [look.color for look in looks.values()] == [*PALETTE, *PALETTE[:2]]
    assert [look.line for look in looks.values()] == ["-"] * 8 + ["--"] * 2


def test_the_axis_is_the_number_with_the_most_values():
    variants = variants_of(
        {
            "policy": "relax_forcing",
            "settings": {"redundancy_weight": [0, 1, 2, 3, 4, 5, 8], "history_candidates": [4, 5, 6, 7, 8, 9]},
        },
        {"policy": "attention_sink"},
    )
    axis = find_axis(variants)
    assert axis is not None
    assert axis.setting == "redundancy_weight"
    assert set(axis.values.values()) == {0, 1, 2, 3, 4, 5, 8}
    assert set(axis.curves.values()) == {f"relax_forcing,history_candidates={count}" for count in range(4, 10)}
    looks = looks_of(variants, axis)
    assert looks["relax_forcing,redundancy_weight=0,history_candidates=4"].line == "-"
    assert looks["relax_forcing,redundancy_weight=0,history_candidates=5"].line == "--"
    colors = {name: look.color for name, look in looks.items()}
    same = [colors[f"relax_forcing,redundancy_weight=8,history_candidates={count}"] for count in (4, 9)]
    assert same[0] == same[1]
    assert colors["attention_sink"] not in same


def test_words_are_no_axis():
    variants = variants_of(
        {"policy": "relax_forcing", "settings": {"positions": ["hybrid", "true"], "sink_frames": [1, 2, 3]}}
    )
    assert find_axis(variants) is None


def test_some_keeps_both_ends():
    names = [str(number) for number in range(50)]
    assert some(names, 5) == ["0", "12", "24", "37", "49"]
    assert some(names[:5], 5) == names[:5]


# --- pictures --------------------------------------------------------------------------------------------------------


def canvas_of(variants) -> plots.Canvas:
    axis = find_axis(variants)
    return plots.Canvas(results_of(variants), looks_of(variants, axis), axis)


def colors_of(png: bytes) -> set[str]:
    pixels = (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)
    return {f"#{color:06x}" for color in np.unique(pixels @ [2**16, 2**8, 1])}


def test_every_variant_has_its_colour_in_the_pictures():
    canvas = canvas_of(THREE)
    expected = {color.lower() for color in PALETTE[:3]}
    for draw in (plots.over_time, plots.motion_and_consistency):
        assert expected <= colors_of(draw(canvas))
    (bars,) = plots.selected_frames(canvas)
    assert {color.lower() for color in PALETTE[:2]} <= colors_of(bars)
    assert PALETTE[2].lower() not in colors_of(bars)


def test_a_few_frames_at_the_end_are_no_second():
    def drawn(last: float, seconds: float) -> bytes:
        results = results_of(THREE[:1], prompts=("a cat",))
        results[0].record["video"]["seconds"] = seconds
        for quantity in SERIES:
            getattr(results[0].measures, quantity.name)[-1] = last
        return plots.over_time(plots.Canvas(results, looks_of(THREE, None), None))

    assert drawn(1e6, 3.2) == drawn(5.0, 3.2)
    assert drawn(1e6, 3.6) != drawn(5.0, 3.6)


def test_pictures_of_a_setting():
    canvas = canvas_of(MANY)
    beside = canvas.looks["attention_sink"].color.lower()
    for draw in (plots.over_time, plots.motion_and_consistency, plots.against_setting):
        assert beside in colors_of(draw(canvas))
    (choices,) = plots.selected_frames(canvas)
    assert len(colors_of(choices)) > 10


def test_distances_are_counted_from_the_chunk():
    (variant,) = variants_of({"policy": "relax_forcing"})
    assert results_of([variant])[0].selected_distances == [4, 6, 4]
    record = record_of(variant, "a cat", 0, selected_frames=[[], [0, 2], [], []])
    assert Result(
        variant, results_of([variant])[0].folder, record, results_of([variant])[0].measures
    ).selected_distances == [3, 1]


def test_names_of_any_kind_can_be_drawn():
    odd = [dataclasses.replace(THREE[0], name="_$x$_"), dataclasses.replace(THREE[1], name="映画")]
    canvas = canvas_of(odd)
    assert plots.over_time(canvas)
    assert plots.selected_frames(canvas)
