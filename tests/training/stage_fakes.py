"""A network whose answers are known, in place of the transformer in a stage."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass
class FakeNetwork:
    """Answers with `flow(noisy, timestep)`, and keeps what it was asked."""

    flow: Callable[[jax.Array, jax.Array], jax.Array]
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)

    def embed_text(self, prompt_embeds):
        return prompt_embeds

    def __call__(self, noisy, timestep, text, **settings):
        self.asked = {"noisy": noisy, "timestep": timestep, "text": text, **settings}
        return self.flow(noisy, timestep), None

    def replace_in(self, module, monkeypatch) -> "FakeNetwork":
        monkeypatch.setattr(module, "bind", lambda network, config, params: self)
        return self
