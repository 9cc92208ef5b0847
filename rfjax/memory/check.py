"""Whether a policy follows the contract of `rfjax.memory.base`, found out before anything is computed.

Shapes and types are found out abstractly; what a policy from a user's file asks for, by a dry run.
"""

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from rfjax.errors import UserError
from rfjax.memory.base import CleanChunk, MemoryShape, Trace, View
from rfjax.memory.dry_run import dry_run
from rfjax.memory.policy_file import policy_source

_SIGNATURES = {
    "init": "init(shape, video_frames, dtype)",
    "read": "read(state, start)",
    "commit": "commit(state, chunk)",
    "recache": "recache(state, frames)",
}

RECACHED_CHUNKS = 4
"""The most chunks that a recache is given, `rfjax.sampling.switching.WINDOW_CHUNKS`."""


def check_policy(policy: Any, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> tuple[Any, View]:
    """Trace a policy's functions and return its state and view as shapes.

    Raises:
        UserError: this is no policy; a function is missing, fails, or returns another shape or type than the contract
            says; the policy's settings do not fit the shape; or a policy from a file asks for what it does not store.
    """
    _check_is_policy(policy)
    leaves, structure = jax.tree.flatten(policy)
    checked = _check_shapes(structure, tuple(map(_abstract, leaves)), shape, video_frames, jnp.dtype(dtype))
    if policy_source(policy) and all(isinstance(leaf, float) for leaf in leaves):  # of given values, not of tracers
        _attempt(policy, "a dry run", dry_run, policy, shape.layers, shape.chunk_frames)
    return checked


def _check_is_policy(policy: Any) -> None:
    if isinstance(policy, str | type):
        what = repr(policy) if isinstance(policy, str) else f"the class {policy.__name__}"
        raise UserError(f"policy is {what}; one made by rfjax.memory.create(NAME, ...) is needed")
    for function, signature in _SIGNATURES.items():
        if not callable(getattr(policy, function, None)):
            raise UserError(f"{_name(policy)} has no function {signature}")
    if jax.tree.structure(policy) == jax.tree.structure(0):
        raise UserError(f"{_name(policy)} is not registered; put @rfjax.memory.register(...) above its class")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


@functools.lru_cache(maxsize=256)
def _check_shapes(
    structure: Any, leaves: tuple[Any, ...], shape: MemoryShape, video_frames: int, dtype: jnp.dtype
) -> tuple[Any, View]:
    """Check all policies of this structure, whose traced settings are nothing but shapes, as in a rollout."""
    policy = jax.tree.unflatten(structure, leaves)
    state = _trace(policy, "init", lambda p: p.init(shape, video_frames, dtype))
    start = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
    view = _trace(policy, "read", lambda p, *given: p.read(*given), state, start)
    _check_view(policy, view, shape, dtype)
    chunk = _frames(shape, 1, dtype)
    _check_state(policy, "commit", state, _trace(policy, "commit", lambda p, *given: p.commit(*given), state, chunk))
    for chunks in range(1, RECACHED_CHUNKS + 1):
        frames = _frames(shape, chunks, dtype)
        after = _trace(policy, "recache", lambda p, *given: p.recache(*given), state, frames)
        _check_state(policy, "recache", state, after)
    return state, view


def _frames(shape: MemoryShape, chunks: int, dtype: jnp.dtype) -> Any:
    """Return so many chunks of frames as shapes."""
    count = chunks * shape.chunk_frames
    kv = (shape.layers, shape.batch, count, shape.frame_tokens, shape.heads * shape.head_dim)
    projected = jax.ShapeDtypeStruct(kv, dtype)
    frames = jax.ShapeDtypeStruct((shape.batch, count), jnp.int32)
    return jax.eval_shape(lambda f, x: CleanChunk(f, x, x, x), frames, projected)


def _name(policy: Any) -> str:
    return f"policy {getattr(policy, 'name', '?')!r} ({type(policy).__name__})"


def _trace(policy: Any, function: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the shapes that a function of the policy and arguments makes."""
    return _attempt(policy, function, jax.eval_shape, call, policy, *arguments)


def _attempt(policy: Any, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except UserError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        message = f"{_name(policy)}: {what} failed{_where(policy, error)}: {type(error).__name__}: {first}"
        raise UserError(message) from error


def _where(policy: Any, error: BaseException) -> str:
    """Say which line of the policy's own file an error came from."""
    file = getattr(sys.modules.get(type(policy).__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" in line {lines[-1]} of {Path(file).name}" if file and lines else ""


def _check_view(policy: Any, view: Any, shape: MemoryShape, dtype: jnp.dtype) -> None:
    if not isinstance(view, View):
        raise UserError(f"{_name(policy)}: read returned {type(view).__name__}; a rfjax.memory.View is needed")
    if not isinstance(view.trace, Trace):
        raise UserError(
            f"{_name(policy)}: read returned a view whose trace is {type(view.trace).__name__}; a rfjax.memory.Trace "
            "is needed"
        )
    layers, batch, tokens = shape.layers, shape.batch, shape.frame_tokens
    slots = view.keys.shape[2] if getattr(view.keys, "ndim", 0) == 5 else None
    kv = {"L": layers, "B": batch, "S": slots, "T": tokens, "C": shape.heads * shape.head_dim}
    each = {"Y": (1, layers), "B": batch, "S": slots, "P": (1, tokens)}
    traced = {"B": batch, "Y": (1, layers), "S": slots, "P": (1, tokens)}
    for name in ("keys", "values"):
        _expect(policy, f"a view's {name}", getattr(view, name), kv, dtype)
    _expect(policy, "a view's positions", view.positions, each, jnp.int32)
    if view.places is not None:
        _expect(
            policy, "a view's places", view.places, {"Y": (1, layers), "B": batch, "S": slots, "T": tokens}, jnp.int32
        )
    _expect(policy, "a view's length", view.length, {"B": batch}, jnp.int32)
    for name in ("frames", "positions", "roles"):
        _expect(policy, f"a trace's {name}", getattr(view.trace, name), traced, jnp.int32)
    for name, kind in (("selected_frames", jnp.int32), ("candidates", jnp.int32), ("scores", jnp.float32)):
        entries = {"B": batch, "Y": (1, layers), name.partition("_")[0]: None}
        _expect(policy, f"a trace's {name}", getattr(view.trace, name), entries, kind)


def _expect(policy: Any, what: str, array: Any, sizes: dict[str, Any], dtype: Any) -> None:
    """Compare an array with named sizes: a number, one of several, or any (None)."""
    if not hasattr(array, "ndim"):
        raise UserError(f"{_name(policy)}: read returned {what} that is {type(array).__name__}; an array is needed")
    fits = array.ndim == len(sizes) and all(
        want is None or size in (want if isinstance(want, tuple) else (want,))
        for size, want in zip(array.shape, sizes.values(), strict=True)
    )
    if not fits or array.dtype != dtype:
        _refuse(policy, what, array, sizes, dtype)


def _refuse(policy: Any, what: str, array: Any, sizes: dict[str, Any], dtype: Any) -> NoReturn:
    wanted = [
        letter if want is None else f"{letter}={' or '.join(map(str, want)) if isinstance(want, tuple) else want}"
        for letter, want in sizes.items()
    ]
    raise UserError(
        f"{_name(policy)}: read returned {what} of shape {list(array.shape)} and type {array.dtype}; "
        f"[{', '.join(wanted)}] and {jnp.dtype(dtype)} are needed"
    )


def _check_state(policy: Any, function: str, before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise UserError(
            f"{_name(policy)}: {function} returned {jax.tree.structure(after)}; the state that init makes is "
            f"{jax.tree.structure(before)}"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"{_name(policy)}: {function} returned state{jax.tree_util.keystr(path)} of shape {list(new.shape)} "
                f"and type {new.dtype}; init made it {list(old.shape)} and {old.dtype}, and a state keeps its shapes"
            )
