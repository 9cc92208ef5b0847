"""Policies by name."""

import contextlib
import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rfjax.errors import UserError, nearest
from rfjax.memory.base import MemoryPolicy
from rfjax.pytree import pytree

POLICIES: dict[str, type] = {}

Policy = TypeVar("Policy", bound=type)


def register(name: str) -> Callable[[Policy], Policy]:
    """Make a frozen dataclass a memory policy of that name.

    Its float fields become traced leaves, so that other values do not recompile; all others are static.
    """

    def add(policy: Policy) -> Policy:
        hints = typing.get_type_hints(policy)
        pytree(static=[field.name for field in dataclasses.fields(policy) if hints[field.name] is not float])(policy)
        policy.name = name
        POLICIES[name] = policy
        return policy

    return add


def create(name: str, **settings: Any) -> MemoryPolicy:
    """Make the policy of that name.

    Raises:
        UserError: an unknown policy or setting (with the nearest known one), a value of the wrong type, or settings
            that contradict each other.
    """
    policy, hints = _look_up(name, settings)
    return policy(**{key: _check(f"{name}: {key}", hints[key], value) for key, value in settings.items()})


def parse(name: str, settings: Mapping[str, str]) -> MemoryPolicy:
    """Make the policy of that name from settings as they are typed on a command line; `none` stands for None.

    Raises:
        UserError: as `create`.
    """
    _, hints = _look_up(name, settings)
    return create(name, **{key: _parse(hints[key], text.strip()) for key, text in settings.items()})


def _look_up(name: str, settings: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """Return a policy and the types of its settings, all of `settings` among them."""
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; there are: {', '.join(sorted(POLICIES))}{nearest(name, POLICIES)}")
    policy = POLICIES[name]
    known = [field.name for field in dataclasses.fields(policy)]
    for key in settings:
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}; it has: {', '.join(known)}{nearest(key, known)}")
    return policy, typing.get_type_hints(policy)


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
