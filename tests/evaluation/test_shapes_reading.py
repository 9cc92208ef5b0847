"""Reading rendered scenes back, as they are and blurred: colours, kinds, places, and verdicts on whole videos."""

import dataclasses
import math
import re

import cv2
import numpy as np
import pytest
from conftest import script

from rfjax.commands.plan import SHIPPED
from rfjax.data.shapes import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, places, render
from rfjax.errors import UserError
from rfjax.evaluation.shape_videos import measure_windows, read_video, shown
from rfjax.evaluation.shapes import Reading, read_frame

HEIGHT, WIDTH = 64, 96


def shape(colour: str, kind: str, place=(0.5, 0.5), **changes) -> Shape:
    return dataclasses.replace(Shape(colour, kind, "turns", 0.2, place, (0.0, 0.0), 0.0, 0.0, 0.0), **changes)


def blurred(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 5, frames.shape)
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in frames])
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


def seen(reading: Reading) -> set[tuple[str | None, str | None]]:
    return {(thing.colour, thing.kind) for thing in reading.things}


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_kind_is_read_in_every_colour_on_every_background(background, colour):
    for kind in KINDS:
        frame = blurred(render(Scene(background, (shape(colour, kind, rate=1.0),), 0), 5, HEIGHT, WIDTH)[-1:])[0]
        reading = read_frame(frame)
        assert reading.background == background
        assert seen(reading) == {(colour, kind)}


def test_centre_area_and_colour_are_those_that_were_drawn():
    scene = Scene("gray", (shape("blue", "circle", (0.2, 0.7)), shape("yellow", "square", (0.9, 0.1))), 0)
    frame = render(scene, 1, HEIGHT, WIDTH)[0]
    centres = places(scene, np.zeros(1), WIDTH / HEIGHT).centre[0]
    areas = (math.pi * 0.2**2, 2 * 0.2**2)
    things = sorted(read_frame(frame).things, key=lambda thing: str(thing.colour))
    for thing, part, centre, area in zip(things, scene.shapes, centres, areas, strict=True):
        assert (thing.colour, thing.kind) == (part.colour, part.kind)
        assert thing.centre == pytest.approx(tuple(centre), abs=0.004)
        assert thing.area == pytest.approx(area, rel=0.03)
        assert thing.rgb == pytest.approx(COLOURS[part.colour], abs=3)


def test_pictures_of_other_sizes_are_read_alike():
    scene = Scene("sand", (shape("red", "triangle"), shape("yellow", "ring", (0.0, 0.0))), 0)
    for height in (32, 128):
        reading = read_frame(render(scene, 1, height, height * 3 // 2)[0])
        assert seen(reading) == {("red", "triangle"), ("yellow", "ring")}


def test_a_kind_that_is_hidden_in_part_is_left_open():
    scene = Scene("dark", (shape("blue", "ring", (0.5, 0.5)), shape("red", "circle", (0.62, 0.5))), 0)
    things = {thing.colour: thing for thing in read_frame(render(scene, 1, HEIGHT, WIDTH)[0]).things}
    assert things["red"].kind == "circle"
    assert things["blue"].undecided


def test_a_thing_cut_in_two_by_another_is_one_thing():
    bar = shape("red", "ring", radius=0.24)
    scene = Scene("dark", (bar, shape("blue", "square", radius=0.24)), 0)
    frame = render(scene, 1, HEIGHT, WIDTH)[0]
    frame[22:42] = np.where((frame[22:42] == frame[2, 2]).all(-1, keepdims=True), frame[22:42], COLOURS["blue"])
    colours = [thing.colour for thing in read_frame(frame).things]
    assert sorted(map(str, colours)) == ["blue", "red"]


def test_what_has_no_name_is_no_thing_that_was_asked_for():
    plain = render(Scene("dark", (shape("red", "circle", (0.0, 0.5)),), 0), 1, HEIGHT, WIDTH)[0]
    ellipse, white = plain.copy(), plain.copy()
    cv2.ellipse(ellipse, (70, 32), (18, 9), 20, 0, 360, COLOURS["blue"], -1)
    cv2.circle(white, (70, 32), 10, (245, 245, 245), -1)
    assert seen(read_frame(ellipse)) == {("red", "circle"), ("blue", None)}
    assert seen(read_frame(white)) == {("red", "circle"), (None, "circle")}
    assert seen(read_frame(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))) == set()
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    assert all(thing.kind is None for thing in read_frame(noise).things)


MOVING = Scene(
    "brown",
    (
        shape("green", "triangle", (0.1, 0.2), motion="bounces", velocity=(0.3, 0.2)),
        shape("purple", "ring", (0.9, 0.5)),
    ),
    0,
)


@pytest.fixture(scope="module")
def moving() -> np.ndarray:
    return blurred(render(MOVING, 160, HEIGHT, WIDTH))


def changed(scene: Scene, index: int, **changes) -> Scene:
    shapes = list(scene.shapes)
    shapes[index] = dataclasses.replace(shapes[index], **changes)
    return dataclasses.replace(scene, shapes=tuple(shapes))


def test_a_video_shows_its_own_scene_and_no_other(moving):
    readings = read_video(moving[:80])
    assert len(readings) == 20
    assert shown(readings, MOVING) == {"things": True, "colours": True, "kinds": True, "background": True}
    for kind in set(KINDS) - {"triangle"}:
        verdict = shown(readings, changed(MOVING, 0, kind=kind))
        assert verdict == {"things": False, "colours": True, "kinds": False, "background": True}
    for colour in set(COLOURS) - {"green", "purple"}:
        verdict = shown(readings, changed(MOVING, 1, colour=colour))
        assert verdict == {"things": False, "colours": False, "kinds": True, "background": True}
    swapped = changed(changed(MOVING, 0, kind="ring"), 1, kind="triangle")
    assert shown(readings, swapped) == {"things": False, "colours": True, "kinds": True, "background": True}
    assert not shown(readings, dataclasses.replace(MOVING, background="dark"))["background"]


def test_a_thing_too_many_or_too_few_is_not_what_was_asked_for(moving):
    readings = read_video(moving[:80])
    assert not shown(readings, dataclasses.replace(MOVING, shapes=MOVING.shapes[:1]))["things"]
    alone = read_video(render(dataclasses.replace(MOVING, shapes=MOVING.shapes[:1]), 80, HEIGHT, WIDTH))
    assert not shown(alone, MOVING)["things"]


def test_a_thing_has_to_be_there_most_of_the_time(moving):
    readings = read_video(moving[:80])
    empty = dataclasses.replace(readings[0], things=())
    assert shown([*readings[:15], *[empty] * 5], MOVING)["things"]
    assert not shown([*readings[:14], *[empty] * 6], MOVING)["things"]


def test_motion_is_that_of_the_scene_and_nothing_drifts(moving):
    scene = Scene("gray", (shape("red", "circle", motion="circles", orbit=0.2, rate=2.0),), 0)
    first, second = measure_windows(render(scene, 170, HEIGHT, WIDTH), scene)
    assert (first.seconds, second.seconds) == (5, 10)
    # A chord of a quarter of a second, not the arc.
    assert first.motion == pytest.approx(4 * 2 * 0.2 * math.sin(0.25), rel=0.02)
    assert first.flicker < 0.0005
    assert second.background_drift < 0.2
    assert second.colour_drift < 0.5
    assert second.area_change < 0.02
    assert first.jumps == 0
    still = measure_windows(np.repeat(moving[:1], 80, axis=0), MOVING)[0]
    assert still.motion == 0
    assert still.flicker == 0


def test_drift_flicker_and_jumps_are_seen():
    scene = Scene("gray", (shape("red", "circle", (0.1, 0.5)),), 0)
    there = render(scene, 160, HEIGHT, WIDTH)
    brighter = there.copy()
    brighter[80:] += 10
    assert measure_windows(brighter, scene)[1].background_drift > 2
    assert measure_windows(brighter, scene)[0].background_drift < 0.2
    blinking = there.copy()
    blinking[::2] += 4
    assert measure_windows(blinking, scene)[0].flicker == pytest.approx(4 / 255, rel=0.05)
    jumping = there.copy()
    jumping[4::8] = there[4::8, :, ::-1]
    window = measure_windows(jumping, scene)[0]
    assert window.jumps == 1
    assert math.isnan(window.motion)


def test_a_video_shorter_than_a_window_cannot_be_measured():
    with pytest.raises(UserError, match=r"a video of 79 frames was to be measured; 80 or more are needed"):
        measure_windows(np.zeros((79, HEIGHT, WIDTH, 3), np.uint8), MOVING)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "5", "7"], "--seconds is 7; a multiple of 5 is needed, such as 5 or 60"),
        (["--prompts", "0"], "--prompts is 0; 1 or more is needed"),
        (["--policies", "relax_forcin"], "did you mean 'relax_forcing'?"),
        ([], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tmp_path, flags, message):
    with pytest.raises(UserError) as refused:
        script("measure_tiny_model").main(
            ["--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"), *flags]
        )
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_measures_the_shipped_model(tmp_path, capsys):
    script("measure_tiny_model").main(
        ["--checkpoint", str(SHIPPED), "--output", str(tmp_path), "--quick", "--workers", "1"]
    )
    files = {path.name for path in tmp_path.iterdir()}
    names = ("drawn", "drawn, through the autoencoder", "relax_forcing", "self_forcing:window_frames=21")
    assert files == {"results.csv", "windows.csv", "table.md", *(f"{name}_5s.png" for name in names)}
    table = (tmp_path / "table.md").read_text()
    assert "| drawn | 5 s | 100% (2/2) | 100% (2/2) | 100% (2/2) | 100% (2/2) | 1 |" in table
    assert re.search(r"\| relax_forcing \| 5 s \| \d+% \([012]/2\) \|", table)
    assert table in capsys.readouterr().out
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 4 * 2


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ([shape("red", "square")], "square"),
        ([shape("red", "circle")], "circle"),
        ([shape("red", "circle"), shape("blue", "square", (0.0, 0.5))], "circle"),
        ([shape("red", "circle"), shape("red", "square", (0.0, 0.5))], "several"),
        ([shape("blue", "square")], "nothing"),
    ],
)
def test_a_single_thing_of_a_colour_is_counted_as_what_it_is_read_as(things, expected):
    reading = read_frame(render(Scene("dark", tuple(things), 0), 1, HEIGHT, WIDTH)[0])
    assert script("read_kinds").seen_as(reading, "red") == expected


def test_a_thing_like_no_kind_is_counted_as_unclear():
    reading = read_frame(render(Scene("dark", (shape("red", "square"),), 0), 1, HEIGHT, WIDTH)[0])
    (thing,) = reading.things
    shapeless = dataclasses.replace(reading, things=(dataclasses.replace(thing, kind=None),))
    assert script("read_kinds").seen_as(shapeless, "red") == "unclear"
