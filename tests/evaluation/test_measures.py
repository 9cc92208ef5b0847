"""The measures on videos whose truth is known."""

import dataclasses
import sys
import weakref

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax.errors import UserError
from rfjax.evaluation.measures import SCALARS, SERIES, Measures, measure
from rfjax.evaluation.repetition import returns
from rfjax.io.video import VideoWriter
from rfjax.io.video_reader import read_frames

FPS = 8
LEVELS = st.integers(0, 255)


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Grey noise, the finer the weaker, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((height, width)))
    image = np.fft.ifft2(noise / frequency**1.2).real
    return (128 + 45 * image / image.std()).clip(0, 255).astype(np.uint8)


def in_grey(frames) -> np.ndarray:
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def levels(*values: int, height: int = 16, width: int = 24) -> np.ndarray:
    return in_grey([np.full((height, width), value, np.uint8) for value in values])


def panned(speed: int, frames: int, height: int = 72, width: int = 128) -> np.ndarray:
    """A camera that moves over one large picture."""
    large = texture(height, width + speed * frames)
    return in_grey([large[:, speed * t : speed * t + width] for t in range(frames)])


def scalars(measures: Measures) -> dict[str, float]:
    return {quantity.name: getattr(measures, quantity.name) for quantity in SCALARS}


@pytest.mark.parametrize(("height", "width"), [(120, 208), (72, 48), (48, 64), (24, 40), (288, 512)])
@pytest.mark.parametrize("speed", [1, 2, 5])
def test_motion_is_the_speed_of_a_pan(height, width, speed):
    motion = measure(panned(speed, 6, height, width), FPS).motion
    assert motion == pytest.approx(speed * FPS / np.hypot(height, width), rel=0.1)


def test_motion_counts_both_directions():
    large = texture(140, 128)
    video = in_grey([large[4 * t : 4 * t + 72, 3 * t : 3 * t + 90] for t in range(8)])
    assert measure(video, FPS).motion == pytest.approx(5 * FPS / np.hypot(72, 90), rel=0.1)


def test_motion_does_not_depend_on_the_frame_rate():
    video = panned(1, 33)
    assert measure(video[::4], FPS / 4).motion == pytest.approx(measure(video, FPS).motion, rel=0.05)


def test_motion_of_each_second():
    video = np.concatenate([panned(2, 17), np.repeat(panned(2, 17)[-1:], 15, axis=0)])
    series = measure(video, FPS).motion_series
    assert series[:2] == pytest.approx([2 * FPS / np.hypot(72, 128)] * 2, rel=0.1)
    assert series[3] == 0


@settings(max_examples=20, deadline=None)
@given(first=LEVELS, second=LEVELS)
def test_both_flickers_of_alternating_brightness(first, second):
    measures = measure(levels(first, second, first, second, first), FPS)
    assert measures.flicker == pytest.approx(abs(first - second) / 255, abs=1e-6)
    assert measures.temporal_flickering == pytest.approx(1 - abs(first - second) / 255)
    assert measures.motion == pytest.approx(0, abs=1e-6)


def test_temporal_flickering_of_noise_is_its_closed_form():
    video = np.random.default_rng(0).integers(0, 256, (9, 60, 90, 3), np.uint8)
    expected = 1 - (256**2 - 1) / (3 * 256) / 255  # the mean distance of two of 256 equally likely levels
    assert measure(video, FPS).temporal_flickering == pytest.approx(expected, abs=0.003)


def test_flicker_is_apart_from_motion():
    moving = measure(panned(3, 8), FPS)
    shaken = panned(3, 8).astype(int)
    shaken[1::2] += 20
    flickering = measure((shaken / 1.2).astype(np.uint8), FPS)
    assert moving.flicker < 0.12 * (1 - moving.temporal_flickering)
    assert flickering.flicker == pytest.approx(20 / 1.2 / 255, rel=0.1)
    assert flickering.motion == pytest.approx(moving.motion, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(first=LEVELS, second=LEVELS)
def test_similarity_of_plain_frames_is_its_closed_form(first, second):
    constant = (0.01 * 255) ** 2
    expected = (2 * first * second + constant) / (first**2 + second**2 + constant)
    series = measure(levels(first, second), 1.0).similarity_series
    assert series == pytest.approx([1, expected])


def test_similarity_falls_along_a_cross_fade():
    first, last = texture(48, 80, 1).astype(float), texture(48, 80, 2).astype(float)
    video = in_grey([(first + (last - first) * share).astype(np.uint8) for share in np.linspace(0, 1, 4 * FPS)])
    measures = measure(video, FPS)
    assert np.all(np.diff(measures.similarity_series) < -0.05)
    assert measures.similarity_series[0] > 0.9
    assert measures.similarity_series[-1] < 0.3
    assert measures.similarity == pytest.approx(measures.similarity_series.mean())


def test_similarity_forgives_noise_and_small_movements():
    picture = texture(90, 160)
    noise = np.random.default_rng(0).normal(0, 3, picture.shape)
    moved = (np.roll(picture, 1, axis=1) + noise).clip(0, 255).astype(np.uint8)
    other = texture(90, 160, seed=1)
    assert measure(in_grey([picture, moved]), FPS).similarity_series[0] > 0.95
    assert measure(in_grey([picture, other]), FPS).similarity_series[0] < 0.65  # 0.5 is its own, first frame


@settings(max_examples=20, deadline=None)
@given(first=LEVELS, second=LEVELS)
def test_colour_drift_of_plain_grey_is_the_difference_in_lightness(first, second):
    def lightness(level: int) -> float:
        linear = level / 255 / 12.92 if level <= 10 else ((level / 255 + 0.055) / 1.055) ** 2.4
        return 116 * np.cbrt(linear) - 16 if linear > 216 / 24389 else 24389 / 27 * linear

    series = measure(levels(first, first, second, second), 2.0).colour_drift_series
    assert series == pytest.approx([0, abs(lightness(first) - lightness(second))], abs=0.4)  # OpenCV interpolates


def test_colour_drift_counts_means_and_deviations_of_all_channels():
    red, green = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((8, 8, 3), (0, 255, 0), np.uint8)
    striped = np.concatenate([red, green], axis=1)
    plain = np.concatenate([red, red], axis=1)
    # L*a*b* of sRGB's red and green
    distance = np.subtract((53.24, 80.09, 67.20), (87.73, -86.18, 83.18))
    drift = measure([plain, striped], 1.0).colour_drift_series[1]
    assert drift == pytest.approx(np.sqrt(2) * np.linalg.norm(distance) / 2, rel=0.01)


def test_saturation_is_the_chroma():
    video = np.stack([np.full((20, 30, 3), colour, np.uint8) for colour in [(255, 0, 0), (128, 128, 128)]])
    assert measure(video, 1.0).saturation_series == pytest.approx([104.55, 0], abs=0.1)


def test_sharpness_is_the_variance_of_the_laplacian():
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 10).astype(np.uint8)  # each pixel 10 from its 4 neighbours
    assert measure(in_grey([board]), FPS).sharpness == pytest.approx(40**2)
    picture = texture(90, 160)
    blurred = cv2.GaussianBlur(picture, (0, 0), 2)
    first, second = measure(in_grey([picture, blurred]), 1.0).sharpness_series
    assert second < first / 4


def test_repetition_is_its_formula():
    fps, frames = 5, 140  # more than one block
    frequency = np.random.default_rng(0).uniform(0.05, 0.3, (2, 3))
    video = (128 + 60 * np.sin(frequency * np.arange(frames)[:, None, None])).astype(np.uint8)
    seconds = {t: video[t - fps + 1 : t + 1].astype(float) for t in range(fps - 1, frames)}
    expected = np.full(frames, np.nan)
    for t in range(3 * fps - 1, frames):
        distance = {s: np.sqrt(np.mean((seconds[s] - seconds[t]) ** 2)) for s in range(fps - 1, t)}
        between = {s: np.mean([distance[u] for u in range(s + 1, t)]) for s in range(fps - 1, t - 2 * fps + 1)}
        expected[t] = max(0, *((mean - distance[s]) / max(mean, 2) for s, mean in between.items()))
    assert np.nanmax(expected) > 0.1
    np.testing.assert_allclose(returns(video, fps), expected, atol=1e-9)


@pytest.mark.parametrize("period", [7, 16, 23])
def test_loop_is_repetition(period):
    measures = measure(panned(3, period)[np.arange(8 * FPS) % period], FPS)
    assert measures.repetition == pytest.approx(1, abs=0.05)
    assert measures.repetition_series[-3:] == pytest.approx(1)


def test_loop_that_comes_back_slightly_changed():
    video = panned(3, 24)[np.arange(8 * FPS) % 24].astype(float)
    noisy = (video + np.random.default_rng(0).normal(0, 4, video.shape)).clip(0, 255).astype(np.uint8)
    assert 0.9 < measure(noisy, FPS).repetition < 0.999


@pytest.mark.parametrize("speed", [1, 4])
def test_what_only_moves_on_is_no_repetition(speed):
    assert measure(panned(speed, 8 * FPS), FPS).repetition < 0.15


def test_stillness_is_no_repetition():
    picture = texture(72, 128).astype(float)
    noise = np.random.default_rng(0).normal(0, 2, (8 * FPS, 72, 128))
    assert measure(in_grey([picture.astype(np.uint8)] * 8 * FPS), FPS).repetition == 0
    assert measure(in_grey((picture + noise).clip(0, 255).astype(np.uint8)), FPS).repetition < 0.02


def test_slow_change_is_no_repetition():
    first, last = texture(48, 80, 1).astype(float), texture(48, 80, 2).astype(float)
    video = in_grey([(first + (last - first) * share).astype(np.uint8) for share in np.linspace(0, 1, 8 * FPS)])
    assert measure(video, FPS).repetition < 1e-3


def test_return_to_the_beginning_is_seen_where_it_happens():
    video = np.concatenate([panned(3, 8 * FPS), panned(3, 8 * FPS)[: 2 * FPS]])
    series = measure(video, FPS).repetition_series
    assert np.isnan(series[:2]).all()
    assert series[3:8].max() < 0.2
    assert series[9] == pytest.approx(1)


def test_encoded_loop_is_repetition_and_encoded_stillness_is_not(tmp_path):
    loop, still = panned(3, 18)[np.arange(8 * FPS) % 18], panned(3, 1).repeat(8 * FPS, axis=0)
    found = []
    for video in (loop, still):
        with VideoWriter(tmp_path / "a.mp4", 72, 128, fps=FPS) as writer:
            writer.write(video)
        frames = read_frames(tmp_path / "a.mp4")
        found.append(measure(frames, frames.fps).repetition)
    assert found[0] > 0.9
    assert found[1] < 0.05


def test_one_frame():
    measures = measure(panned(1, 1), FPS)
    undefined = {name for name, value in scalars(measures).items() if np.isnan(value)}
    assert undefined == {"motion", "temporal_flickering", "flicker", "repetition"}
    assert (measures.similarity, measures.colour_drift) == (1, 0)
    assert all(getattr(measures, quantity.name).shape == (1,) for quantity in SERIES)


def test_black_video():
    measures = scalars(measure(np.zeros((4 * FPS, 48, 64, 3), np.uint8), FPS))
    ones = {"temporal_flickering", "similarity"}
    assert measures == pytest.approx({name: float(name in ones) for name in measures}, abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 4), (1, 300), (300, 1), (16, 16)])
def test_tiny_frames(size):
    video = np.random.default_rng(0).integers(0, 256, (4, *size, 3), np.uint8)
    assert not np.isnan([value for name, value in scalars(measure(video, 1.0)).items()]).any()


@pytest.mark.parametrize(("frames", "fps", "seconds"), [(33, 16, 3), (32, 16, 2), (31, 30000 / 1001, 2), (3, 0.5, 5)])
def test_series_have_a_value_a_second(frames, fps, seconds):
    measures = measure(levels(*range(frames)), fps)
    assert all(getattr(measures, quantity.name).shape == (seconds,) for quantity in SERIES)


def test_whole_video_and_single_frames_give_the_same_whatever_the_threads():
    video = panned(2, 4 * FPS)
    whole = measure(video, FPS)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        single = measure((frame for frame in video), FPS)
    finally:
        cv2.setNumThreads(threads)
    for field in dataclasses.fields(Measures):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(single, field.name))


def test_few_frames_are_held_at_a_time():
    alive, most = 0, 0

    def forget():
        nonlocal alive
        alive -= 1

    def frames():
        nonlocal alive, most
        for t in range(40):
            frame = np.full((48, 64, 3), t, np.uint8)
            weakref.finalize(frame, forget)
            alive += 1
            most = max(most, alive)
            yield frame

    measure(frames(), FPS)
    assert most <= 4


def test_tables_name_every_field_once():
    names = [quantity.name for quantity in (*SCALARS, *SERIES)]
    assert names == [field.name for field in dataclasses.fields(Measures)]


def test_mistakes_are_user_errors(monkeypatch):
    with pytest.raises(UserError, match="holds no frame"):
        measure([], FPS)
    with pytest.raises(UserError, match="one size, and these have 16x24 and 8x24"):
        measure([*levels(1), *levels(2, height=8)], FPS)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0"):
            measure(levels(1), fps)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"needs OpenCV; pip install \"rfjax\[study\]\""):
        measure(levels(1), FPS)
