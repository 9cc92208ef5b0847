"""Minute-long video from causal diffusion transformers: Relax Forcing and the memories beside it, compiled.

model = rfjax.load("checkpoint")
policy = rfjax.memory.create("relax_forcing")
prompt_embeds = rfjax.encode_prompt(model, ["a red fox runs through fresh snow"])
result = rfjax.rollout(model, policy, prompt_embeds, (1, 240, 60, 104, 16), key=jax.random.key(0))
video = rfjax.decode(model, result.latents)
"""

import importlib
from typing import TYPE_CHECKING

from rfjax.errors import UserError

if TYPE_CHECKING:
    from rfjax import memory
    from rfjax.io.checkpoints import load
    from rfjax.models.model import Model
    from rfjax.parallel.division import make_mesh, parallelize
    from rfjax.sampling import rolling
    from rfjax.sampling.codec import decode, encode, encode_prompt, encode_tokens
    from rfjax.sampling.rollout import Chunk, Rollout, rollout, stream
    from rfjax.sampling.switching import Switch

__all__ = [
    "Chunk",
    "Model",
    "Rollout",
    "Switch",
    "UserError",
    "decode",
    "encode",
    "encode_prompt",
    "encode_tokens",
    "load",
    "make_mesh",
    "memory",
    "parallelize",
    "rolling",
    "rollout",
    "stream",
]

_HOMES = {
    **dict.fromkeys(("Chunk", "Rollout", "rollout", "stream"), "rfjax.sampling.rollout"),
    **dict.fromkeys(("decode", "encode", "encode_prompt", "encode_tokens"), "rfjax.sampling.codec"),
    "Model": "rfjax.models.model",
    **dict.fromkeys(("make_mesh", "parallelize"), "rfjax.parallel.division"),
    "Switch": "rfjax.sampling.switching",
    "load": "rfjax.io.checkpoints",
}

_MODULES = {"memory": "rfjax.memory", "rolling": "rfjax.sampling.rolling"}


def __getattr__(name: str):
    """Import a public name when it is first used, so that `rfjax --help` does not wait for JAX."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rfjax' has no attribute {name!r}")
