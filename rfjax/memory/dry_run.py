"""A policy over a made-up video whose keys say which frame they belong to: does it attend to what it says it does?

A wrong decision makes no error later: a frame that is not stored is read from some slot that holds another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rfjax.errors import UserError
from rfjax.memory.base import BLEND, NONE, CleanChunk, MemoryShape, View

_CHUNKS = 40


@functools.lru_cache(maxsize=256)
def dry_run(policy: Any, layers: int, chunk_frames: int) -> None:
    """Follow a policy over 40 chunks of tiny frames.

    Raises:
        UserError: the first thing found that is not as the view says it is.
    """
    shape = MemoryShape(layers, batch=2, heads=1, head_dim=4, rows=2, columns=2, chunk_frames=chunk_frames)
    views = jax.device_get(_views(policy, shape))
    for chunk in range(_CHUNKS):
        view = jax.tree.map(lambda leaf, chunk=chunk: leaf[chunk], views)
        if said := _fault(view, chunk * chunk_frames):
            raise UserError(
                f"policy {policy.name!r}: in the chunk that begins with frame {chunk * chunk_frames}, {said}"
            )


@functools.partial(jax.jit, static_argnames="shape")
def _views(policy: Any, shape: MemoryShape) -> dict[str, Any]:
    """Return what each chunk attends to, with one channel of keys and values, on a first axis of chunks."""
    count = shape.chunk_frames

    def follow(state, chunk):
        view = policy.read(state, jnp.full(shape.batch, chunk * count, jnp.int32))
        frames = jnp.broadcast_to(chunk * count + jnp.arange(count, dtype=jnp.int32), (shape.batch, count))
        number = (frames[None, :, :, None, None] + 1).astype(jnp.float32)  # an empty slot holds zeros
        made = jnp.broadcast_to(number, (shape.layers, *frames.shape, shape.frame_tokens, shape.heads * shape.head_dim))
        return policy.commit(state, CleanChunk(frames, made, made, -made)), _one_channel(view)

    state = policy.init(shape, _CHUNKS * count, jnp.float32)
    return jax.lax.scan(follow, state, jnp.arange(_CHUNKS, dtype=jnp.int32))[1]


def _one_channel(view: View) -> dict[str, Any]:
    trace = view.trace
    return {
        "keys": jnp.moveaxis(view.keys[..., 0], 0, 1),
        "values": jnp.moveaxis(view.values[..., 0], 0, 1),
        "placed": jnp.moveaxis(view.positions, 0, 1),
        "valid": view.valid[:, None, :, None],
        "frames": trace.frames,
        "positions": trace.positions,
        "roles": trace.roles,
    }


def _fault(view: dict[str, np.ndarray], start: int) -> str | None:
    """Say what is wrong with the view of the chunk at `start`, whose arrays are [B, layers, S, tokens]."""
    frames, valid, roles = view["frames"], view["valid"], view["roles"]
    if ((frames >= 0) != valid).any():
        length, held = int(valid[0].sum()), int((frames >= 0).any(axis=(1, 3)).sum(axis=1)[0])
        return f"the view's length is {length} and its trace names {held} frames; the valid slots must come first"
    checks = (
        (frames >= start, "it attends to frame {frame}; only earlier ones are there"),
        (view["placed"] >= 0, "frame {frame} stands at position {placed}; what is remembered stands below 0"),
        (view["placed"] != view["positions"], "frame {frame} stands at {placed}, but at {positions} in the trace"),
        (roles == NONE, "frame {frame} has the role NONE"),
        *(
            (
                (np.abs(view[name] - sign * (frames + 1)) > 0.5) & (roles != BLEND),
                f"it attends to frame {{frame}}, whose {name} are not stored; see capacity and last_reader",
            )
            for name, sign in (("keys", 1), ("values", -1))
        ),
    )
    for wrong, said in checks:
        at = np.argwhere(wrong & valid)
        if len(at):
            return said.format(frame=_at(frames, at[0]), **{k: _at(view[k], at[0]) for k in ("placed", "positions")})
    return "an empty slot has another role than NONE" if ((roles != NONE) & ~valid).any() else None


def _at(array: np.ndarray, index: np.ndarray) -> int:
    """Return the entry at an index; axes of size 1 stand for all."""
    return int(array[tuple(np.minimum(index, np.array(array.shape) - 1))])
