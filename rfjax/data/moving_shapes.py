"""The dataset `moving_shapes`: clips of drawn scenes with captions and their exact parameters."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rfjax.data.building import FILE_FORMAT, Shard, shards, write_dataset
from rfjax.data.shapes import caption, random_scene, render
from rfjax.errors import UserError

SPLITS = ("train", "test")


@dataclasses.dataclass(kw_only=True)
class MovingShapesConfig(tfds.core.BuilderConfig):
    """How many clips, and of which size."""

    name: str = "drawn"
    train: int
    """Clips of the split "train"."""
    test: int
    """Clips of the split "test", of things that "train" does not show together."""
    frames: int = 81
    """Frames a clip, at 16 a second."""
    height: int = 64
    """In pixels."""
    width: int = 96
    """In pixels."""
    seed: int = 0
    """Another seed draws other clips; their number does not change those that come first."""


class MovingShapes(tfds.core.ShardBasedBuilder):
    """Draws the clips; built with a `MovingShapesConfig`."""

    VERSION = tfds.core.Version("1.0.0")

    @property
    def _config(self) -> MovingShapesConfig:
        assert isinstance(self.builder_config, MovingShapesConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._config
        features = tfds.features.FeaturesDict(
            {
                "video": tfds.features.Tensor(
                    shape=(config.frames, config.height, config.width, 3), dtype=np.uint8, encoding="zlib"
                ),
                "caption": tfds.features.Text(),
                "scene": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Shard]]:
        config = self._config
        clip_bytes = config.frames * config.height * config.width * 3
        return {split: shards(partial(self._clip, split), getattr(config, split), clip_bytes) for split in SPLITS}

    def _clip(self, split: str, index: int) -> dict[str, Any]:
        config = self._config
        scene = random_scene(np.random.default_rng([config.seed, SPLITS.index(split), index]), split)
        video = render(scene, config.frames, config.height, config.width)
        return {"video": video, "caption": caption(scene), "scene": scene.to_json()}


def build(folder: Path, config: MovingShapesConfig) -> None:
    """Draw the dataset into a new folder, which appears only when it is complete.

    Raises:
        UserError: a size that cannot be, or a folder that cannot be written.
    """
    smallest = {"train": 1, "test": 1, "frames": 1, "height": 16, "width": 16, "seed": 0}
    for name, least in smallest.items():
        if getattr(config, name) < least:
            raise UserError(f"{name} of moving shapes is {getattr(config, name)}; it must be {least} or more")
    if config.width < config.height:
        raise UserError(f"width of moving shapes is {config.width}; it must be the height, {config.height}, or more")
    write_dataset(folder, lambda data_dir: MovingShapes(data_dir=data_dir, config=config, file_format=FILE_FORMAT))
