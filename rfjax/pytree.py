"""Frozen dataclasses as pytrees."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax

Class = TypeVar("Class", bound=type)


def pytree(static: Iterable[str] = ()) -> Callable[[Class], Class]:
    """Register a frozen dataclass as a pytree whose fields are its children, those named `static` aside.

    Unlike `jax.tree_util.register_dataclass`, rebuilding does not call `__init__`: transformations put tracers, batched
    arrays and placeholders where the annotated shapes and the checks of a real construction do not hold.
    """
    static = tuple(static)

    def register(cls: Class) -> Class:
        children = [field.name for field in dataclasses.fields(cls) if field.name not in static]

        def flatten_with_keys(tree):
            keyed = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in children]
            return keyed, tuple(getattr(tree, name) for name in static)

        def flatten(tree):
            return [getattr(tree, name) for name in children], tuple(getattr(tree, name) for name in static)

        def unflatten(fixed, values):
            tree = object.__new__(cls)
            for name, value in (*zip(children, values, strict=True), *zip(static, fixed, strict=True)):
                object.__setattr__(tree, name, value)
            return tree

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return register
