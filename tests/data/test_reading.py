"""Reading: batches that share out, shuffle, go on across epochs and resume exactly; datasets that cannot be used."""

import itertools
import json
import shutil
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax.data.building import FILE_FORMAT, shards, write_dataset
from rfjax.data.reading import Crop, batches, check_window, open_dataset, tokenise, window
from rfjax.errors import UserError
from rfjax.models.tokenizer import Tokenizer

LENGTHS = (4, 6, 3, 5)
# Few, and of examples that are many: what shuffles takes milliseconds an example where there are ten.
quickly = settings(max_examples=6, deadline=None)


class Toy(tfds.core.ShardBasedBuilder):
    """Latents of several lengths."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, keep: tuple[str, ...], **kwargs: Any):
        self.keep = keep
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "latents": tfds.features.Tensor(shape=(None, 2, 3, 4), dtype=np.float16, encoding="zlib"),
            "caption": tfds.features.Text(),
            "frames": tfds.features.Scalar(dtype=np.int32),
            "trajectory": tfds.features.Tensor(shape=(3, 4, 1, 1, 1), dtype=np.float16),
        }
        kept = {name: features[name] for name in self.keep}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kept))

    def _shard_iterators_per_split(self, dl_manager: Any):
        return {"train": shards(self._example, len(LENGTHS), 10**6), "validation": shards(self._example, 1, 1)}

    def _example(self, index: int) -> dict[str, Any]:
        example = {
            "latents": np.full((LENGTHS[index], 2, 3, 4), index + 0.5, np.float16),
            "caption": f"número {index}",
            "frames": LENGTHS[index],
            "trajectory": np.arange(12, dtype=np.float16).reshape(3, 4, 1, 1, 1),
        }
        return {name: example[name] for name in self.keep}


def opened(folder: Path) -> Any:
    return open_dataset(folder, "train")


def make(folder: Path, *keep: str) -> Path:
    write_dataset(folder, lambda data_dir: Toy(keep=keep, data_dir=data_dir, file_format=FILE_FORMAT))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "toy", "latents", "caption", "frames", "trajectory")


def numbers(count: int) -> list[dict[str, Any]]:
    return [{"number": np.int32(index)} for index in range(count)]


def first(source: Any, steps: int, **kwargs: Any) -> list[list[int]]:
    reader = batches(source, **{"batch_size": 4, "seed": 0, **kwargs})
    return [batch["number"].tolist() for batch in itertools.islice(reader, steps)]


@quickly
@given(count=st.integers(20, 50), batch_size=st.integers(1, 16), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_has_every_example_once_and_batches_go_on_across_epochs(count, batch_size, seed):
    epochs = 2
    steps = -(-epochs * count // batch_size)
    read = list(itertools.chain(*first(numbers(count), steps, batch_size=batch_size, seed=seed)))
    assert len(read) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(read[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    read = list(itertools.chain(*first(numbers(100), 50)))
    other = list(itertools.chain(*first(numbers(100), 50, seed=1)))
    assert list(range(100)) not in (read[:100], read[100:])
    assert read[:100] != read[100:]
    assert read != other


def test_a_dataset_smaller_than_a_batch_fills_it():
    for batch in first(numbers(3), 2, batch_size=9):
        assert sorted(batch) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@quickly
@given(
    count=st.integers(20, 50), batch_size=st.integers(1, 20), done=st.integers(0, 12), seed=st.integers(0, 2**32 - 1)
)
def test_a_reader_goes_on_exactly_where_another_stopped(count, batch_size, done, seed):
    whole = first(numbers(count), done + 4, batch_size=batch_size, seed=seed)
    before = batches(numbers(count), batch_size=batch_size, seed=seed)
    for _ in range(done):
        next(before)
    state = json.loads(json.dumps(before.get_state()))
    after = batches(numbers(count), batch_size=batch_size, seed=seed)
    after.set_state(state)
    assert [next(after)["number"].tolist() for _ in range(4)] == whole[done:]


def test_a_reader_that_has_read_ahead_can_be_set_back():
    reader = batches(numbers(10), batch_size=3, seed=0)
    state = reader.get_state()
    once = [next(reader)["number"].tolist() for _ in range(5)]
    reader.set_state(state)
    assert [next(reader)["number"].tolist() for _ in range(5)] == once


@quickly
@given(count=st.integers(20, 50), processes=st.sampled_from([2, 3, 4]), each=st.integers(1, 3))
def test_the_shares_of_processes_are_together_the_batches_of_one(count, processes, each):
    size = processes * each
    whole = first(numbers(count), 6, batch_size=size)
    shares = [
        first(numbers(count), 6, batch_size=size, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for step, batch in enumerate(whole):
        assert [share[step] for share in shares] == [batch[index::processes] for index in range(processes)]


def test_two_processes_share_an_epoch_without_overlap():
    shares = [
        set(itertools.chain(*first(numbers(12), 3, batch_size=4, process_index=index, process_count=2)))
        for index in range(2)
    ]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(range(12))


@pytest.mark.parametrize("size", [0, 3])
def test_a_batch_that_does_not_divide_among_processes_is_refused(size):
    with pytest.raises(UserError, match=f"batch_size is {size}; it must be a multiple of the 2 processes"):
        batches(numbers(4), batch_size=size, seed=0, process_count=2)


def test_examples_are_text_and_float32(folder):
    source = opened(folder)
    assert len(source) == 4
    example = source[1]
    assert example["caption"] == "número 1"
    assert example["latents"].dtype == np.float32
    np.testing.assert_array_equal(example["latents"], np.full((6, 2, 3, 4), 1.5))


def test_order_is_kept_across_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rfjax.data.building.SHARD_BYTES", 2 * 10**6)
    several = make(tmp_path / "several", "caption")
    assert len(list(several.glob("*-train.*"))) == 2
    captions = [[opened(path)[index]["caption"] for index in range(4)] for path in (folder, several)]
    assert captions[0] == captions[1]


def test_windows_are_cut_from_the_start_along_time(folder):
    source = opened(folder)
    check_window(source, "latents", 3)
    reader = batches(source, batch_size=4, seed=0, transforms=(window("latents", 3), partial(only, "latents")))
    batch = next(reader)
    assert batch["latents"].shape == (4, 3, 2, 3, 4)
    assert set(batch["latents"].ravel().tolist()) == {0.5, 1.5, 2.5, 3.5}
    short = window("trajectory", 2)(source[0])["trajectory"]
    np.testing.assert_array_equal(short.reshape(3, 2), [[0, 1], [4, 5], [8, 9]])
    assert source[0]["latents"].shape[0] == 4


def only(name: str, example: dict[str, Any]) -> dict[str, Any]:
    return {name: example[name]}


def test_clips_shorter_than_the_window_are_named(folder, tmp_path):
    source = opened(folder)
    with pytest.raises(
        UserError, match=r"example 2 of .*toy has 3 frames of latents, fewer than the window of 4; ask for a shorter"
    ):
        check_window(source, "latents", 4)
    with pytest.raises(UserError, match=r"example 0 of .* has 4 frames of trajectory, fewer than the window of 5"):
        check_window(source, "trajectory", 5)
    bare = opened(make(tmp_path / "bare", "latents", "caption"))
    with pytest.raises(UserError, match=r"example 2 of .*bare has 3 frames"):
        check_window(bare, "latents", 4)
    assert bare.lengths("latents") == source.lengths("latents") == list(LENGTHS)


def shipped_tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(str(resources.files("rfjax") / "assets" / "moving_shapes" / "tokenizer")), 16)


def test_pieces_of_pictures_are_elsewhere_every_time_and_the_same_for_any_number_of_processes():
    clip = np.arange(2 * 16 * 24 * 3, dtype=np.int32).reshape(2, 16, 24, 3)
    clips = [{"video": clip}] * 4

    def read(**share: int) -> np.ndarray:
        reader = batches(clips, batch_size=4, seed=0, transforms=(Crop(8, 16),), **share)
        return np.stack([next(reader)["video"] for _ in range(3)])

    pieces = read()
    assert pieces.shape == (3, 4, 2, 8, 16, 3)
    corners = [tuple(np.argwhere(clip == piece[0, 0, 0, 0])[0][1:3]) for piece in pieces.reshape(12, 2, 8, 16, 3)]
    for (top, left), piece in zip(corners, pieces.reshape(12, 2, 8, 16, 3), strict=True):
        np.testing.assert_array_equal(piece, clip[:, top : top + 8, left : left + 16])
    assert len(set(corners)) > 6
    shares = [read(process_index=index, process_count=2) for index in range(2)]
    np.testing.assert_array_equal(np.stack(shares, axis=2).reshape(pieces.shape), pieces)


def test_captions_are_tokenised(folder):
    tokenizer = shipped_tokenizer()
    example = {"caption": "a red fox"}
    done = tokenise(tokenizer)(example)
    ids, mask = tokenizer(["a red fox"])
    np.testing.assert_array_equal(done["ids"], ids[0])
    np.testing.assert_array_equal(done["mask"], mask[0])
    assert example == {"caption": "a red fox"}


def test_prompt_embeds_need_no_tokenizer():
    example = {"caption": "a red fox", "prompt_embeds": np.zeros((2, 3), np.float32)}
    assert tokenise(shipped_tokenizer())(example) is example
    assert tokenise(None)(example) is example


def test_a_user_s_mistake_comes_out_of_the_reader_as_it_is():
    reader = batches([{"caption": "a fox"}], batch_size=1, seed=0, transforms=(tokenise(None),))
    with pytest.raises(UserError, match="the dataset has no prompt_embeds, and the checkpoint no tokenizer"):
        next(reader)


def test_prompts_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red fox\r\n\n  a   blue bird \n", encoding="utf-8")
    source = open_dataset(path, "train")
    assert [source[index] for index in range(len(source))] == [{"caption": "a red fox"}, {"caption": "a blue bird"}]
    reader = batches(source, batch_size=2, seed=0, transforms=(tokenise(shipped_tokenizer()), partial(only, "ids")))
    assert next(reader)["ids"].shape == (2, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n\n", "holds no prompt; write one a line"), (b"ok\n\xff", r"is not UTF-8 \(byte 3\); save it as UTF-8")],
)
def test_prompt_files_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_dataset(path, "train")


def test_folders_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(UserError, match=r"the dataset .*none does not exist; `rfjax data --help` tells how"):
        open_dataset(tmp_path / "none", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not a dataset: it has no dataset_info\.json"):
        open_dataset(tmp_path / "empty", "train")
    with pytest.raises(UserError, match=r"no split 'trian', only train, validation; did you mean 'train'\?"):
        open_dataset(folder, "trian")
    silent = make(tmp_path / "silent", "latents", "frames")
    with pytest.raises(UserError, match=r"the examples of .*silent have frames, latents, but no caption"):
        open_dataset(silent, "train")


@pytest.mark.parametrize("damage", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_one_line(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / damage).write_text("{")
    with pytest.raises(UserError, match=r"bad is not a readable dataset: [^\n]+\Z"):
        open_dataset(tmp_path / "bad", "train")


@pytest.mark.parametrize("content", [None, b"", b"x" * 100_000])
def test_damaged_records_are_one_line(folder, tmp_path, content):
    shutil.copytree(folder, tmp_path / "bad")
    (records,) = (tmp_path / "bad").glob("*-train.*")
    records.unlink()
    if content is not None:
        records.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read split 'train' of the dataset .*bad: [^\n]+\Z"):
        open_dataset(tmp_path / "bad", "train")
