"""Sizes of the networks and of a rollout, as frozen dataclasses, and their strict loading from YAML or JSON.

The file layout is that of `tests/golden/config.json`: one mapping per network beside the rollout's own numbers.
"""

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rfjax.errors import UserError, nearest

WAN_LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


Config = TypeVar("Config", bound="_Config")


class _Config:
    """Strict conversion from and to plain mappings, shared by the dataclasses below."""

    # Upstream's keys for what rfjax has in one form only: accepted when they ask for that form.
    _fixed: typing.ClassVar[Mapping[str, Any]] = {}
    _aliases: typing.ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "config") -> Config:
        """Build from a mapping.

        Raises:
            UserError: an unknown key (with the nearest known one), a value of the wrong type, or a form of the
                network that rfjax does not have.
        """
        hints = typing.get_type_hints(cls)
        fields = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        arguments = {}
        for key, value in values.items():
            name = cls._aliases.get(key, key)
            if key in cls._fixed:
                if _plain(value) != cls._fixed[key]:
                    raise UserError(f"{where}.{key} is {value!r}; rfjax has this network with {cls._fixed[key]!r} only")
            elif name not in fields:
                raise UserError(f"{where}.{key} is not a known setting{nearest(str(key), fields)}")
            else:
                arguments[name] = _read(hints[name], value, f"{where}.{key}")
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` reads back and JSON can hold; absent networks are left out."""
        return {
            field.name: _plain(value)
            for field in dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
            if (value := getattr(self, field.name)) is not None
        }


def _plain(value: Any) -> Any:
    if isinstance(value, _Config):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


_KINDS = {int: "a whole number", bool: "true or false", str: "a text"}


def _read(hint: Any, value: Any, where: str) -> Any:
    """Convert a plain value to the annotated type, or say what is wrong with it."""
    optional = typing.get_origin(hint) is types.UnionType
    if optional:
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if isinstance(hint, type) and issubclass(hint, _Config):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} is {value!r}; a mapping is needed")
        return hint.from_dict(value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}; a list is needed")
        return tuple(_read(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float:
        return _read_float(value, where)
    if hint is str and value is None:  # how YAML reads a key with nothing behind it
        return ""
    if type(value) is not hint:
        raise UserError(f"{where} is {value!r}; {_KINDS.get(hint, hint.__name__)} is needed")
    if isinstance(value, int) and hint is int and value < 1:
        none = ", or null for none" if optional else ""
        raise UserError(f"{where} is {value}; a positive whole number is needed{none}")
    return value


def _read_float(value: Any, where: str) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):  # YAML 1.1 reads 1e-6 as text
        with contextlib.suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    raise UserError(f"{where} is {value!r}; a finite number is needed")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(_Config):
    """Sizes of the Wan diffusion transformer; the defaults are T2V 1.3B."""

    patch_size: tuple[int, ...] = (1, 2, 2)
    """Latent frames, rows and columns that make one token; frames are never merged."""
    text_len: int = 512
    """Tokens of prompt that cross-attention sees, padding included."""
    in_dim: int = 16
    """Channels of the latents."""
    dim: int = 1536
    """Channels of a token."""
    ffn_dim: int = 8960
    """Hidden channels of the feed-forward part."""
    freq_dim: int = 256
    """Cosines and sines of the timestep."""
    text_dim: int = 4096
    """Channels of the prompt embeddings."""
    out_dim: int = 16
    """Channels of the flow."""
    num_heads: int = 12
    num_layers: int = 30
    eps: float = 1e-6
    """Of all norms."""

    _fixed = types.MappingProxyType({"qk_norm": True, "cross_attn_norm": True})

    def __post_init__(self):
        if len(self.patch_size) != 3 or self.patch_size[0] != 1:
            raise UserError(f"transformer.patch_size is {self.patch_size}; rfjax needs (1, rows, columns)")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(
                f"transformer.dim {self.dim} over num_heads {self.num_heads} must be a whole, even head dimension"
            )
        if self.eps <= 0:
            raise UserError(f"transformer.eps is {self.eps}; a positive number is needed")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions that make one token."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2]

    def frame_tokens(self, latent_height: int, latent_width: int) -> int:
        """Tokens of one latent frame."""
        return (latent_height // self.patch_size[1]) * (latent_width // self.patch_size[2])


@dataclasses.dataclass(frozen=True)
class VAEConfig(_Config):
    """Sizes of the causal video autoencoder; the defaults are Wan2.1's."""

    dim: int = 96
    """Channels at full resolution."""
    z_dim: int = 16
    """Channels of the latents."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level over `dim`; every level but the last halves rows and columns."""
    num_res_blocks: int = 2
    """Residual blocks a level (the decoder has one more)."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Which levels also halve time."""
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    """Of each channel before normalisation."""
    latent_std: tuple[float, ...] = WAN_LATENT_STD
    """Of each channel before normalisation."""

    _aliases = types.MappingProxyType({"temperal_downsample": "temporal_downsample"})
    _fixed = types.MappingProxyType({"attn_scales": [], "dropout": 0.0})

    def __post_init__(self):
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise UserError(
                    f"vae.{name} has {len(getattr(self, name))} numbers; z_dim {self.z_dim} needs one for each channel"
                )
        if min(self.latent_std) <= 0:
            raise UserError(f"vae.latent_std has {min(self.latent_std)}; positive numbers are needed")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"vae.temporal_downsample has {len(self.temporal_downsample)} entries; "
                f"{len(self.dim_mult)} levels need {len(self.dim_mult) - 1}"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels a side of one latent position."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Video frames of one latent frame (the first alone holds a single one)."""
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(_Config):
    """Sizes of the UMT5 encoder; the defaults are UMT5-XXL's."""

    vocab: int = 256384
    """Tokens it knows."""
    dim: int = 4096
    """Channels of an embedding."""
    dim_attn: int = 4096
    """Channels of all attention heads together."""
    dim_ffn: int = 10240
    """Hidden channels of the feed-forward part."""
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    """Relative positions told apart, both directions together."""

    _fixed = types.MappingProxyType({"shared_pos": False, "dropout": 0.0})


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Config):
    """Everything a checkpoint's `config.json` says: its networks' sizes and how its rollout was trained."""

    transformer: TransformerConfig = TransformerConfig()
    vae: VAEConfig | None = None
    umt5: TextEncoderConfig | None = None
    chunk_frames: int = 3
    """Latent frames denoised together."""
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """Few-step list."""
    warp_denoising_steps: bool = True
    """Whether the timestep shift warps that list (Self-Forcing), or it is in timesteps already (CausVid)."""
    timestep_shift: float = 5.0
    latent_height: int = 60
    """Rows of a latent frame where the user names no size."""
    latent_width: int = 104
    description: str = ""
    """Shown when the checkpoint is used, for instance that its weights are random."""

    _aliases = types.MappingProxyType({"text_encoder": "umt5", "warp_denoising_step": "warp_denoising_steps"})

    def __post_init__(self):
        steps = self.denoising_steps
        if not steps or max(steps) > 1000 or list(steps) != sorted(set(steps), reverse=True):
            raise UserError(f"denoising_steps is {list(steps)}; numbers that fall from at most 1000 are needed")
        if self.timestep_shift <= 0:
            raise UserError(f"timestep_shift is {self.timestep_shift}; a positive number is needed")
        for name, patch in zip(("latent_height", "latent_width"), self.transformer.patch_size[1:], strict=True):
            if getattr(self, name) % patch:
                raise UserError(f"{name} is {getattr(self, name)}; a multiple of the patch's {patch} is needed")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> "ModelConfig":
        """Build from a mapping; `frame_tokens`, which follows from the other sizes, is checked and dropped."""
        values = dict(values)
        tokens = values.pop("frame_tokens", None)
        config = super().from_dict(values, where)
        expected = config.transformer.frame_tokens(config.latent_height, config.latent_width)
        if tokens is not None and tokens != expected:
            raise UserError(
                f"{where}.frame_tokens is {tokens!r}; a latent frame of {config.latent_height}x{config.latent_width} "
                f"has {expected}"
            )
        return config


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        UserError: the file is missing, unreadable, not YAML or JSON, or not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the configuration {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: a date without such a day, too
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {reason}") from None
    if values is None:
        raise UserError(f"{path} is empty; a mapping of settings is needed")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; a mapping of settings is needed")
    return values


def load_model_config(path: str | Path) -> ModelConfig:
    """Read a model configuration from a YAML or JSON file, or raise `UserError`."""
    return ModelConfig.from_dict(read_mapping(path), where=Path(path).name)


def preset_path(kind: str, name: str) -> Path:
    """Find `configs/<kind>/<name>.yaml` in an installed package or beside a source checkout.

    Raises:
        UserError: there is no such preset; the message lists those that exist.
    """
    known = preset_names(kind)
    if name not in known:
        raise UserError(f"no preset {name!r} in configs/{kind}; there are: {', '.join(known)}{nearest(name, known)}")
    return _presets(kind) / f"{name}.yaml"


def preset_names(kind: str) -> list[str]:
    """Return the names of all presets of a kind, sorted."""
    return sorted(path.stem for path in _presets(kind).glob("*.yaml"))


def _presets(kind: str) -> Path:
    package = Path(__file__).parent
    for root in (package / "configs", package.parent / "configs"):
        if (root / kind).is_dir():
            return root / kind
    raise UserError(f"the folder configs/{kind} is missing from this installation of rfjax")
