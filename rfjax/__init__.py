"""Minute-long video from causal diffusion transformers: Relax Forcing and the memories beside it, compiled.

model = rfjax.load("checkpoint")
policy = rfjax.memory.create("relax_forcing")
prompt_embeds = rfjax.encode_prompt(model, ["a red fox runs through fresh snow"])
result = rfjax.rollout(model, policy, prompt_embeds, (1, 240, 60, 104, 16), key=jax.random.key(0))
video = rfjax.decode(model, result.latents)
"""

from rfjax import memory
from rfjax.errors import UserError
from rfjax.io.checkpoints import load
from rfjax.models.model import Model
from rfjax.sampling.codec import decode, encode, encode_prompt, encode_tokens
from rfjax.sampling.rollout import Chunk, Rollout, rollout, stream

__all__ = [
    "Chunk",
    "Model",
    "Rollout",
    "UserError",
    "decode",
    "encode",
    "encode_prompt",
    "encode_tokens",
    "load",
    "memory",
    "rollout",
    "stream",
]
