"""Deep Forcing: a deep sink, and a middle compressed to its most attended tokens (arXiv 2512.05081).

Source: cvlab-kaist/DeepForcing at ea9961a, `wan/modules/causal_model.py` and, without compression,
`wan/modules/causal_model_DS.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from rfjax.errors import UserError
from rfjax.memory.base import HISTORY, NONE, SINK, TAIL, CleanChunk, MemoryShape, Trace, View
from rfjax.memory.frames import FOREVER, Choice, FramePolicy, Stored, plain_choice, slots_of, write
from rfjax.memory.registry import register
from rfjax.memory.window import roles_of
from rfjax.pytree import pytree
from rfjax.rope import rotate, rotation


@pytree()
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which tokens lie in K slots of the memory, for each layer and sample."""

    frames: Int[Array, "L B K T"]
    """Frame that each token was generated in, -1 where there is none."""
    places: Int[Array, "L B K T"]
    """Its place in that frame, row by row."""
    selections: Int[Array, "L B K T"]
    """How many compressions have selected it."""


@pytree(static=["shape"])
@dataclasses.dataclass(frozen=True)
class TokenStore:
    """The sink, then the selected tokens, then whole frames in time order; full slots first."""

    keys: Float[Array, "L B N T C"]
    """Keys after the norm, before the rotary embedding."""
    values: Float[Array, "L B N T C"]
    start: Int[Array, "B"]
    """First frame of the chunk to come, which says what all slots hold but those of selected tokens."""
    selected: Tokens
    """What the last compression selected, in the order of frames and places."""
    queries: Float[Array, "L B R C"]
    """Queries of the newest frames, summed over tokens that were turned by row and column, but not by time."""
    shape: MemoryShape
    """Static sizes that the store was made for."""


@register("deep_forcing")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepForcing:
    """Let the memory grow; when the next chunk would not fit, compress what lies between sink and newest frames.

    A compression keeps the tokens of the middle that took most part in attention: the highest sums, over the queries
    of the newest `recent_frames` frames and over all heads, of query times key after the rotary embedding, in each
    layer. They stay where they truly were in time, row and column, and so do the newest frames. The sink is moved to
    begin `budget_frames` before the next chunk, and stays there until the next compression. With the defaults a chunk
    attends to 16 and 19 frames in turn, its own included.

    **This is a variant.** The public code compresses in each layer of a chunk's first denoising pass and counts that
    pass's own noisy queries among the newest. A policy decides before it sees the chunk: here the middle is compressed
    when the chunk before is committed, with the clean queries of the newest `recent_frames` frames until then. What is
    a candidate, how many are selected, when, and all positions are as published.

    The public code's rounding is not followed: scores are float32, and of equal ones the older token is taken.
    """

    buffer_frames: int = 21
    """The most frames to attend, own chunk included; a chunk that would exceed them makes the memory compress."""
    budget_frames: int = 16
    """Frames, or as many tokens, that a compression leaves, own chunk included."""
    sink_frames: int = 10
    """First frames of the video, always kept."""
    recent_frames: int = 4
    """Newest frames, own chunk included, which a compression keeps whole."""
    max_selections: int = 7
    """How often a token may be selected, the next compression drops it; 0 sets no limit."""

    def __post_init__(self):
        for name, least in (("sink_frames", 0), ("recent_frames", 1), ("max_selections", 0)):
            if getattr(self, name) < least:
                raise UserError(f"deep_forcing: {name} is {getattr(self, name)}; {least} or more is needed")
        if not self.sink_frames + self.recent_frames <= self.budget_frames:
            raise UserError(
                f"deep_forcing: budget_frames is {self.budget_frames}; sink_frames {self.sink_frames} and "
                f"recent_frames {self.recent_frames} need at least {self.sink_frames + self.recent_frames}"
            )
        if self.buffer_frames < self.budget_frames:
            raise UserError(
                f"deep_forcing: buffer_frames is {self.buffer_frames}; "
                f"budget_frames {self.budget_frames} need at least as many"
            )

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> TokenStore:
        """Return an empty store of `buffer_frames` without the own chunk.

        Raises:
            UserError: the settings do not fit the frames of a chunk.
        """
        self._check(shape.chunk_frames)
        slots, kept = self.buffer_frames - shape.chunk_frames, self.recent_frames - shape.chunk_frames
        channels = shape.heads * shape.head_dim
        kv = (shape.layers, shape.batch, slots, shape.frame_tokens, channels)
        middle = (*kv[:2], self._selected_frames, shape.frame_tokens)
        return TokenStore(
            keys=jnp.zeros(kv, dtype),
            values=jnp.zeros(kv, dtype),
            start=jnp.zeros(shape.batch, jnp.int32),
            selected=Tokens(*(jnp.full(middle, first, jnp.int32) for first in (-1, 0, 0))),
            queries=jnp.zeros((*kv[:2], kept, channels), jnp.float32),
            shape=shape,
        )

    def read(self, state: TokenStore, start: Int[Array, "B"]) -> View:
        """Attend to all that is stored: the store itself is the view.

        The trace tells selected tokens by their role, HISTORY; candidates, thousands a layer, are not in it.
        """
        start = start.astype(jnp.int32)
        tokens = self._tokens(state, start)
        compressed, since = self._age(start, state.shape.chunk_frames)
        slots = jnp.arange(tokens.frames.shape[2], dtype=jnp.int32)
        in_sink = slots < self.sink_frames
        moved = slots - self.budget_frames - since[:, None]
        positions = jnp.where(
            (compressed[:, None] & in_sink)[None, :, :, None],
            moved[None, :, :, None],
            tokens.frames - start[None, :, None, None],
        )
        chosen = compressed[:, None] & (slots < self._middle.stop)
        roles = jnp.where(in_sink, SINK, jnp.where(chosen, HISTORY, TAIL)).astype(jnp.int32)
        frames = jnp.moveaxis(tokens.frames, 0, 1)
        nothing = jnp.zeros((*frames.shape[:2], 0), jnp.int32)
        trace = Trace(
            frames=frames,
            positions=jnp.moveaxis(positions, 0, 1),
            roles=jnp.where(frames < 0, NONE, roles[:, None, :, None]),
            selected_frames=nothing,
            candidates=nothing,
            scores=nothing.astype(jnp.float32),
        )
        length = self._stored(start, state.shape.chunk_frames)
        return View(state.keys, state.values, positions, tokens.places, length, trace)

    def commit(self, state: TokenStore, chunk: CleanChunk) -> TokenStore:
        """Store the chunk, and compress for those samples whose next chunk would not fit."""
        count = state.shape.chunk_frames
        following = (chunk.frames[:, 0] + count).astype(jnp.int32)
        compressed, since = self._age(following, count)
        due = compressed & (since == 0)
        queries = jnp.concatenate([state.queries, _frame_sums(chunk.queries, state.shape)], axis=2)
        state = jax.lax.cond(
            due.any(), lambda state: self._compress(state, chunk, queries, due), lambda state: state, state
        )
        state = self._put_frames(state, following, chunk)
        return dataclasses.replace(state, start=following, queries=queries[:, :, count:])

    def recache(self, state: TokenStore, frames: CleanChunk) -> TokenStore:
        """Renew the given frames where they are stored, selected tokens of theirs and the kept queries included."""
        given = frames.frames
        token_frames = _flat(state.selected.frames)
        which = slots_of(jnp.broadcast_to(given, (*token_frames.shape[:2], given.shape[1])), token_frames)
        tokens = which * state.shape.frame_tokens + _flat(state.selected.places)

        def renew(store, new):
            old = store[:, :, self._middle]
            return jnp.where((which < given.shape[1])[..., None], _gather(new, tokens), _flat(old)).reshape(old.shape)

        compressed, _ = self._age(state.start, state.shape.chunk_frames)
        renewed = renew(state.keys, frames.keys), renew(state.values, frames.values)
        state = self._put_tokens(state, compressed, *renewed)

        newest = state.start[:, None] + jnp.arange(-state.queries.shape[2], 0)
        which = slots_of(given, newest)[None, :, :, None]
        sums = jnp.take_along_axis(_frame_sums(frames.queries, state.shape), which, axis=2, mode="clip")
        state = dataclasses.replace(state, queries=jnp.where(which < given.shape[1], sums, state.queries))
        return self._put_frames(state, state.start, frames)

    @property
    def _selected_frames(self) -> int:
        """How many frames' worth of tokens a compression selects."""
        return self.budget_frames - self.sink_frames - self.recent_frames

    @property
    def _middle(self) -> slice:
        """Slots of selected tokens, once there are any."""
        return slice(self.sink_frames, self.sink_frames + self._selected_frames)

    def _check(self, chunk: int) -> None:
        """Raise UserError where the settings do not fit the frames of a chunk."""
        _check_buffer("deep_forcing", self.buffer_frames, chunk)
        if not chunk <= self.recent_frames <= 2 * chunk:
            raise UserError(
                f"deep_forcing: recent_frames is {self.recent_frames}; {chunk} (the frames of a chunk) to "
                f"{2 * chunk} are possible"
            )
        # At worst no token of an earlier selection may be selected again.
        if self.max_selections and self._selected_frames > self._period(chunk):
            raise UserError(
                f"deep_forcing: budget_frames is {self.budget_frames}; beside sink_frames {self.sink_frames} and "
                f"recent_frames {self.recent_frames} these are {self._selected_frames} frames of selected tokens, "
                f"and at most {self._period(chunk)} (the new frames at each compression) fit max_selections "
                f"{self.max_selections}; 0 sets no limit"
            )

    def _period(self, chunk: int) -> int:
        """Frames from one compression to the next."""
        return chunk * ((self.buffer_frames - self.budget_frames) // chunk + 1)

    def _age(self, start: Int[Array, "B"], chunk: int) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
        """Whether the memory of the chunk at `start` has been compressed yet, and how many frames before it."""
        return start >= self.buffer_frames, (start - self.buffer_frames) % self._period(chunk)

    def _stored(self, start: Int[Array, "B"], chunk: int) -> Int[Array, "B"]:
        """Full slots when the chunk at `start` is to come."""
        compressed, since = self._age(start, chunk)
        return jnp.where(compressed, self.budget_frames - chunk + since, start)

    def _whole(self, start: Int[Array, "B"], shape: MemoryShape) -> Int[Array, "B N"]:
        """Frame that lies whole in each slot when the chunk at `start` is to come, -1 for none."""
        compressed, since = (entry[:, None] for entry in self._age(start, shape.chunk_frames))
        slots = jnp.arange(self.buffer_frames - shape.chunk_frames, dtype=jnp.int32)
        later = slots + start[:, None] - since - (self.budget_frames - shape.chunk_frames)
        later = jnp.where(slots < self._middle.stop, -1, later)
        frames = jnp.where(compressed & (slots >= self.sink_frames), later, slots)
        return jnp.where(slots < self._stored(start, shape.chunk_frames)[:, None], frames, -1)

    def _tokens(self, state: TokenStore, start: Int[Array, "B"]) -> Tokens:
        """What lies in all slots when the chunk at `start` is to come."""
        shape = (*state.keys.shape[:3], state.shape.frame_tokens)
        whole = Tokens(
            jnp.broadcast_to(self._whole(start, state.shape)[None, :, :, None], shape),
            jnp.broadcast_to(jnp.arange(shape[3], dtype=jnp.int32), shape),
            jnp.zeros(shape, jnp.int32),
        )
        compressed, _ = self._age(start, state.shape.chunk_frames)

        def fill(whole, selected):
            middle = jnp.where(_each(compressed), selected, whole[:, :, self._middle])
            around = whole[:, :, : self._middle.start], whole[:, :, self._middle.stop :]
            return jnp.concatenate([around[0], middle, around[1]], axis=2)

        return jax.tree.map(fill, whole, state.selected)

    def _compress(
        self, state: TokenStore, chunk: CleanChunk, queries: Float[Array, "L B R C"], due: Bool[Array, "B"]
    ) -> TokenStore:
        """Put the best tokens behind the sink, for the samples that are due.

        Candidates are all tokens stored behind the sink, and those of the chunk's frames that will not be kept whole.
        """
        shape, start = state.shape, chunk.frames[:, 0].astype(jnp.int32)
        stored = jax.tree.map(lambda leaf: leaf[:, :, self.sink_frames :], self._tokens(state, start))
        own_frames = 2 * shape.chunk_frames - self.recent_frames
        zeros = jnp.zeros((*state.keys.shape[:2], own_frames, shape.frame_tokens), jnp.int32)
        own = Tokens(
            zeros + chunk.frames[None, :, :own_frames, None].astype(jnp.int32),
            zeros + jnp.arange(shape.frame_tokens, dtype=jnp.int32),
            zeros,
        )
        query = _turned_total(queries, shape)

        def score(layer):
            # The barrier keeps XLA from taking a float32 copy of all bfloat16 layers out of the loop, as on a CPU.
            old, new, layer = jax.lax.optimization_barrier((state.keys, chunk.keys, layer))
            parts = (old[layer, :, self.sink_frames :], stored), (new[layer, :, :own_frames], own)
            scores = [
                _participation(
                    query[layer], keys, tokens.frames[layer] - start[:, None, None], tokens.places[layer], shape
                )
                for keys, tokens in parts
            ]
            return jnp.concatenate(scores, axis=1)

        # One layer at a time, so that at most one layer's candidates are in float32.
        scores = jax.lax.map(score, jnp.arange(shape.layers, dtype=jnp.int32))
        candidates = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), stored, own)
        best = self._best(candidates, scores)

        def choose(entries, old):
            return jnp.where(
                _each(due), jnp.take_along_axis(_flat(entries), best, axis=2, mode="clip").reshape(old.shape), old
            )

        candidates = dataclasses.replace(candidates, selections=candidates.selections + 1)
        selected = jax.tree.map(choose, candidates, state.selected)
        before, inside = self.sink_frames * shape.frame_tokens, _flat(stored.frames).shape[2]

        def gather(store, new):
            both = jnp.where((best < inside)[..., None], _gather(store, best + before), _gather(new, best - inside))
            return both.reshape(*selected.frames.shape, both.shape[-1])

        keys, values = gather(state.keys, chunk.keys), gather(state.values, chunk.values)
        return dataclasses.replace(self._put_tokens(state, due, keys, values), selected=selected)

    def _best(self, candidates: Tokens, scores: Float[Array, "L B S T"]) -> Int[Array, "L B M"]:
        """Numbers of the M best candidates that may be selected, in their own order; of equals the first ones."""
        allowed = candidates.frames >= 0
        if self.max_selections:
            allowed &= candidates.selections < self.max_selections
        count = self._selected_frames * scores.shape[3]
        return jnp.sort(jax.lax.top_k(_flat(jnp.where(allowed, scores, -jnp.inf)), count)[1], axis=2)

    def _put_tokens(
        self, state: TokenStore, samples: Bool[Array, "B"], keys: Float[Array, "L B K T C"], values
    ) -> TokenStore:
        """Store selected tokens of the given samples."""
        if not self._selected_frames:
            return state
        slots = jnp.arange(self._middle.start, self._middle.stop)
        return _put(state, keys, values, jnp.where(samples[:, None], slots, state.keys.shape[2]))

    def _put_frames(self, state: TokenStore, start: Int[Array, "B"], chunk: CleanChunk) -> TokenStore:
        """Store those of the given frames that are to lie whole in the memory of the chunk at `start`."""
        return _put(state, chunk.keys, chunk.values, slots_of(self._whole(start, state.shape), chunk.frames))


@register("deep_sink_only")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSinkOnly(FramePolicy):
    """Deep Forcing without its compression: a deep sink that is moved along, and the last frames where they truly are.

    Source: cvlab-kaist/DeepForcing at ea9961a, `wan/modules/causal_model_DS.py` (`--is_ds_only 1`).
    """

    buffer_frames: int = 21
    """Attended frames, own chunk included."""
    sink_frames: int = 10
    """First frames of the video, always kept; the authors recommend 10 to 14."""

    attends_store = True

    def __post_init__(self):
        if self.sink_frames < 0:
            raise UserError(f"deep_sink_only: sink_frames is {self.sink_frames}; 0 or more is needed")

    def capacity(self, shape: MemoryShape, video_frames: int) -> int:
        """All but the own chunk."""
        _check_buffer("deep_sink_only", self.buffer_frames, shape.chunk_frames)
        if self.buffer_frames < self.sink_frames + shape.chunk_frames:
            raise UserError(
                f"deep_sink_only: buffer_frames is {self.buffer_frames}; sink_frames {self.sink_frames} and the "
                f"chunk's {shape.chunk_frames} need at least {self.sink_frames + shape.chunk_frames}"
            )
        return self.buffer_frames - shape.chunk_frames

    def last_reader(self, frame: Int[Array, "*shape"], shape: MemoryShape) -> Int[Array, "*shape"]:
        """Sink frames stay; the others leave once as many later ones are stored as there is room beside the sink."""
        tail = self.buffer_frames - shape.chunk_frames - self.sink_frames
        return jnp.where(frame < self.sink_frames, FOREVER, frame + tail)

    def choose(self, stored: Stored, start: Int[Array, ""]) -> Choice:
        """Attend to all that is stored; from frame `buffer_frames` on the sink keeps its distance."""
        frames, sink = stored.frames, stored.frames < self.sink_frames
        positions = frames - jnp.where(sink, jnp.minimum(start, self.buffer_frames), start)
        return plain_choice(frames, positions, roles_of(frames, self.sink_frames))


def _check_buffer(policy: str, buffer: int, chunk: int) -> None:
    """Raise UserError unless the buffer holds whole chunks, one beside the own: then the first overflow fills it."""
    if buffer % chunk or buffer < 2 * chunk:
        raise UserError(
            f"{policy}: buffer_frames is {buffer}; a multiple of {chunk} (the frames of a chunk), at least "
            f"{2 * chunk}, is needed"
        )


def _put(
    state: TokenStore, keys: Float[Array, "L B n T C"], values: Float[Array, "L B n T C"], slots: Int[Array, "B n"]
) -> TokenStore:
    slots = slots[None]
    return dataclasses.replace(state, keys=write(state.keys, keys, slots), values=write(state.values, values, slots))


def _frame_sums(queries: Float[Array, "L B n T C"], shape: MemoryShape) -> Float[Array, "L B n C"]:
    """Sum each frame's queries over its tokens, turned by row and column; in float32.

    Rows and columns turn different pairs, so what each of them changes in the plain sum adds up, and whole rows and
    columns are summed before they are turned.
    """
    grid = queries.reshape(*queries.shape[:3], shape.rows, shape.columns, queries.shape[4])
    by_row, by_column = (jnp.sum(grid, axis=axis, dtype=jnp.float32) for axis in (4, 3))

    def turned(sums, rows, columns):
        angles = rotation(jnp.zeros((sums.shape[2], 1), jnp.int32), rows, columns, shape.head_dim)
        heads = sums.reshape(*sums.shape[:-1], shape.heads, shape.head_dim)
        return rotate(heads, *angles).reshape(sums.shape).sum(axis=3)

    return turned(by_row, shape.rows, 1) + turned(by_column, 1, shape.columns) - by_row.sum(axis=3)


def _turned_total(sums: Float[Array, "L B R C"], shape: MemoryShape) -> Float[Array, "L B C"]:
    """Sum of the queries of R frames that end with a chunk, turned by their time, counted from its first frame."""
    count = sums.shape[2]
    times = jnp.arange(shape.chunk_frames - count, shape.chunk_frames, dtype=jnp.int32)[None, None, :, None]
    turned = rotate(
        sums.reshape(*sums.shape[:3], 1, shape.heads, shape.head_dim), *rotation(times, 1, 1, shape.head_dim)
    )
    return turned.sum(axis=(2, 3)).reshape(*sums.shape[:2], sums.shape[3])


def _participation(
    query: Float[Array, "B C"],
    keys: Float[Array, "B S T C"],
    times: Int[Array, "B S T"],
    places: Int[Array, "B S T"],
    shape: MemoryShape,
) -> Float[Array, "B S T"]:
    """Product of a turned query with each key turned to its time and place; in float32.

    Heads share a token's angles, so the sum over heads comes first and only one head's worth of it is turned. The
    published score is this divided by sqrt(head_dim) * heads, which changes no order.
    """
    query_even, query_odd = _pairs(query[:, None, None], shape)
    even, odd = _pairs(keys, shape)
    along = (query_even * even + query_odd * odd).sum(axis=-2)
    across = (query_odd * even - query_even * odd).sum(axis=-2)
    cos, sin = rotation(times, shape.rows, shape.columns, shape.head_dim, places)
    return (along * cos[..., 0, :] + across * sin[..., 0, :]).sum(axis=-1)


def _pairs(
    x: Float[Array, "*A C"], shape: MemoryShape
) -> tuple[Float[Array, "*A H pairs"], Float[Array, "*A H pairs"]]:
    """Even and odd members of the pairs that the rotary embedding turns, in float32."""
    pairs = x.reshape(*x.shape[:-1], shape.heads, shape.head_dim // 2, 2).astype(jnp.float32)
    return pairs[..., 0], pairs[..., 1]


def _flat(x: Array) -> Array:
    """Join slots and tokens, [L, B, S, T, ...] to [L, B, S * T, ...]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _gather(store: Float[Array, "L B S T C"], tokens: Int[Array, "L B M"]) -> Float[Array, "L B M C"]:
    """Tokens by their number in the store, any for a number outside it.

    As whole numbers: XLA widens all of a bfloat16 store to float32 to gather from it on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(_flat(store), f"uint{8 * store.dtype.itemsize}")
    taken = jnp.take_along_axis(bits, tokens[..., None], axis=2, mode="clip")
    return jax.lax.bitcast_convert_type(taken, store.dtype)


def _each(sample: Bool[Array, "B"]) -> Bool[Array, "1 B 1 1"]:
    return sample[None, :, None, None]
