"""Three-axis rotary embedding without a last frame.

Only differences of positions matter to attention, so time is counted from the first frame of the chunk being
generated and remembered frames sit at negative positions. Phases are integers modulo 2**32 (one turn), which wrap
without error; the rounding of their steps adds at most 7e-10 radians a frame of distance, so 1e-5 after an hour.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BASE = 10_000.0


def _phase_steps(pairs: int) -> np.ndarray:
    """Advance of each pair's phase for one step of position, as a fraction of a turn times 2**32."""
    frequencies = BASE ** (-np.arange(pairs, dtype=np.float64) / pairs)
    return np.rint(frequencies / (2 * np.pi) * 2.0**32).astype(np.uint32)


def _angles(positions: Int[Array, "*shape"], pairs: int) -> Float[Array, "*shape pairs"]:
    phase = positions.astype(jnp.uint32)[..., None] * jnp.asarray(_phase_steps(pairs))
    signed = jax.lax.bitcast_convert_type(phase, jnp.int32)
    return signed.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)


def rotation(
    positions: Int[Array, "*B F P"],
    rows: int,
    columns: int,
    head_dim: int,
    places: Int[Array, "*B F T"] | None = None,
) -> tuple[Float[Array, "*B F T 1 pairs"], Float[Array, "*B F T 1 pairs"]]:
    """Cosines and sines that turn every token of frames, T = rows * columns.

    Of the head_dim / 2 pairs the first `c - 2 * (c // 3)` turn with time, then `c // 3` with the row and `c // 3` with
    the column (Wan2.1, `wan/modules/model.py`: rope_params, rope_apply).

    Args:
        positions: on the time axis, of each token (P = T) or of whole frames (P = 1).
        rows: of tokens in a frame.
        columns: of tokens in a frame.
        head_dim: channels of a head.
        places: of each token in its frame, row by row; None where whole frames have all in order.
    """
    pairs, tokens = head_dim // 2, rows * columns
    spatial = pairs // 3
    places = jnp.arange(tokens) if places is None else places
    parts = (
        _angles(positions, pairs - 2 * spatial),
        _angles(places // columns, spatial),
        _angles(places % columns, spatial),
    )
    shape = (*positions.shape[:-1], tokens)
    angles = jnp.concatenate([jnp.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], axis=-1)
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(
    x: Float[Array, "*B F T H D"], cos: Float[Array, "*#B F T 1 pairs"], sin: Float[Array, "*#B F T 1 pairs"]
) -> Float[Array, "*B F T H D"]:
    """Turn each interleaved pair (2i, 2i + 1) of `x` by its angle; computed in float32, returned in x's type."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
