"""Videos made together that stand at different chunks: a place that becomes free takes the next video.

The index of a chunk is a traced value of each sample, so that a video of any length begins in any place without another
compilation, and without the other places' notice.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from rfjax.memory import MemoryPolicy, Trace
from rfjax.models.functional import AnyArray
from rfjax.models.model import Model
from rfjax.models.transformer import TextContext
from rfjax.models.vae import DecoderCache
from rfjax.parallel.division import check_tokens, sequence_of
from rfjax.parallel.samples import check_samples, divided, select, spread
from rfjax.pytree import pytree
from rfjax.sampling.pipeline import decode_chunk, decode_mixed, new_decoder
from rfjax.sampling.request import ChunkNoise, check_memory, request_of, spread_noise
from rfjax.sampling.rollout import begin, encode_text, step, switched
from rfjax.sampling.state import TEXT_AXIS, RolloutState, empty_state, memory_shape, state_axes, state_sample_axes
from rfjax.sampling.switching import Switch


@pytree()
@dataclasses.dataclass(frozen=True)
class BatchState:
    """Everything on the devices that passes from one chunk of a batch to the next."""

    text: TextContext
    """Of the prompt in each place."""
    rollout: RolloutState
    """Each place's memory, and where it stands in its video."""
    decoder: DecoderCache
    """What the autoencoder remembers of each video."""


@dataclasses.dataclass(frozen=True)
class Occupant:
    """A video in its place."""

    prompt_embeds: Float[AnyArray, "1 T D"]
    """From `rfjax.encode_prompt`."""
    key: Key[Array, ""]
    """Of all its noise."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One chunk of one video, on the host."""

    frames: UInt8[np.ndarray, "T H W 3"]
    """RGB; the first chunk has fewer, since a video's first latent frame is a single video frame."""
    trace: Trace
    """What the chunk attended; its axis of samples has length 1."""
    finite: bool
    """Whether every latent is a number. Where not, the frames mean nothing."""


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """One chunk of every place, on which the devices may still be working."""

    begins: Bool[np.ndarray, "B"]
    """Where it is the first of its video."""
    finite: Bool[Array, "B"]
    trace: Trace
    single: UInt8[Array, "B 1 H W 3"] | None
    """The first frames of the videos that begin, if any does."""
    groups: list[UInt8[Array, "B _ H W 3"]]
    """The frames of every latent frame that is not the first of its video everywhere."""

    def fetch(self) -> list[Piece]:
        """Wait for it, and copy every place's chunk to the host."""
        finite, trace = np.asarray(self.finite), jax.device_get(self.trace)
        single = None if self.single is None else np.asarray(self.single)
        groups = [np.asarray(group) for group in self.groups]

        def frames(place: int) -> UInt8[np.ndarray, "T H W 3"]:
            own = [group[place] for group in groups]
            if single is None or not self.begins[place]:
                return np.concatenate(own)
            return np.concatenate([single[place], *(own if self.begins.all() else own[1:])])

        def piece(place: int) -> Piece:
            own = jax.tree.map(lambda a: a[place : place + 1], trace)
            return Piece(frames(place), own, bool(finite[place]))

        return [piece(place) for place in range(len(finite))]


class Batch:
    """A fixed number of places, each with a video that stands at a chunk of its own.

    A place whose video has ended is computed all the same until it takes another; what comes of it is to be ignored.
    """

    def __init__(
        self,
        model: Model,
        policy: MemoryPolicy,
        shape: tuple[int, ...],
        switches: Sequence[Switch] = (),
    ):
        """Check the sizes; nothing is computed before videos are admitted.

        Args:
            model: from `rfjax.load`, with its autoencoder.
            policy: from `rfjax.memory.create`.
            shape: [B, F, H, W, C] of latents, B places and F frames of the longest video.
            switches: changes of prompt in all videos, with embeddings of B samples; all places then begin together.

        Raises:
            UserError: sizes that do not fit the model, or places that do not divide among its devices.
        """
        network, places = model.config.transformer, shape[0]
        check_samples(places, model.mesh)
        self._embeds = jnp.zeros((places, network.text_len, network.text_dim), jnp.float32)
        keys = jax.vmap(jax.random.key)(jnp.zeros(places, jnp.uint32))
        self._model, self._policy, self._switches = model, policy, tuple(switches)
        self._sizes, self._noise = request_of(model.config, self._embeds, shape, None, keys, None, self._switches)
        check_memory(model, policy, self._sizes)
        check_tokens(network, self._sizes.frame_size, sequence_of(model.mesh))
        self._chunks = np.zeros(places, int)
        self.state: BatchState | None = None
        """None before the first videos."""

    def admit(self, occupants: dict[int, Occupant]) -> None:
        """Begin videos in the given places, whatever stood there before; the others go on."""
        self._seat(occupants)
        new = np.zeros(len(self._chunks), bool)
        new[list(occupants)] = True
        self._chunks[new] = 0
        if self.state is None:
            self.state = self._fresh()
        elif new.any():
            model, mesh = self._model, self._model.mesh
            static = model.config, self._sizes, jnp.dtype(model.dtype)
            embeds, which = (spread(a, mesh) for a in (self._embeds, jnp.asarray(new)))
            rollout, decoder = _emptied(*static, self._policy, which, self.state.rollout, self.state.decoder, mesh)
            self.state = BatchState(_text(model.config, model.transformer, embeds, mesh), rollout, decoder)

    def restore(self, occupants: dict[int, Occupant], chunks: Sequence[int], state: BatchState) -> None:
        """Go on with a state that was kept, as that batch would have.

        Args:
            occupants: the videos that go on.
            chunks: index of the chunk to come in every place, also of a video that does not go on.
            state: of a batch of the same sizes.
        """
        self._seat(occupants)
        self._chunks[:] = chunks
        self.state = state

    def state_like(self) -> Any:
        """Return shapes, types and shardings of the state, for a checkpoint; they are those of a state made here."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self._fresh())

    def step(self) -> Dispatched:
        """Dispatch the next chunk of every place and its decoding; nothing is waited for."""
        assert self.state is not None
        model, state, begins = self._model, self.state, self._chunks == 0
        text, rollout = state.text, state.rollout
        for switch in self._switches:
            if self._sizes.chunk_at(switch.start) == self._chunks[0]:
                text, rollout = switched(model, self._policy, self._sizes, switch, rollout)
        shared = model.config, self._sizes.frame_size, self._policy, model.transformer
        rollout, chunk = step(*shared, text, rollout, spread_noise(self._noise, model.mesh), model.mesh)
        decoder, single, groups = self._decode(state.decoder, chunk.latents, begins)
        self.state = BatchState(text, rollout, decoder)
        self._chunks += 1
        return Dispatched(begins, chunk.finite, chunk.trace, single, groups)

    def _decode(self, cache, latents, begins):
        if begins.all() or not begins.any():
            cache, parts = decode_chunk(self._model, cache, latents, first=bool(begins.all()))
            return (cache, parts[0], parts[1:]) if begins.all() else (cache, None, parts)
        cache, single, group = decode_mixed(self._model, cache, latents[:, :1], begins)
        cache, groups = decode_chunk(self._model, cache, latents[:, 1:], first=False)
        return cache, single, [group, *groups]

    def _seat(self, occupants: dict[int, Occupant]) -> None:
        keys = self._noise.keys
        assert keys is not None
        for place, video in occupants.items():
            missing = self._embeds.shape[1] - video.prompt_embeds.shape[1]
            embeds = jnp.pad(jnp.asarray(video.prompt_embeds[0]), ((0, missing), (0, 0)))
            self._embeds = self._embeds.astype(embeds.dtype).at[place].set(embeds)
            keys = keys.at[place].set(video.key)
        self._noise = ChunkNoise(keys, None, None)

    def _fresh(self) -> BatchState:
        model, sizes = self._model, self._sizes
        _, rollout = begin(model, self._policy, self._embeds, sizes)
        # By the same program as later, so that a text's numbers do not tell when its video began.
        text = _text(model.config, model.transformer, spread(self._embeds, model.mesh), model.mesh)
        return BatchState(text, rollout, new_decoder(model, len(self._chunks), sizes.frame_size))


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _text(config, params, prompt_embeds, mesh=None):
    return divided(functools.partial(encode_text, config), mesh, (None, 0), TEXT_AXIS)(params, prompt_embeds)


@functools.partial(
    jax.jit, static_argnames=("config", "sizes", "dtype", "mesh"), donate_argnames=("rollout", "decoder")
)
def _emptied(config, sizes, dtype, policy, which, rollout, decoder, mesh=None):
    """Empty the memories of some places, without a second copy of the others."""
    every = state_sample_axes(config, sizes.frame_size, policy)

    def empty(policy, which, rollout, decoder):
        shape = memory_shape(config, which.shape[0], sizes.frame_size)
        new = empty_state(policy, shape, sizes.video_frames, dtype, sizes.generated[2:], sizes.recent_frames)
        nothing = jax.tree.map(jnp.zeros_like, decoder)
        return select(which, new, rollout, every), select(which, nothing, decoder)

    states = state_axes(mesh, config, sizes.frame_size, policy)
    return divided(empty, mesh, (None, 0, states, 0), (states, 0))(policy, which, rollout, decoder)
