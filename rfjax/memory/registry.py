"""Policies by name: registered classes, presets of their settings, and classes in a user's own file."""

import contextlib
import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rfjax.config import preset_names, preset_path, read_mapping
from rfjax.errors import UserError, nearest
from rfjax.memory.base import MemoryPolicy
from rfjax.memory.policy_file import POLICY_FILE, load_policy_file
from rfjax.pytree import pytree

POLICIES: dict[str, type] = {}

Policy = TypeVar("Policy", bound=type)


def register(name: str) -> Callable[[Policy], Policy]:
    """Make a frozen dataclass a memory policy of that name.

    Its float fields become traced leaves, so that other values do not recompile; all others are static.

    Raises:
        UserError: the class is not a frozen dataclass, or the name belongs to another class.
    """

    def add(policy: Policy) -> Policy:
        known = POLICIES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (policy.__module__, policy.__qualname__):
            raise UserError(
                f"the policy name {name!r} belongs to {known.__module__}.{known.__qualname__}; choose another"
            )
        parameters = getattr(policy, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen:
            raise UserError(
                f"policy {policy.__qualname__} is no frozen dataclass; put @dataclasses.dataclass(frozen=True) on it"
            )
        hints = typing.get_type_hints(policy)
        pytree(static=[field.name for field in dataclasses.fields(policy) if hints[field.name] is not float])(policy)
        policy.name = name
        POLICIES[name] = policy
        return policy

    return add


def create(name: str, **settings: Any) -> MemoryPolicy:
    """Make a policy.

    Args:
        name: of a policy or of a preset in `configs/policies`; the path of a preset file (`.yaml`); or
            `FILE.py:CLASS`, a registered class in a file.
        settings: of the policy, instead of its defaults or the preset's.

    Raises:
        UserError: an unknown policy or setting (with the nearest known one), a value of the wrong type, settings
            that contradict each other, or a file that is not what it should be.
    """
    policy, preset = _look_up(name)
    hints = _hints(policy, settings)
    return policy(**{**preset, **{key: _check(f"{name}: {key}", hints[key], value) for key, value in settings.items()}})


def parse(name: str, settings: Mapping[str, str]) -> MemoryPolicy:
    """Make a policy from settings as they are typed on a command line; `none` stands for None.

    Raises:
        UserError: as `create`.
    """
    policy, _ = _look_up(name)
    hints = _hints(policy, settings)
    return create(name, **{key: _parse(hints[key], text.strip()) for key, text in settings.items()})


def parse_text(text: str) -> MemoryPolicy:
    """Make the policy written as `NAME` or `NAME:KEY=VALUE,KEY=VALUE`, where NAME is what `create` takes.

    Raises:
        UserError: another form, or as `create`.
    """
    file = POLICY_FILE.match(text)
    end = file.end() if file else text.find(":") if ":" in text else len(text)
    name, rest = text[:end], text[end + 1 :]
    settings: dict[str, str] = {}
    for item in rest.split(",") if end < len(text) else ():
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise UserError(f"policy {text!r} has {item!r} for a setting; write NAME:KEY=VALUE,KEY=VALUE")
        settings[key] = value
    return parse(name, settings)


def _look_up(name: str) -> tuple[type, dict[str, Any]]:
    """Return a policy's class and the settings of the preset that was asked for, none for a class itself."""
    if name in POLICIES:
        return POLICIES[name], {}
    if POLICY_FILE.fullmatch(name):
        policy = load_policy_file(name)
        if policy not in POLICIES.values():
            raise UserError(f"{name} is not registered; put @rfjax.memory.register(...) above the class")
        return policy, {}
    if name.endswith((".yaml", ".yml")):
        return _read_preset(Path(name))
    presets = preset_names("policies")
    if name in presets:
        return _read_preset(preset_path("policies", name))
    known = sorted({*POLICIES, *presets})
    raise UserError(f"unknown policy {name!r}; there are: {', '.join(known)}{nearest(name, known)}")


def _read_preset(path: Path) -> tuple[type, dict[str, Any]]:
    content = read_mapping(path)
    for key in content:
        if key not in ("description", "policy", "settings"):
            raise UserError(f"{path} has {key!r}; a policy's preset has description, policy and settings")
    name, settings = content.get("policy"), content.get("settings") or {}
    if name not in POLICIES:
        raise UserError(
            f"{path}: policy is {name!r}; there are: {', '.join(sorted(POLICIES))}{nearest(str(name), POLICIES)}"
        )
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings is {settings!r}; a mapping is needed")
    hints = _hints(POLICIES[name], settings)
    return POLICIES[name], {key: _check(f"{path}: {key}", hints[key], value) for key, value in settings.items()}


def _hints(policy: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the types of a policy's settings, all of `settings` among them."""
    known = [field.name for field in dataclasses.fields(policy)]
    for key in settings:
        if key not in known:
            raise UserError(f"{policy.name} has no setting {key!r}; it has: {', '.join(known)}{nearest(key, known)}")
    return typing.get_type_hints(policy)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _parse(hint: Any, text: str) -> Any:
    """Convert text to the annotated type where it can be; `_check` says what is wrong with the rest."""
    if type(None) in _options(hint) and text.lower() == "none":
        return None
    for kind in (int, float):
        if kind in _options(hint):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def _check(where: str, hint: Any, value: Any) -> Any:
    """Return the value as the annotated type, or raise `UserError`."""
    options = _options(hint)
    if typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(hint)))}")
    if value is None and type(None) in options:
        return value
    if int in options and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if float in options and isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    names = " or ".join({"int": "a whole number", "float": "a finite number"}.get(o.__name__, "none") for o in options)
    raise UserError(f"{where} is {value!r}; it must be {names}")
