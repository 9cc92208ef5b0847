"""What is measured: `configs/benchmark/NAME.yaml`, and memory policies written as `NAME:KEY=VALUE,...`."""

import dataclasses
from collections.abc import Sequence

from rfjax.config import ModelConfig, _Config, load_model_config, preset_path, read_mapping
from rfjax.errors import UserError
from rfjax.memory import MemoryPolicy, parse_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(_Config):
    """A benchmark's sizes and what it compares; the defaults are the published network at its own size."""

    description: str = ""
    model: str = "wan_1_3b"
    """Name of a file in `configs/models`."""
    num_layers: int | None = None
    """Layers of the transformer, where fewer than the model's are measured."""
    height: int = 480
    """Pixels."""
    width: int = 832
    latent_frames: int = 120
    """Length of the video of which end-to-end speed is told."""
    repeats: int = 10
    """Measurements of each part, where the user names no number."""
    decode_repeats: int = 10
    """The same for the autoencoder, which on a CPU takes longer than all the rest; at most `repeats` count."""
    policies: tuple[str, ...] = ("relax_forcing", "self_forcing:window_frames=21")
    """As `rfjax.memory.parse_text` reads them."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A preset with its model's sizes."""

    preset: Preset
    config: ModelConfig
    frame_size: tuple[int, int]
    """Latent rows and columns."""

    @property
    def chunks(self) -> int:
        """Chunks of the video."""
        return self.preset.latent_frames // self.config.chunk_frames


def load_subject(name: str) -> Subject:
    """Read a preset and the model that it names.

    Raises:
        UserError: there is no such preset, or its sizes do not fit together.
    """
    path = preset_path("benchmark", name)
    preset = Preset.from_dict(read_mapping(path), where=path.name)
    config = load_model_config(preset_path("models", preset.model))
    if config.vae is None or config.umt5 is None:
        raise UserError(f"{path.name}: model {preset.model!r} lacks its vae or umt5; all parts are needed")
    patch, factor = config.transformer.patch_size, config.vae.spatial_factor
    if preset.num_layers is not None:
        fewer = dataclasses.replace(config.transformer, num_layers=preset.num_layers)
        config = dataclasses.replace(config, transformer=fewer)
    for key, multiple in (
        ("height", factor * patch[1]),
        ("width", factor * patch[2]),
        ("latent_frames", config.chunk_frames),
    ):
        value = getattr(preset, key)
        if value < multiple or value % multiple:
            raise UserError(f"{path.name}: {key} is {value}; a multiple of {multiple} is needed")
    return Subject(preset, config, (preset.height // factor, preset.width // factor))


def policies_of(texts: Sequence[str]) -> dict[str, MemoryPolicy]:
    """Make the policies, in order, each under the text that asks for it.

    Raises:
        UserError: a policy named twice, an unknown policy or setting, or a wrong value.
    """
    policies: dict[str, MemoryPolicy] = {}
    for text in texts:
        if text in policies:
            raise UserError(f"policy {text!r} is given twice; each is measured once")
        policies[text] = parse_text(text)
    return policies
