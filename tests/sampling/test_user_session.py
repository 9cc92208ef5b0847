"""What users do outside the test runner's type checks: 64-bit mode, lists, numpy arrays and honest mistakes."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import rfjax
from rfjax.commands.plan import SHIPPED

SESSION = """
import sys
import jax, numpy as np, rfjax

model = rfjax.load(sys.argv[1])
embeds = np.asarray(rfjax.encode_prompt(model, ["waves"]))
policy = rfjax.memory.create("relax_forcing")
key = jax.random.key(1)
latents = rfjax.rollout(model, policy, embeds, (1, 12, 4, 6, 8), key=key).latents
chunks = [chunk.latents for chunk in rfjax.stream(model, policy, embeds, (1, 12, 4, 6, 8), key=key)]
assert latents.dtype == "float32" and np.array_equal(np.concatenate(chunks, 1), latents)
assert rfjax.decode(model, np.asarray(latents, np.float64)).dtype == "float32"
np.save(sys.argv[2], latents)

for call in (
    lambda: rfjax.rollout(model, policy, embeds, (1, 12, 4, 6, 8), key=0),
    lambda: rfjax.rollout(model, policy, embeds[0], (1, 12, 4, 6, 8), key=key),
    lambda: rfjax.rollout(model, policy, embeds, [1, 12, 4, 6, 8], key=key),
    lambda: rfjax.encode_prompt(model, "waves"),
):
    try:
        call()
    except rfjax.UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_64_bit_mode_gives_the_same_video_and_mistakes_are_named(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SESSION, str(SHIPPED), str(tmp_path / "latents.npy")],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    model = rfjax.load(SHIPPED)
    embeds = rfjax.encode_prompt(model, ["waves"])
    policy = rfjax.memory.create("relax_forcing")
    want = rfjax.rollout(model, policy, embeds, (1, 12, 4, 6, 8), key=jax.random.key(1)).latents
    np.testing.assert_allclose(np.load(tmp_path / "latents.npy"), want, atol=1e-4)
    key, embeds_shape, shape, prompt = run.stdout.splitlines()
    assert key == "key is 0; one of JAX is needed, such as jax.random.key(0)"
    assert embeds_shape == "prompt_embeds has shape (32, 96); [B, tokens, 96] is needed"
    assert shape == "noise is a list; an array [B, F, H, W, 8], or that shape as a tuple, is needed"
    assert "list of prompts" in prompt
