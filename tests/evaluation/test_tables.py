"""The tables of a study, and the measures kept beside its videos."""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from study_fakes import make_video, measures_of, record_of, results_of, variants_of

from rfjax.errors import UserError
from rfjax.evaluation import results as module
from rfjax.evaluation.measures import SCALARS, SERIES, measure
from rfjax.evaluation.results import MEASURES, Result, measure_videos
from rfjax.evaluation.tables import (
    check_format,
    paired_scalars,
    results_table,
    scalars,
    series_table,
    spread,
    write_table,
)
from rfjax.io.video_reader import read_frames

VARIANTS = variants_of(
    {"policy": "relax_forcing", "settings": {"redundancy_weight": [0.5, 1]}},
    {"policy": "self_forcing", "settings": {"window_frames": 9}},
)


def test_results_have_a_row_a_video_and_every_setting():
    table = results_table(results_of(VARIANTS))
    assert {len(column) for column in table.values()} == {6}
    assert table["variant"][::2] == [variant.name for variant in VARIANTS]
    assert table["policy"][3:5] == ["relax_forcing", "self_forcing"]
    assert table["policy.redundancy_weight"] == [0.5, 0.5, 1.0, 1.0, None, None]
    assert table["policy.window_frames"] == [None] * 4 + [9, 9]
    assert table["prompt"] == ["a cat", "a dog"] * 3
    assert table["motion"] == [0, 0.25, 1, 1.25, 2, 2.25]
    assert table["seconds_per_chunk"] == [1.0] * 6  # the median of all but the first, for two videos together
    assert {quantity.name for quantity in SCALARS} <= table.keys()
    assert results_table([]) == {"variant": [], "policy": []}


def test_a_setting_may_have_the_name_of_a_column():
    (variant,) = variants_of({"policy": "attention_sink"})
    record = record_of(variant, "a cat", 3)
    record["settings"]["policy"] |= {"sample": 8, "variant": "x"}
    table = results_table([Result(variant, Path("f"), record, measures_of(1))])
    assert (table["sample"], table["policy.sample"]) == ([3], [8])
    assert (table["variant"], table["policy.variant"]) == (["attention_sink"], ["x"])


def test_series_have_a_row_a_second():
    table = series_table(results_of(VARIANTS[:1]))
    assert {len(column) for column in table.values()} == {8}
    assert table["second"] == [0, 1, 2, 3] * 2
    assert table["motion"] == [0, 1, 2, 3, 0.25, 1.25, 2.25, 3.25]
    assert table["repetition"] == [None, None, 0, 0, None, None, 0.25, 0.25]
    assert list(table)[5:] == [quantity.name.removesuffix("_series") for quantity in SERIES]


def test_csv_holds_awkward_prompts_and_empty_cells(tmp_path):
    columns = {"prompt": ['a "cat", a dog', "two\nlines", "café"], "weight": [0.1, None, 2]}
    write_table(tmp_path / "results", columns, "csv")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["prompt", "weight"], ['a "cat", a dog', "0.1"], ["two\nlines", ""], ["café", "2"]]


def test_parquet_has_types_and_replaces_csv(tmp_path):
    columns = {
        "number": [1, 0.5, None],
        "whole": [1, None, 3],
        "word": ["x", None, "y"],
        "mixed": ["hybrid", 3, None],
        "nothing": [None, None, None],
    }
    write_table(tmp_path / "results", columns, "csv")
    write_table(tmp_path / "results", columns, "parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet")
    assert table.to_pydict() == {**columns, "mixed": ["hybrid", "3", None]}
    assert [str(kind) for kind in table.schema.types] == ["double", "int64", "string", "string", "double"]


def test_parquet_without_pyarrow_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'needs pyarrow; pip install "rfjax\[study\]"$'):
        check_format("parquet")
    check_format("csv")


def test_spread_leaves_out_what_is_unknown():
    assert dataclasses.astuple(spread([1.0, math.nan, 3.0])) == (2.0, pytest.approx(math.sqrt(2)))
    one = spread([4.0, math.nan])
    assert one.mean == 4
    assert math.isnan(one.deviation)
    assert math.isnan(spread([math.nan]).mean)
    assert scalars(results_of(VARIANTS), "flicker")["self_forcing,window_frames=9"] == [2.0, 2.25]


def test_pairing_takes_away_what_all_variants_share():
    results = results_of(VARIANTS)
    paired = paired_scalars(results, "motion")
    assert [paired[variant.name] for variant in VARIANTS] == [[0.125] * 2, [1.125] * 2, [2.125] * 2]
    for name, values in scalars(results, "motion").items():
        assert spread(paired[name]).mean == spread(values).mean
    incomplete = paired_scalars(results[:-1], "motion")  # without the dog of the last variant
    assert incomplete["self_forcing,window_frames=9"] == [pytest.approx(2 - 1 + (1 + 0.75) / 2)]


def test_measures_are_kept_until_the_video_is_made_again(tmp_path, monkeypatch):
    make_video(tmp_path)
    (variant,) = variants_of({"policy": "attention_sink"})
    records = {"video.mp4": record_of(variant, "a cat", 0)}
    first = measure_videos(tmp_path, records, ["video.mp4"])["video.mp4"]
    expected = measure(read_frames(tmp_path / "video.mp4"), 8)
    for quantity in (*SCALARS, *SERIES):
        np.testing.assert_array_equal(getattr(first, quantity.name), getattr(expected, quantity.name))
    assert np.isnan(first.repetition_series[:2]).all()

    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    again = measure_videos(tmp_path, records, ["video.mp4"])["video.mp4"]
    for quantity in (*SCALARS, *SERIES):
        np.testing.assert_array_equal(getattr(again, quantity.name), getattr(first, quantity.name))

    calls = []
    monkeypatch.setattr(module, "measure", lambda *_: calls.append(1) or measures_of(5.0))
    remade = {"video.mp4": record_of(variant, "a cat", 0, timings={"chunk_seconds": [1.0], "batch_size": 1})}
    assert measure_videos(tmp_path, remade, ["video.mp4"])["video.mp4"].motion == 5
    (tmp_path / MEASURES).write_text("{damaged")
    assert measure_videos(tmp_path, remade, ["video.mp4"], lambda: calls.append(2))["video.mp4"].motion == 5
    assert calls == [1, 2, 1]
    assert json.loads((tmp_path / MEASURES).read_text())["video.mp4"]["motion"] == [5.0]


def test_a_video_of_one_chunk_has_no_speed():
    (variant,) = variants_of({"policy": "attention_sink"})
    record = record_of(variant, "a cat", 0, timings={"chunk_seconds": [9.0], "batch_size": 1})
    assert results_table([Result(variant, Path(), record, measures_of(1))])["seconds_per_chunk"] == [None]
