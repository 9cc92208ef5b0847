"""The places of a batch under the rolling sampler, in the form of `rfjax.sampling.batch.Batch`."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from rfjax.memory import MemoryPolicy
from rfjax.models.model import Model
from rfjax.sampling.batch import Occupant, Piece
from rfjax.sampling.pipeline import VideoChunk, decode_stream
from rfjax.sampling.rolling import stream


@dataclasses.dataclass(frozen=True)
class Fetched:
    """One chunk of every place, on the host."""

    chunk: VideoChunk

    def fetch(self) -> list[Piece]:
        """Return every place's chunk."""
        return [
            Piece(frames, jax.tree.map(lambda a, place=place: a[place : place + 1], self.chunk.trace), True)
            for place, frames in enumerate(self.chunk.frames)
        ]


class RollingBatch:
    """Places whose videos all have one length and begin together, since their chunks overlap in the network."""

    state = None
    """What passes from chunk to chunk cannot be kept."""

    def __init__(self, model: Model, policy: MemoryPolicy, shape: tuple[int, ...]):
        """Take the model, the policy and the shape [B, F, H, W, C] of all latents; nothing is computed yet."""
        self._model, self._policy, self._shape = model, policy, shape
        self._chunks: Iterator[VideoChunk] = iter(())

    def admit(self, occupants: dict[int, Occupant]) -> None:
        """Begin videos in all places; those that are not given repeat one that is.

        Raises:
            UserError: sizes that do not fit the model, or no autoencoder.
        """
        if not occupants:
            return
        one = next(iter(occupants.values()))
        seated = [occupants.get(place, one) for place in range(self._shape[0])]
        embeds = jnp.concatenate([jnp.asarray(video.prompt_embeds) for video in seated])
        keys = jnp.stack([video.key for video in seated])
        chunks = stream(self._model, self._policy, embeds, self._shape, key=keys)
        self._chunks = decode_stream(self._model, chunks, self._shape)

    def step(self) -> Fetched:
        """Return the next chunk of every place.

        Raises:
            NotFiniteError: latents are no longer finite.
        """
        return Fetched(next(self._chunks))
