"""Policies by name: registered classes, presets of their settings, and classes in a user's own file."""

import contextlib
import dataclasses
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rfjax.config import preset_names, preset_path, read_mapping
from rfjax.errors import UserError, nearest
from rfjax.memory.base import MemoryPolicy
from rfjax.memory.policy_file import POLICY_FILE, classes_of, is_from_file, load_policy_file
from rfjax.pytree import pytree

POLICIES: dict[str, type] = {}

_CLASSES: set[type] = set()
"""All that was registered: a file's class stays a policy when another file, or its newer version, takes its name."""

_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "none"}
"""Types of settings, and how messages call them."""

Policy = TypeVar("Policy", bound=type)


def register(name: str) -> Callable[[Policy], Policy]:
    """Make a frozen dataclass a memory policy of that name.

    Its float fields become traced leaves, so that other values do not recompile; all others are static.

    Raises:
        UserError: the class is not a frozen dataclass, lacks a function, has a field that cannot be a setting, or the
            name belongs to another class or preset.
    """

    def add(policy: Policy) -> Policy:
        _check_name(name, policy)
        _check_class(policy)
        hints = typing.get_type_hints(policy)
        pytree(static=[field.name for field in dataclasses.fields(policy) if hints[field.name] is not float])(policy)
        policy.name = name
        POLICIES[name] = policy
        _CLASSES.add(policy)
        return policy

    return add


def _check_name(name: str, policy: type) -> None:
    """Refuse a name that is taken; what a file registers may be replaced by what a file registers."""
    known = POLICIES.get(name)
    if known is None:
        if not policy.__module__.startswith("rfjax.") and name in preset_names("policies"):
            raise UserError(f"the policy name {name!r} belongs to a preset of rfjax; choose another")
        return
    same = (known.__module__, known.__qualname__) == (policy.__module__, policy.__qualname__)
    if not same and not (is_from_file(known) and is_from_file(policy)):
        raise UserError(f"the policy name {name!r} belongs to {known.__module__}.{known.__qualname__}; choose another")


def _check_class(policy: type) -> None:
    parameters = vars(policy).get("__dataclass_params__")  # a parent's would say nothing of this class's fields
    if parameters is None or not parameters.frozen:
        raise UserError(
            f"policy {policy.__qualname__} is no frozen dataclass; put @dataclasses.dataclass(frozen=True) on it, "
            "below @register"
        )
    if lacking := sorted(getattr(policy, "__abstractmethods__", ())):
        arguments = [list(inspect.signature(getattr(policy, function)).parameters)[1:] for function in lacking]
        functions = [f"{function}({', '.join(names)})" for function, names in zip(lacking, arguments, strict=True)]
        raise UserError(f"policy {policy.__qualname__} lacks {', '.join(functions)}")
    hints = typing.get_type_hints(policy)
    for field in dataclasses.fields(policy):
        options = _options(hints[field.name])
        if not all(option in _KINDS or typing.get_origin(option) is typing.Literal for option in options):
            kind = inspect.formatannotation(hints[field.name])
            raise UserError(
                f"policy {policy.__qualname__}: the setting {field.name} is a {kind}; it can be int, float, bool, str, "
                "Literal[...] or one of these | None"
            )


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
    given = {key: _check(f"{name}: {key}", hints[key], value) for key, value in settings.items()}
    try:
        return policy(**{**preset, **given})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be made: {type(error).__name__}: {error}") from error


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
    name, colon, rest = text[:end], text[end : end + 1], text[end + 1 :]
    if colon not in ("", ":"):
        raise UserError(f"policy {text!r} has {colon!r} after its class; write FILE.py:CLASS:KEY=VALUE,KEY=VALUE")
    settings: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise UserError(f"policy {text!r} has {item!r} for a setting; write NAME:KEY=VALUE,KEY=VALUE")
        settings[key] = value
    return parse(name, settings)


def _look_up(name: str) -> tuple[type, dict[str, Any]]:
    """Return a policy's class and the settings of the preset that was asked for, none for a class itself."""
    if not isinstance(name, str):
        raise UserError(f"policy is {name!r}; a name is needed")
    if name in POLICIES or POLICY_FILE.fullmatch(name):
        return _class_of(name), {}
    if name.endswith((".py", ".py:")):
        path = name.rstrip(":")
        raise UserError(f"policy {name!r} lacks a class; write {path}:CLASS; it has: {', '.join(classes_of(path))}")
    if name.endswith((".yaml", ".yml")):
        return _read_preset(Path(name))
    presets = preset_names("policies")
    if name in presets:
        return _read_preset(preset_path("policies", name))
    if ":" in name and "=" in name:
        raise UserError(f"unknown policy {name!r}; settings go apart from the name, as --set KEY=VALUE")
    known = sorted({*POLICIES, *presets})
    raise UserError(f"unknown policy {name!r}; there are: {', '.join(known)}{nearest(name, known)}")


def _class_of(name: str) -> type:
    """Return the class of a policy's name or of `FILE.py:CLASS`."""
    if name in POLICIES:
        return POLICIES[name]
    policy = load_policy_file(name)
    if policy not in _CLASSES:
        raise UserError(f"{name} is not registered; put @rfjax.memory.register(...) above the class")
    return policy


def _read_preset(path: Path) -> tuple[type, dict[str, Any]]:
    content = read_mapping(path)
    for key in content:
        if key not in ("description", "policy", "settings"):
            raise UserError(f"{path} has {key!r}; a policy's preset has description, policy and settings")
    name, settings = content.get("policy"), content.get("settings", {})
    if isinstance(name, str) and POLICY_FILE.fullmatch(name):
        name = str(path.parent / name)
    elif not isinstance(name, str) or name not in POLICIES:
        raise UserError(
            f"{path}: policy is {name!r}; there are: {', '.join(sorted(POLICIES))}{nearest(str(name), POLICIES)}"
        )
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings is {settings!r}; a mapping is needed")
    policy = _class_of(name)
    hints = _hints(policy, settings)
    # YAML 1.1 reads 1e-3 as text.
    typed = {key: _parse(hints[key], value) if isinstance(value, str) else value for key, value in settings.items()}
    return policy, {key: _check(f"{path}: {key}", hints[key], value) for key, value in typed.items()}


def _hints(policy: type, settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the types of a policy's settings, all of `settings` among them."""
    known = [field.name for field in dataclasses.fields(policy)]
    for key in settings:
        if key not in known:
            raise UserError(
                f"{policy.name} has no setting {key!r}; it has: {', '.join(known)}{nearest(str(key), known)}"
            )
    return typing.get_type_hints(policy)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one that it is."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _literals(hint: Any) -> list[Any]:
    """Return the values that a type lists."""
    return [value for o in _options(hint) if typing.get_origin(o) is typing.Literal for value in typing.get_args(o)]


def _parse(hint: Any, text: str) -> Any:
    """Convert text to the annotated type where it can be; `_check` says what is wrong with the rest."""
    options, lower = _options(hint), text.lower()
    words = {str(value): value for value in _literals(hint)}
    if bool in options:
        words |= {text: lower == "true"} if lower in ("true", "false") else {}
    if type(None) in options and lower == "none":
        return None
    if text in words:
        return words[text]
    for kind in (int, float):
        if kind in options:
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def _check(where: str, hint: Any, value: Any) -> Any:
    """Return the value as the annotated type, or raise `UserError`."""
    options, literals = _options(hint), _literals(hint)
    if type(value) in options and (value is None or isinstance(value, str)):
        return value
    if isinstance(value, bool | np.bool_):
        if bool in options:
            return bool(value)
    elif int in options and isinstance(value, numbers.Integral):
        return int(value)
    elif float in options and isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if any(type(value) is type(literal) and value == literal for literal in literals):
        return value
    names = [_KINDS[option] for option in options if option in _KINDS]
    if literals:
        names.insert(0, f"one of {', '.join(map(repr, literals))}")
    raise UserError(f"{where} is {value!r}; it must be {' or '.join(names)}")
