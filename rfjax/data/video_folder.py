"""The dataset of a user's own folder: clips cut from videos, each with the caption of its video."""

import csv
import dataclasses
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import tensorflow_datasets as tfds
from av.video.reformatter import Interpolation
from jaxtyping import UInt8

from rfjax.data.building import FILE_FORMAT, Shard, shards, write_dataset
from rfjax.errors import UserError
from rfjax.io.atomic import replacing
from rfjax.io.checkpoints import check_output
from rfjax.io.paths import kind_of
from rfjax.io.video_reader import read_frames

CAPTION_FILES = ("captions.csv", "captions.jsonl")
VIDEO_KEYS = ("path", "file", "file_name", "video")
CAPTION_KEYS = ("caption", "text", "prompt")
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")
"""Of the files that are listed if they have no caption; those with one may be called anything."""
SKIPPED = "skipped.csv"
SCANNERS = 4
"""Videos looked through at a time."""


@dataclasses.dataclass(kw_only=True)
class VideoFolderConfig(tfds.core.BuilderConfig):
    """Which videos, and how they are cut."""

    name: str = "clips"
    videos: Path
    """Folder that is searched for videos, with the folders in it."""
    captions: Path | None = None
    """CSV or JSON lines; None takes `captions.csv` or `captions.jsonl` of the folder."""
    frames: int = 81
    """Frames a clip."""
    height: int = 480
    """In pixels."""
    width: int = 832
    """In pixels."""
    fps: int = 16
    """Frames a second, to which videos are resampled."""
    test_share: float = 0.0
    """Share of the videos that make up the split "test", so that no video is in both; at least one, unless it is 0."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video that can be used."""

    name: str
    """Path below the folder."""
    caption: str
    clips: int
    """How many it is cut into."""


class VideoFolder(tfds.core.ShardBasedBuilder):
    """Cuts videos that were looked through into clips."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: dict[str, list[Video]], config: VideoFolderConfig, data_dir: Path):
        """Describe the dataset; `splits` has the videos of each split."""
        self._splits, self._config = splits, config
        super().__init__(data_dir=data_dir, config=config, file_format=FILE_FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._config
        video = tfds.features.Tensor(
            shape=(config.frames, config.height, config.width, 3), dtype=np.uint8, encoding="zlib"
        )
        features = tfds.features.FeaturesDict({"video": video, "caption": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Shard]]:
        config = self._config
        clip_bytes = config.frames * config.height * config.width * 3
        return {
            split: shards(partial(_next, self._examples(videos)), sum(video.clips for video in videos), clip_bytes)
            for split, videos in self._splits.items()
        }

    def _examples(self, videos: list[Video]) -> Iterator[dict[str, Any]]:
        for video in videos:
            path, made = self._config.videos / video.name, 0
            for clip in itertools.islice(_clips(path, self._config), video.clips):
                made += 1
                yield {"video": clip, "caption": video.caption}
            if made < video.clips:
                raise UserError(f"{path} has changed while it was read: {made} clips in place of {video.clips}")


def build(folder: Path, config: VideoFolderConfig, report: Callable[[int, int, int], None]) -> str:
    """Cut the videos into a new dataset, which appears only when it is complete.

    Videos that cannot be used are listed in its `skipped.csv` with the reason.

    Args:
        folder: to be created.
        config: what is cut, and how.
        report: takes 0, the videos looked through so far, and all.

    Returns:
        A line about what was used.

    Raises:
        UserError: there are no captions, no video can be used, or the folder cannot be written.
    """
    check_output(folder)
    captions = read_captions(config)
    used, skipped = _look_through(captions, config, report)
    if not used:
        first = next(iter(sorted(skipped.items())), None)
        reason = f"; the first, {first[0]}: {first[1]}" if first else ""
        raise UserError(f"none of the {len(skipped)} videos of {config.videos} can be used{reason}")
    splits = _divide(used, config.test_share)
    write_dataset(folder, lambda data_dir: VideoFolder(splits, config, data_dir))
    with replacing(folder / SKIPPED) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("video", "reason"), *sorted(skipped.items())])
    clips = ", ".join(f"{sum(video.clips for video in videos)} clips in {split}" for split, videos in splits.items())
    return f"{clips}, of {len(used)} videos; {len(skipped)} skipped, see {SKIPPED}"


def read_captions(config: VideoFolderConfig) -> dict[str, str]:
    """Return the captions by the videos' paths below the folder, as the file has them; "" where one is missing.

    Raises:
        UserError: the folder or its captions are missing, or the file has lines that cannot be understood.
    """
    if kind_of(config.videos, "the videos") != "folder":
        raise UserError(f"the videos {config.videos} are not a folder that exists")
    path = config.captions or _captions_in(config.videos)
    captions: dict[str, str] = {}
    for number, row in _rows(path):
        video, caption = _value(row, VIDEO_KEYS, path, number), _value(row, CAPTION_KEYS, path, number)
        name = Path(video).as_posix()
        if not video or name in captions:
            raise UserError(f"line {number} of {path} {'names no video' if not video else f'is the second of {name}'}")
        captions[name] = " ".join(caption.split())
    if not captions:
        raise UserError(f"the captions {path} name no video; a line a video is needed")
    return captions


def _captions_in(folder: Path) -> Path:
    found = [folder / name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{folder} has {' and '.join(CAPTION_FILES) if found else 'no captions'}; put {' or '.join(CAPTION_FILES)} "
            "there, with each video's file and caption, or name such a file with --captions"
        )
    return found[0]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file of captions with the numbers of their lines."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"the captions {path} end in {path.suffix!r}; .csv or .jsonl is needed")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the captions {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the captions {path} are not UTF-8 (byte {error.start}); save them as UTF-8") from None
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        try:
            for row in reader:
                if None in row:
                    raise UserError(
                        f"line {reader.line_num} of {path} has more columns than the first; quote captions with commas"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"line {reader.line_num} of {path} is not CSV: {error}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(
                    f'line {number} of {path} is not a JSON object, such as {{"file": ..., "caption": ...}}'
                )
            yield number, row


def _value(row: dict[str, Any], keys: tuple[str, ...], path: Path, number: int) -> str:
    found = next((key for key in keys if key in row), None)
    if found is None:
        known = ", ".join(row)
        line = 1 if path.suffix.lower() == ".csv" else number  # the names are those of the header
        raise UserError(f"line {line} of {path} has {known or 'nothing'}; one of {', '.join(keys)} is needed")
    value = row[found]
    if value is None:  # a CSV row that ends early
        return ""
    if not isinstance(value, str):
        raise UserError(f"line {number} of {path} has {found} {value!r}; a text is needed")
    return value.strip()


def _look_through(
    captions: dict[str, str], config: VideoFolderConfig, report: Callable[[int, int, int], None]
) -> tuple[list[Video], dict[str, str]]:
    """Read every video once; return those that can be used, and why the others cannot."""
    present = (path for path in config.videos.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = {path.relative_to(config.videos).as_posix() for path in present}
    skipped = dict.fromkeys(names - captions.keys(), "no caption")
    skipped |= dict.fromkeys([name for name, caption in captions.items() if not caption], "no caption")
    used = []
    wanted = sorted(captions.keys() - skipped.keys())
    with ThreadPoolExecutor(SCANNERS) as pool:
        for done, (name, found) in enumerate(zip(wanted, pool.map(partial(_scan, config), wanted), strict=True), 1):
            if isinstance(found, int):
                used.append(Video(name, captions[name], found))
            else:
                skipped[name] = found
            report(0, done, len(wanted))
    return used, skipped


def _scan(config: VideoFolderConfig, name: str) -> int | str:
    """Return how many clips a video gives, or why it gives none."""
    path = config.videos / name
    if not path.is_file():
        return "no such file"
    try:
        video = read_frames(path)
        count = sum(1 for _ in video)
    except UserError as error:
        return str(error)
    length = resampled_length(count, video.fps, config.fps)
    if length < config.frames:
        return f"{length} frames at {config.fps} a second, fewer than {config.frames}"
    return length // config.frames


def _divide(used: list[Video], test_share: float) -> dict[str, list[Video]]:
    """Divide videos among the splits, by hashes of their names."""
    tests = math.ceil(test_share * len(used))
    if tests >= len(used):
        raise UserError(
            f"the test share {test_share:g} of {len(used)} videos that can be used leaves none to train on; give less"
        )
    if not tests:
        return {"train": used}
    chosen = {v.name for v in sorted(used, key=lambda v: (zlib.crc32(v.name.encode()), v.name))[:tests]}
    return {split: [v for v in used if (v.name in chosen) == (split == "test")] for split in ("train", "test")}


def _next(examples: Iterator[dict[str, Any]], index: int) -> dict[str, Any]:
    """Return the next example; they are asked for in order."""
    return next(examples)


def _clips(path: Path, config: VideoFolderConfig) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
    """Yield consecutive clips; what is left at the end is dropped."""
    video = read_frames(path)
    clip = []
    for frame in resampled(video, video.fps, config.fps):
        clip.append(fit(frame, config.height, config.width))
        if len(clip) == config.frames:
            yield np.stack(clip)
            clip = []


def resampled_length(count: int, fps: float, wanted: int) -> int:
    """Return how many frames `resampled` makes of `count`."""
    return math.ceil(count * wanted / fps - 1e-6)


def resampled(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float, wanted: int
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yield what is shown at the times 0, 1 / wanted, 2 / wanted, ..., of frames shown from index / fps on."""
    made = 0
    for index, frame in enumerate(frames):
        while made < resampled_length(index + 1, fps, wanted):
            yield frame
            made += 1


def fit(frame: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Cut the middle out of a frame, as large as its sides allow, and resize it (bicubic, antialiased)."""
    rows, columns = frame.shape[:2]
    if rows * width > columns * height:
        rows = max(1, round(columns * height / width))
    else:
        columns = max(1, round(rows * width / height))
    top, left = (frame.shape[0] - rows) // 2, (frame.shape[1] - columns) // 2
    middle = np.ascontiguousarray(frame[top : top + rows, left : left + columns])
    picture = av.VideoFrame.from_ndarray(middle, format="rgb24")
    return picture.reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
