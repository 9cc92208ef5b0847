"""A study: the same prompts and seeds under many policies and settings, read strictly from YAML."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rfjax.config import _Config, _plain, _read_float, preset_path, read_mapping
from rfjax.errors import UserError, nearest
from rfjax.io.atomic import replacing
from rfjax.io.names import folder_name
from rfjax.memory import MemoryPolicy, parse
from rfjax.memory.policy_file import POLICY_FILE

MOST_VARIANTS = 1000
_RANGE = ("from", "to", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGrid(_Config):
    """A policy and the settings to be tried."""

    policy: str = ""
    """What `rfjax.memory.create` takes; a file's path counts from the study's folder."""
    settings: dict = dataclasses.field(default_factory=dict)
    """For each setting a value, a list of values or `{from, to, steps}`; several lists make a grid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(_Config):
    """What is compared."""

    description: str = ""
    """One line, shown above the report."""
    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    """A prompt a line, instead of `prompts`; the path counts from the study's folder."""
    num_samples: int = 1
    """Videos of each prompt, from as many seeds."""
    seed: int = 0
    """With the number of the sample it fixes the noise, which all policies share."""
    seconds: float | None = None
    """Length, rounded up to whole chunks."""
    latent_frames: int | None = None
    """Length in latent frames instead."""
    height: int | None = None
    """Pixels; the checkpoint's where it is None."""
    width: int | None = None
    """Pixels; the checkpoint's where it is None."""
    fps: int = 16
    """Frames a second."""
    policies: tuple[PolicyGrid, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "study") -> "Study":
        """Build from a mapping.

        Raises:
            UserError: as `_Config.from_dict`, or a value out of its range.
        """
        values = dict(values)
        seed = values.pop("seed", 0)  # the only number that may be 0
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(f"{where}.seed is {seed!r}; a whole number from 0 to {2**32 - 1} is needed")
        study = dataclasses.replace(super().from_dict(values, where), seed=seed)
        for name, most in (("num_samples", 10**6), ("height", 2**14), ("width", 2**14), ("fps", 1000)):
            value = getattr(study, name)
            if value is not None and value > most:
                raise UserError(f"{where}.{name} is {value}; at most {most} is possible")
        if study.seconds is not None and study.seconds <= 0:
            raise UserError(f"{where}.seconds is {study.seconds:g}; a positive number is needed")
        if study.seconds is not None and study.latent_frames is not None:
            raise UserError(f"{where} has seconds and latent_frames; one of them is needed")
        if bool(study.prompts) == (study.prompt_file is not None):
            raise UserError(
                f"{where} has {'both' if study.prompts else 'neither'} of prompts and prompt_file; give one"
            )
        if not study.policies:
            raise UserError(f"{where} has no policies; at least one is needed")
        return study


@dataclasses.dataclass(frozen=True)
class Variant:
    """One policy with one value for each setting."""

    name: str
    """Unique in the study, readable, and fit for a folder."""
    policy_name: str
    """What `create` takes."""
    settings: dict[str, Any]
    """Those that the study gives."""
    policy: MemoryPolicy

    @property
    def texts(self) -> dict[str, str]:
        """The settings as `parse` takes them."""
        return {key: _text(value) for key, value in self.settings.items()}


def find_study(text: str) -> Path:
    """Return the path of a study: a YAML file's own, or that of `configs/sweeps/NAME.yaml`.

    Raises:
        UserError: there is no shipped study of this name.
    """
    return Path(text) if text.endswith((".yaml", ".yml")) or "/" in text else preset_path("sweeps", text)


def load_study(path: Path) -> Study:
    """Read a study, without looking at its prompt file or its policies.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a wrong value.
    """
    return Study.from_dict(read_mapping(path), where=path.name)


def expand_variants(study: Study, path: Path) -> list[Variant]:
    """Make all policies of a study, read from `path`, in order.

    Raises:
        UserError: an unknown policy or setting, a wrong value, no value at all, or one variant twice.
    """
    made: list[tuple[str, str, dict[str, Any], MemoryPolicy]] = []
    for number, grid in enumerate(study.policies):
        where = f"{path.name}: policies[{number}]"
        if not grid.policy:
            raise UserError(f"{where} has no policy; write 'policy: relax_forcing', for example")
        name = _from_folder(grid.policy, path.parent)
        for texts in _points(where, grid.settings, room=MOST_VARIANTS - len(made)):
            try:
                policy = parse(name, texts)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            twin = next((other for *_, other in made if type(other) is type(policy) and other == policy), None)
            if twin is not None:
                raise UserError(f"{where} makes {policy}, which the study has already; each variant is made once")
            made.append((where, name, {key: getattr(policy, key) for key in texts}, policy))
    names = _names(made)
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(f"{made[index][0]} and another policy of the study are both named {name!r}; rename a file")
    return [
        Variant(name, text, settings, policy) for name, (_, text, settings, policy) in zip(names, made, strict=True)
    ]


def _from_folder(policy: str, folder: Path) -> str:
    """Let the path of a policy's file count from the study's folder."""
    is_file = POLICY_FILE.fullmatch(policy) or policy.endswith((".yaml", ".yml"))
    return str(folder.absolute() / policy) if is_file else policy


def _points(where: str, settings: Mapping[Any, Any], room: int) -> list[dict[str, str]]:
    """Return every combination of the settings' values, as texts, the last setting changing first."""
    axes = {str(key): _values(f"{where}: {key}", value) for key, value in settings.items()}
    count = math.prod(len(values) for values in axes.values())
    if count > room:
        raise UserError(f"{where} makes {count} variants; a study has at most {MOST_VARIANTS}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _values(where: str, given: Any) -> list[str]:
    if isinstance(given, Mapping):
        return _spaced(where, given)
    values = given if isinstance(given, list) else [given]
    if not values:
        raise UserError(f"{where} is an empty list; at least one value is needed")
    for value in values:
        if isinstance(value, list | Mapping):
            raise UserError(f"{where} has {value!r}; a list holds single values")
    return [_text(value) for value in values]


def _spaced(where: str, given: Mapping[Any, Any]) -> list[str]:
    for key in given:
        if key not in _RANGE:
            raise UserError(f"{where} has {key!r}; a range has from, to and steps{nearest(str(key), _RANGE)}")
    for key in _RANGE:
        if key not in given:
            raise UserError(f"{where} has no {key!r}; a range has from, to and steps")
    steps = given["steps"]
    if type(steps) is not int or not 2 <= steps <= MOST_VARIANTS:
        raise UserError(f"{where}.steps is {steps!r}; a whole number from 2 to {MOST_VARIANTS} is needed")
    first, last = (_read_float(given[key], f"{where}.{key}") for key in ("from", "to"))
    values = [first + (last - first) * step / (steps - 1) for step in range(steps)]
    whole = all(isinstance(given[key], int) for key in ("from", "to"))
    # Rounded to 12 digits, so that steps of 0.1 are 0.3 and not 0.30000000000000004.
    return [str(int(value)) if whole and value.is_integer() else str(float(f"{value:.12g}")) for value in values]


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _names(made: Sequence[tuple[str, str, dict[str, Any], MemoryPolicy]]) -> list[str]:
    """Name the variants, numbers as short as tells them apart."""
    for digits in (6, None):
        names = [folder_name(_name(text, settings, policy, digits)) for _, text, settings, policy in made]
        if len(set(names)) == len(names):
            break
    return names


def _name(text: str, settings: Mapping[str, Any], policy: MemoryPolicy, digits: int | None) -> str:
    if POLICY_FILE.fullmatch(text):
        text = policy.name
    elif text.endswith((".yaml", ".yml")):
        text = Path(text).stem
    values = [f"{key}={show_value(value, digits)}" for key, value in settings.items()]
    return ",".join([text, *values])


def show_value(value: Any, digits: int | None = 6) -> str:
    """Write a setting's value, a float with at most so many digits, or all that it has."""
    return f"{value:.{digits}g}" if isinstance(value, float) and digits else _text(value)


def resolved(study: Study, variants: Sequence[Variant], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study that says the same with nothing left open; `rfjax sweep` takes it too.

    Args:
        study: with its prompts.
        variants: of the study.
        settings: `latent_frames`, `height` and `width` as they came out.
    """
    sizes = {key: settings[key] for key in ("latent_frames", "height", "width")}
    values = dataclasses.replace(study, prompt_file=None, seconds=None, policies=(), **sizes).to_dict()
    policies = [{"policy": v.policy_name, **({"settings": v.settings} if v.settings else {})} for v in variants]
    return {**values, "policies": policies}


def write_study(path: Path, values: Mapping[str, Any]) -> None:
    """Write a resolved study as YAML, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yaml.safe_dump(dict(values), file, sort_keys=False, allow_unicode=True, width=1000)


def check_same(folder: Path, path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to mix two studies in one folder; one may grow by prompts, samples and policies.

    Args:
        folder: of the results.
        path: of the resolved study in it, which may be missing.
        wanted: the resolved study that is to be made there.

    Raises:
        UserError: the folder holds another study; the message names the first difference.
    """
    if not path.exists():
        return
    there, here = Study.from_dict(read_mapping(path), str(path)), Study.from_dict(wanted)
    for name in ("seed", "latent_frames", "height", "width", "fps"):
        if getattr(there, name) != getattr(here, name):
            raise _another(folder, f"{name} {getattr(there, name)}, this one has {getattr(here, name)}")
    if there.num_samples > here.num_samples:
        raise _another(folder, f"num_samples {there.num_samples}, this one has {here.num_samples}")
    for name in ("prompts", "policies"):
        for entry in getattr(there, name):
            if entry not in getattr(here, name):
                raise _another(folder, f"{_plain(entry)!r} among its {name}, which this one lacks")


def _another(folder: Path, difference: str) -> UserError:
    return UserError(f"{folder} holds another study, with {difference}; choose another --output, or --overwrite")
