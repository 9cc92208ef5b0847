"""A memory followed over many chunks of random keys and values, for the tests of policies."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import compilations

from rfjax.memory import CleanChunk, MemoryShape

SHAPE = MemoryShape(layers=2, batch=2, heads=2, head_dim=6, rows=1, columns=2, chunk_frames=3)

# The policy is an argument, so that tests share what is compiled.
read = jax.jit(lambda policy, state, start: policy.read(state, start))
commit = jax.jit(lambda policy, state, chunk: policy.commit(state, chunk), donate_argnames="state")
recache = jax.jit(lambda policy, state, chunk: policy.recache(state, chunk))


def random_chunk(rng, starts, shape=SHAPE, dtype=jnp.float32, drift=0.0) -> CleanChunk:
    """A chunk that begins with a frame of its own in each sample; keys and values drift away from those before."""
    frames = np.asarray(starts, np.int32)[:, None] + np.arange(shape.chunk_frames, dtype=np.int32)
    sizes = (shape.layers, *frames.shape, shape.frame_tokens, shape.heads * shape.head_dim)
    keys, values = (drift * np.sqrt(np.maximum(frames, 0))[..., None, None] + rng.normal(size=sizes) for _ in range(2))
    return CleanChunk(jnp.asarray(frames), *(jnp.asarray(part, dtype) for part in (2 * keys, keys, values)))


def roll(policy, chunks, shape=SHAPE, dtype=jnp.float32, drift=0.0):
    """Yield (start, view, keys and values of every frame so far, each [L, B, T, C]) of each chunk."""
    rng = np.random.default_rng(0)
    before = compilations(read), compilations(commit)
    state = policy.init(shape, chunks * shape.chunk_frames, dtype)
    past = [], []
    for start in range(0, chunks * shape.chunk_frames, shape.chunk_frames):
        yield start, jax.device_get(read(policy, state, jnp.full(shape.batch, start, jnp.int32))), past
        chunk = random_chunk(rng, [start] * shape.batch, shape, dtype, drift)
        state = commit(policy, state, chunk)
        for so_far, new in zip(past, (chunk.keys, chunk.values), strict=True):
            so_far.extend(np.asarray(new, np.float32).transpose(2, 0, 1, 3, 4))
    assert compilations(read) <= before[0] + 1
    assert compilations(commit) <= before[1] + 1


def slots_in_order(view, sample):
    """(slot, frame, position) of a sample's filled slots in order of position, if the view is as every view must be."""
    length = int(view.length[sample])
    frames, positions, roles = (
        np.asarray(part[sample, 0, :, 0]) for part in (view.trace.frames, view.trace.positions, view.trace.roles)
    )
    np.testing.assert_array_equal(positions, view.positions[0, sample, :, 0])
    assert (frames[:length] >= 0).all()
    assert (roles[:length] > 0).all()
    assert (frames[length:] == -1).all()
    assert (roles[length:] == 0).all()
    order = np.argsort(positions[:length]).tolist()
    return [(slot, int(frames[slot]), int(positions[slot])) for slot in order]


def roles_in_order(view, sample=0):
    return [int(view.trace.roles[sample, 0, slot, 0]) for slot, _, _ in slots_in_order(view, sample)]
