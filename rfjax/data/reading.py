"""Examples from disk, by number, and batches of them: shuffled, shared among processes, resumable to the example."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from grain.sources import RandomAccessDataSource

from rfjax.errors import UserError, nearest
from rfjax.io.paths import kind_of
from rfjax.io.prompts import read_prompt_file
from rfjax.models.tokenizer import Tokenizer, clean_prompt

Example = dict[str, Any]
"""Values by name: `caption` is a str, all others but a `scene` are arrays."""
Transform = Callable[[Example], Example] | grain.transforms.RandomMap
"""From an example to another; must not change its argument."""

DESCRIPTION = "dataset_info.json"
READING_THREADS = 4
READING_AHEAD = 4
"""In batches."""
TIME_AXIS = {"video": 0, "latents": 0, "trajectory": 1}
LENGTH = "frames"
"""Feature in which a dataset with clips of several lengths keeps each one's, so that comparing them decodes no clip."""


Source = Sequence[Example] | RandomAccessDataSource[Example]
"""Examples by number."""


class Dataset:
    """A split of a dataset that `tensorflow-datasets` built; 16-bit floats are read as float32."""

    def __init__(self, path: Path, builder: Any, split: str):
        self.path = path
        self._builder = builder
        self._split = split
        self._examples = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return {name: _readable(value) for name, value in self._examples[index].items()}

    def lengths(self, field: str) -> list[int]:
        """Return how many frames (pictures or latents) a field has in each example."""
        axis = TIME_AXIS[field]
        features = self._builder.info.features
        fixed = features[field].shape[axis]
        if fixed is not None:
            return [fixed] * len(self)
        if LENGTH in features:
            skip = {name: tfds.decode.SkipDecoding() for name in features if name != LENGTH}
            return [int(example[LENGTH]) for example in self._builder.as_data_source(self._split, decoders=skip)]
        return [example[field].shape[axis] for example in self._examples]


class Prompts:
    """The prompts of a text file, as examples with a caption alone."""

    def __init__(self, path: Path):
        self.path = path
        self._prompts = [clean_prompt(prompt) for prompt in read_prompt_file(path)]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Example:
        return {"caption": self._prompts[index]}


def open_dataset(path: str | Path, split: str) -> Dataset | Prompts:
    """Open a dataset's folder, or a text file with a prompt a line, which has no splits.

    Raises:
        UserError: nothing is there, it is not a dataset, it lacks captions or the split, or it cannot be read.
    """
    path = Path(path)
    kind = kind_of(path, "the dataset")
    if kind == "missing":
        raise UserError(f"the dataset {path} does not exist; `rfjax data --help` tells how to build one")
    if kind == "file":
        return Prompts(path)
    if kind_of(path / DESCRIPTION, "the dataset") != "file":
        raise UserError(f"{path} is not a dataset: it has no {DESCRIPTION}; `rfjax data --help` tells how to build one")
    try:
        builder: Any = tfds.builder_from_directory(path)
    except Exception as error:  # a damaged file raises whatever its parser does
        raise UserError(f"{path} is not a readable dataset: {_one_line(error)}") from None
    if split not in builder.info.splits:
        known = sorted(builder.info.splits)
        raise UserError(f"the dataset {path} has no split {split!r}, only {', '.join(known)}{nearest(split, known)}")
    if "caption" not in builder.info.features:
        known = sorted(builder.info.features)
        raise UserError(f"the examples of {path} have {', '.join(known)}, but no caption; training needs one of each")
    try:
        dataset = Dataset(path, builder, split)
        dataset[0]
    except Exception as error:
        raise UserError(f"cannot read split {split!r} of the dataset {path}: {_one_line(error)}") from None
    return dataset


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _readable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def check_window(source: Dataset, field: str, frames: int) -> None:
    """Make sure that all clips are as long as a window, or longer.

    Raises:
        UserError: one is not.
    """
    for index, length in enumerate(source.lengths(field)):
        if length < frames:
            raise UserError(
                f"example {index} of {source.path} has {length} frames of {field}, fewer than the window of {frames}; "
                "ask for a shorter window, or build the dataset from longer clips"
            )


def window(field: str, frames: int) -> Callable[[Example], Example]:
    """Keep the first `frames` frames of a field; see `check_window`."""
    cut = (slice(None),) * TIME_AXIS[field] + (slice(frames),)
    return lambda example: {**example, field: example[field][cut]}


class Crop(grain.transforms.RandomMap):
    """Keep a piece of the clip's pictures, in all of them the same and elsewhere every time the clip is read."""

    def __init__(self, height: int, width: int):
        self.size = height, width

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride] - the base class has no types
        self, element: Example, rng: np.random.Generator
    ) -> Example:
        """Draw the piece of `video`; see `check_crop`."""
        video = element["video"]
        top, left = (int(rng.integers(have - keep + 1)) for have, keep in zip(video.shape[1:3], self.size, strict=True))
        height, width = self.size
        return {**element, "video": video[:, top : top + height, left : left + width]}


def check_crop(source: Dataset, size: tuple[int, int]) -> None:
    """Make sure that pictures are as large as a piece of them, or larger.

    Raises:
        UserError: the first clip's are not.
    """
    _, height, width, _ = source[0]["video"].shape
    if size[0] > height or size[1] > width:
        raise UserError(
            f"data.crop is {size[0]}x{size[1]}, but the clips of {source.path} are {height}x{width}; "
            "ask for a smaller piece, or leave crop out"
        )


def tokenise(tokenizer: Tokenizer | None) -> Callable[[Example], Example]:
    """Add the caption's `ids` and `mask`, int32 `[L]`, unless the example has `prompt_embeds` already.

    Raises (when applied):
        UserError: there is no tokenizer, or the caption has no word.
    """

    def apply(example: Example) -> Example:
        if "prompt_embeds" in example:
            return example
        if tokenizer is None:
            raise UserError("the dataset has no prompt_embeds, and the checkpoint no tokenizer; one of them is needed")
        (ids,), (mask,) = tokenizer([example["caption"]])
        return {**example, "ids": ids, "mask": mask}

    return apply


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transforms: Sequence[Transform] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Example]:
    """Read a process's share of batches without end, every epoch in another order, batches going on across epochs.

    Args:
        source: of examples.
        batch_size: of all processes together.
        seed: of the order, 0 to 2**32 - 1.
        transforms: applied to each example in turn; what they leave must be arrays of one shape.
        process_index: which share.
        process_count: how many shares there are. Together they are the batches that a single process reads.

    Returns:
        Iterator over dicts of arrays whose first axis counts examples; `get_state()` and `set_state(state)` resume it
        to the exact example.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size is {batch_size}; it must be a multiple of the {process_count} processes")
    dataset = grain.MapDataset.source(source).shuffle(seed).repeat()
    for transform in transforms:
        random = isinstance(transform, grain.transforms.RandomMap)
        dataset = dataset.random_map(transform, seed=seed) if random else dataset.map(transform)
    dataset = dataset[process_index::process_count]
    threads = grain.ReadOptions(num_threads=READING_THREADS, prefetch_buffer_size=READING_AHEAD)
    return iter(dataset.batch(batch_size // process_count, drop_remainder=True).to_iter_dataset(threads))
