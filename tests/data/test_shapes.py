"""Scenes of moving shapes: exact parameters, motions that stay, pictures that show what the caption says."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    FPS,
    KINDS,
    STAYING,
    VERBS,
    Scene,
    Shape,
    caption,
    held_out,
    places,
    random_scene,
    render,
    staying_scenes,
)
from rfjax.errors import UserError

seeds = st.integers(0, 2**32 - 1)
quickly = settings(max_examples=40, deadline=None)
splits = st.sampled_from(["train", "test"])


def drawn(seed: int, split: str = "train") -> Scene:
    return random_scene(np.random.default_rng(seed), split)


def one(motion: str, kind: str = "circle", **changes) -> Scene:
    shape = Shape("red", kind, motion, 0.2, (0.5, 0.5), (0.0, 0.0), 0.0, 0.0, 0.0)
    return Scene("dark", (dataclasses.replace(shape, **changes),), 0)


@quickly
@given(seed=seeds, split=splits)
def test_the_same_seed_draws_the_same_scene_and_json_keeps_it_exactly(seed, split):
    scene = drawn(seed, split)
    assert drawn(seed, split) == scene
    assert Scene.from_json(scene.to_json()) == scene
    assert Scene.from_json(json.dumps(json.loads(scene.to_json()))) == scene


@quickly
@given(seed=seeds)
def test_splits_show_different_sets_of_things(seed):
    assert not held_out(drawn(seed, "train"))
    assert held_out(drawn(seed, "test"))


def test_what_is_held_out_depends_on_things_alone_not_on_their_order_or_motion():
    scenes = [drawn(seed, split) for seed in range(40) for split in ("train", "test")]
    for scene in scenes:
        other = Scene("gray", tuple(dataclasses.replace(s, motion="turns") for s in scene.shapes[::-1]), 2)
        assert held_out(other) == held_out(scene)


def test_a_tenth_is_held_out_and_among_it_are_single_things_and_pairs():
    shapes = [dataclasses.replace(one("turns").shapes[0], colour=c, kind=k) for c in COLOURS for k in KINDS]
    single = [held_out(Scene("dark", (shape,), 0)) for shape in shapes]
    pairs = [held_out(Scene("dark", (a, b), 0)) for a in shapes for b in shapes if a.colour < b.colour]
    assert 2 <= sum(single) <= 7
    assert 0.07 < np.mean(pairs) < 0.14


def test_most_shapes_stay_and_in_a_scene_of_two_at_least_one_does():
    scenes = [drawn(seed) for seed in range(800)]
    stays = [[shape.motion in STAYING for shape in scene.shapes] for scene in scenes]
    assert all(any(pair) for pair in stays if len(pair) == 2)
    assert 0.68 < np.mean(list(itertools.chain(*stays))) < 0.8
    assert {shape.motion for scene in scenes for shape in scene.shapes} == set(VERBS)
    assert {shape.kind for scene in scenes for shape in scene.shapes} == set(KINDS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


@quickly
@given(seed=seeds, aspect=st.floats(1.0, 3.0), start=st.floats(0, 3600))
def test_staying_shapes_are_whole_within_the_picture_at_any_time(seed, aspect, start):
    scene = drawn(seed)
    where = places(scene, start + np.arange(200) / FPS, aspect)
    for index, shape in enumerate(scene.shapes):
        if shape.motion in STAYING:
            near = np.minimum(where.centre[:, index], [aspect, 1.0] - where.centre[:, index])
            assert near.min() >= shape.radius - 1e-9
            np.testing.assert_array_equal(where.scale[:, index], 1.0)


@quickly
@given(seed=seeds)
def test_shapes_move_without_jumps(seed):
    scene = drawn(seed)
    where = places(scene, np.arange(400) / FPS, 1.5)
    for index, shape in enumerate(scene.shapes):
        steps = np.linalg.norm(np.diff(where.centre[:, index], axis=0), axis=1) * FPS
        assert steps.max() <= max(math.hypot(*shape.velocity), abs(shape.rate) * shape.orbit) + 1e-9
        assert steps.max() <= 0.55
        assert np.abs(np.diff(where.scale[:, index])).max() <= 2.5 / FPS


def test_places_can_be_asked_for_at_any_time_alone():
    scene = drawn(3)
    times = np.arange(50) / FPS
    for field in ("centre", "angle", "scale"):
        whole = getattr(places(scene, times, 1.5), field)
        np.testing.assert_array_equal(getattr(places(scene, times[20:21], 1.5), field), whole[20:21])


def test_a_bouncing_shape_comes_back_from_the_wall():
    where = places(one("bounces", place=(0.0, 0.5), velocity=(0.5, 0.0)), np.array([0.0, 1.0, 2.2, 3.4, 4.4]), 1.5)
    np.testing.assert_allclose(where.centre[:, 0, 0], [0.2, 0.7, 1.3, 0.7, 0.2])


def test_a_crossing_shape_comes_from_outside_and_goes_to_the_other_outside():
    for place, velocity in ((0.0, 0.5), (1.0, -0.5)):
        scene = one("crosses", place=(place, 0.5), velocity=(velocity, 0.0))
        x = places(scene, np.array([0.0, 1.9, 3.8]), 1.5).centre[:, 0, 0]
        np.testing.assert_allclose(x, [-0.2, 0.75, 1.7][:: int(np.sign(velocity))])


def test_a_leaving_shape_waits_and_never_comes_back():
    scene = one("leaves", velocity=(0.3, 0.3), start=1.0)
    centre = places(scene, np.array([0.0, 1.0, 2.0, 60.0]), 1.5).centre[:, 0]
    np.testing.assert_allclose(centre, [[0.75, 0.5], [0.75, 0.5], [1.05, 0.8], [18.45, 18.2]])


def test_an_appearing_shape_grows_where_there_was_nothing():
    scene = one("appears", start=1.0)
    video = render(scene, 40, 32, 48)
    red = (video != video[0]).any(axis=-1).sum(axis=(1, 2))
    assert (red[:17] == 0).all()
    assert (np.diff(red[16:25]) > 0).all()
    assert (red[24:] == red[24]).all()


def test_turning_turns_and_nothing_else_does():
    times = np.array([0.0, 1.0])
    np.testing.assert_allclose(places(one("turns", "square", rate=2.0), times, 1.5).angle[:, 0], [0, 2])
    np.testing.assert_array_equal(places(one("circles", orbit=0.2, rate=2.0), times, 1.5).angle, 0)


@quickly
@given(seed=seeds, kind=st.sampled_from(KINDS), colour=st.sampled_from(list(COLOURS)))
def test_the_picture_has_the_shape_s_colour_inside_it_and_the_background_outside(seed, kind, colour):
    rng = np.random.default_rng(seed)
    scene = one("turns", kind, colour=colour, place=(rng.random(), rng.random()), rate=rng.normal())
    scene = dataclasses.replace(scene, background=str(rng.choice(list(BACKGROUNDS))))
    frames, height, width = 3, 64, 96
    video = render(scene, frames, height, width).astype(int)
    where = places(scene, np.arange(frames) / FPS, width / height)
    y, x = np.mgrid[:height, :width] + 0.5
    for frame in range(frames):
        centre = where.centre[frame, 0]
        away = np.hypot(x / height - centre[0], y / height - centre[1]) / scene.shapes[0].radius
        has_colour = np.abs(video[frame] - COLOURS[colour]).max(axis=-1) <= 1
        inside = (away > 0.6) & (away < 0.9) if kind == "ring" else away < 0.25
        assert has_colour[inside].all()
        ground = np.array(BACKGROUNDS[scene.background])
        assert (np.abs(video[frame] - ground).max(axis=-1) <= 0.07 * ground.max())[away > 1.2].all()


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("circle", math.pi),
        ("square", 2.0),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("ring", 0.75 * math.pi),
    ],
)
def test_kinds_have_their_areas_at_every_angle(kind, area):
    scene = one("turns", kind, rate=5.3)
    video = render(scene, 4, 128, 128).astype(float)
    ground = render(one("appears", start=9.0), 1, 128, 128)[0, ..., 0]
    cover = ((video[..., 0] - ground) / (COLOURS["red"][0] - ground.astype(float))).sum(axis=(1, 2))
    np.testing.assert_allclose(cover / (0.2 * 128) ** 2, area, rtol=0.03)


def test_one_corner_of_a_triangle_points_up():
    picture = render(one("turns", "triangle"), 1, 96, 96)[0]
    rows, columns = np.nonzero(picture[..., 0] > 150)
    assert abs(columns[rows == rows.min()].mean() - 47.5) < 1
    assert rows.min() < 96 * 0.33
    assert rows.max() < 96 * 0.68


def test_the_front_shape_hides_the_other():
    back, front = one("turns").shapes[0], one("turns", colour="blue").shapes[0]
    picture = render(Scene("dark", (back, front), 0), 1, 32, 48)[0]
    np.testing.assert_array_equal(picture[16, 24], COLOURS["blue"])


def test_captions_in_every_wording():
    scene = Scene(
        "dark",
        (one("bounces").shapes[0], dataclasses.replace(one("circles", "square").shapes[0], colour="purple")),
        0,
    )
    said = [caption(dataclasses.replace(scene, wording=wording)) for wording in range(3)]
    assert said == [
        "a red circle bounces and a purple square goes around on a dark background",
        "on a dark background, a red circle bounces and a purple square goes around",
        "a red circle that bounces, a purple square that goes around, dark background",
    ]


def test_captions_say_what_is_there():
    for seed in range(50):
        scene = drawn(seed)
        text = caption(scene)
        assert scene.background in text
        for shape in scene.shapes:
            assert f"{shape.colour} {shape.kind}" in text
            assert VERBS[shape.motion] in text


def test_a_picture_higher_than_wide_is_refused():
    with pytest.raises(UserError, match=r"0\.5 times as wide as high; it needs 1 or more"):
        render(drawn(0), 1, 64, 32)


@pytest.mark.parametrize("split", ["train", "test"])
def test_staying_scenes_are_of_their_split_and_stay(split):
    scenes = staying_scenes(np.random.default_rng(0), split, 20)
    assert len({scene.to_json() for scene in scenes}) == 20
    assert all(held_out(scene) == (split == "test") for scene in scenes)
    assert all(part.motion in ("bounces", "circles", "turns") for scene in scenes for part in scene.shapes)
