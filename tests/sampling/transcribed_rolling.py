"""Rolling Forcing's sampler, slow and obvious, kept apart from the code that it checks.

Transcribed from TencentARC/RollingForcing at a1477d0: `pipeline/rolling_forcing_inference.py` (windows, noise levels,
clean pass) and `wan/modules/causal_model.py`, CausalWanSelfAttention with a cache (what is attended, and where).
One sample; everything is stored by frame index and nothing is evicted. Positions are counted from the first frame
that a network pass works on: its own frame i is at i, remembered frames are negative. Within a pass every frame sees
every other one and all that is remembered: no mask.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

STEPS = (1000, 800, 600, 400, 200)
SHIFT = 5.0


class Remembered(NamedTuple):
    """One frame of memory as a pass gets it; `entry` is what the clean pass returned for the frame (keys, values)."""

    frame: int
    position: int
    entry: Any


# (latents [f, ...], timestep of each frame [f], memory in time order) -> flow [f, ...]
Denoise = Callable[[np.ndarray, np.ndarray, list[Remembered]], np.ndarray]
# (latents [n, ...], zeros [n], memory in time order) -> one entry for each frame
Clean = Callable[[np.ndarray, np.ndarray, list[Remembered]], list[Any]]


def noise_levels(steps: tuple[int, ...] = STEPS, shift: float = SHIFT) -> list[float]:
    """Sigma of every step: 1, 0.9524, 0.8824, 0.7692, 0.5556. The timestep is 1000 sigma."""
    return [shift * (step / 1000) / (1 + (shift - 1) * (step / 1000)) for step in steps]


def schedule(chunks: int, window: int = 5) -> list[tuple[list[int], list[int]]]:
    """For each iteration the chunks of the joint window in time order, and the step index of each (0 is pure noise)."""
    iterations = []
    for iteration in range(chunks + window - 1):
        members = [c for c in range(chunks) if iteration - window < c <= iteration]
        iterations.append((members, [iteration - c for c in members]))
    return iterations


def attended(
    iteration: int, chunks: int, window: int = 5, *, chunk: int = 3, attention: int = 21, anchor: int = 3
) -> list[tuple[int, int]]:
    """(frame, position) that the joint window of an iteration attends to beside itself."""
    members, _ = schedule(chunks, window)[iteration]
    start = members[0] * chunk
    if start == 0:
        return []
    room = attention - anchor - len(members) * chunk
    later = list(range(anchor, start))
    recent = later[-room:] if room > 0 else []
    # recent frames are at their true positions; the anchor stands directly before them
    frames = list(range(anchor)) + recent
    return [(frame, i - len(frames)) for i, frame in enumerate(frames)]


def attended_clean(start: int, *, chunk: int = 3, attention: int = 21) -> list[tuple[int, int]]:
    """(frame, position) that the clean pass of a chunk attends to: the last frames at true positions, no anchor."""
    return [(frame, frame - start) for frame in range(start) if frame >= start + chunk - attention]


def cached(start: int, *, chunk: int = 3, capacity: int = 24, anchor: int = 3) -> list[int]:
    """Past frames that upstream's cache still holds while the chunk at `start` is the first of the window."""
    past = list(range(start))
    return past[:anchor] + past[anchor:][-(capacity - anchor - chunk) :]


def rolling_rollout(
    denoise: Denoise,
    clean: Clean,
    noise: np.ndarray,
    renoise: np.ndarray,
    *,
    steps: tuple[int, ...] = STEPS,
    shift: float = SHIFT,
    chunk: int = 3,
    attention: int = 21,
    anchor: int = 3,
) -> tuple[np.ndarray, dict[int, Any]]:
    """The whole video and the memory of every frame.

    noise [frames, ...]: where each chunk starts. renoise [chunks, steps - 1, chunk, ...]: the fresh noise that takes a
    chunk from its step i to step i + 1.
    """
    sigma = noise_levels(steps, shift)
    window, chunks = len(steps), len(noise) // chunk
    noisy = {c: noise[c * chunk : (c + 1) * chunk].astype(np.float64) for c in range(chunks)}
    done: dict[int, np.ndarray] = {}
    memory: dict[int, Any] = {}

    for iteration, (members, step_of) in enumerate(schedule(chunks, window)):
        pairs = attended(iteration, chunks, window, chunk=chunk, attention=attention, anchor=anchor)
        latents = np.concatenate([noisy[c] for c in members])
        timesteps = np.array([1000 * sigma[i] for i in step_of for _ in range(chunk)], np.float32)
        flow = denoise(latents, timesteps, [Remembered(f, p, memory[f]) for f, p in pairs])
        for place, (c, i) in enumerate(zip(members, step_of, strict=True)):
            own = slice(place * chunk, (place + 1) * chunk)
            x0 = latents[own] - sigma[i] * flow[own]
            if i < window - 1:
                noisy[c] = (1 - sigma[i + 1]) * x0 + sigma[i + 1] * renoise[c, i]
            else:
                done[c] = x0

        first = members[0]
        if first not in done:  # upstream makes a clean pass here too; nothing ever reads what it stores
            continue
        start = first * chunk
        pairs = attended_clean(start, chunk=chunk, attention=attention)
        entries = clean(done[first], np.zeros(chunk, np.float32), [Remembered(f, p, memory[f]) for f, p in pairs])
        memory.update({start + offset: entry for offset, entry in enumerate(entries)})

    return np.concatenate([done[c] for c in range(chunks)]), memory
