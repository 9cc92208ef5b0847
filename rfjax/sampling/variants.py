"""Several policies at once: variants that differ in numbers alone, as one batch of the same program."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from rfjax.errors import UserError
from rfjax.memory import CleanChunk, MemoryPolicy, MemoryShape, View
from rfjax.models.functional import AnyArray
from rfjax.models.model import Model
from rfjax.pytree import pytree
from rfjax.sampling.request import sample_keys
from rfjax.sampling.rollout import Chunk, stream


def stream_variants(
    model: Model,
    policies: Sequence[MemoryPolicy],
    prompt_embeds: Float[AnyArray, "B T D"],
    noise: tuple[int, ...],
    key: Array,
) -> Iterator[Chunk]:
    """Generate the same B videos under each of V policies, chunk by chunk, as V * B samples.

    The samples are in the order of the policies, and each is, to rounding, what `rfjax.stream` gives for its policy
    with the same prompts, noise and key. Other numbers in the policies do not compile again.

    Args:
        model: from `rfjax.load`.
        policies: of one class and with the same settings, those that are floats aside.
        prompt_embeds: one prompt a sample, as for `rfjax.stream`.
        noise: the shape [B, F, H, W, C] of the latents of one policy.
        key: one key, or an array of B keys, one a sample.

    Raises:
        UserError: policies that differ in more than numbers, or shapes that do not fit the model or each other.
    """
    policy, count = stack_policies(policies), len(policies)
    embeds = jnp.concatenate([jnp.asarray(prompt_embeds)] * count)
    keys = jnp.concatenate([sample_keys(key, noise[0])] * count)
    return stream(model, policy, embeds, (count * noise[0], *noise[1:]), key=keys)


def stack_policies(policies: Sequence[MemoryPolicy]) -> MemoryPolicy:
    """Return one policy for a batch of V * B samples, of which each V-th part follows its own; a single one as it is.

    Raises:
        UserError: there is none, or they differ in more than numbers.
    """
    if not policies:
        raise UserError("policies is empty; at least one is needed")
    for policy in policies:
        if jax.tree.structure(policy) != jax.tree.structure(policies[0]):
            raise UserError(
                f"policies has {policies[0]} and {policy}; they may differ in settings that are floats only"
            )
    if len(policies) == 1:
        return policies[0]
    # Stacked Python numbers stay weakly typed, so that a bfloat16 memory stays one.
    stacked = jax.tree.map(lambda *numbers: jnp.stack([jnp.asarray(number) for number in numbers]), *policies)
    return StackedPolicies(stacked, len(policies))


@pytree(static=["count"])
@dataclasses.dataclass(frozen=True)
class StackedPolicies:
    """V policies side by side. The network sees their samples as one batch; only the policies' own work is vmapped."""

    policies: Any
    """A policy whose numbers have a first axis [V]."""
    count: int
    """V."""

    name: ClassVar[str] = "variants"

    def init(self, shape: MemoryShape, video_frames: int, dtype: DTypeLike) -> Any:
        """Return the empty states, on a first axis [V].

        Raises:
            UserError: as those of the policies.
        """
        own = dataclasses.replace(shape, batch=shape.batch // self.count)
        return jax.vmap(lambda policy: policy.init(own, video_frames, dtype), axis_size=self.count)(self.policies)

    def read(self, state: Any, start: Int[Array, "B"]) -> View:
        """Gather what the samples of each policy attend to."""

        def own(policy, state, start):
            view = policy.read(state, start)
            return view.keys, view.values, view.positions, view.places, view.length, view.trace

        axes = (1, 1, 1, 1, 0, 0)
        parts = jax.vmap(own, out_axes=axes)(self.policies, state, self._apart(start, 0))
        return View(
            *(jax.tree.map(lambda a, axis=axis: _joined(a, axis), p) for p, axis in zip(parts, axes, strict=True))
        )

    def commit(self, state: Any, chunk: CleanChunk) -> Any:
        """Add the finished chunks."""
        return self._each("commit", state, chunk)

    def recache(self, state: Any, frames: CleanChunk) -> Any:
        """Renew the given frames."""
        return self._each("recache", state, frames)

    def _each(self, function: str, state: Any, chunk: CleanChunk) -> Any:
        """Let each policy do something with its own samples."""

        def own(policy, state, *chunk):
            return getattr(policy, function)(state, CleanChunk(*chunk))

        axes = (0, 1, 1, 1)
        arrays = (chunk.frames, chunk.queries, chunk.keys, chunk.values)
        parts = [self._apart(array, axis) for array, axis in zip(arrays, axes, strict=True)]
        return jax.vmap(own, in_axes=(0, 0, *axes))(self.policies, state, *parts)

    def _apart(self, array: Array, axis: int) -> Array:
        """Split the axis of samples into one of policies and one of their samples."""
        own = array.shape[axis] // self.count
        return array.reshape(*array.shape[:axis], self.count, own, *array.shape[axis + 1 :])


def _joined(array: Array, axis: int) -> Array:
    """Make one axis of those of policies and samples."""
    samples = array.shape[axis] * array.shape[axis + 1]
    return array.reshape(*array.shape[:axis], samples, *array.shape[axis + 2 :])
