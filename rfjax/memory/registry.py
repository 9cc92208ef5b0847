"""Policies by name."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
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
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}{nearest(name, POLICIES)}; there are: {', '.join(sorted(POLICIES))}")
    policy = POLICIES[name]
    hints = typing.get_type_hints(policy)
    known = [field.name for field in dataclasses.fields(policy)]
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{nearest(key, known)}; it has: {', '.join(known)}")
        settings[key] = _check(f"{name}: {key}", hints[key], value)
    return policy(**settings)


def _check(where: str, hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is typing.Literal:
        value = str(value).lower() if isinstance(value, bool) else value  # YAML reads the word true as a boolean
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(hint)))}")
    if value is None and type(None) in options:
        return value
    if float in options and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif type(value) in options:
        return value
    names = " or ".join({"int": "a whole number", "float": "a finite number"}.get(o.__name__, "none") for o in options)
    raise UserError(f"{where} is {value!r}; it must be {names}")
