"""Device memory known in advance."""

import jax.numpy as jnp
import pytest

from rfjax.config import ModelConfig, TextEncoderConfig, VAEConfig
from rfjax.errors import UserError
from rfjax.memory import create
from rfjax.parallel.division import Sizes
from rfjax.sampling.budget import GB, VideoShape, check_fits, divide, estimate, host_limit, out_of_memory_says

WAN = ModelConfig(vae=VAEConfig(), umt5=TextEncoderConfig())
MINUTE = VideoShape(batch=1, latent_frames=240, latent_height=60, latent_width=104)


def test_wan_1_3b_has_the_published_parameters():
    budget = estimate(ModelConfig(), create("relax_forcing"), MINUTE, "bfloat16")
    assert budget.parameters == pytest.approx(1.419e9, rel=1e-3)
    assert budget.weights == 2 * budget.parameters
    assert estimate(WAN, create("relax_forcing"), MINUTE, "float32").parameters == pytest.approx(7.227e9, rel=1e-3)


def test_relax_forcing_does_not_grow_with_length_and_a_dense_memory_does():
    def of(policy, frames):
        video = VideoShape(1, frames, 60, 104)
        return estimate(ModelConfig(), create(policy), video, "bfloat16").total

    assert of("relax_forcing", 240) == of("relax_forcing", 2400)
    frame = 287.5e6
    assert of("self_forcing", 21 + 30) - of("self_forcing", 21) >= 30 * frame


def test_every_part_grows_with_the_batch_but_the_weights():
    one = estimate(WAN, create("relax_forcing"), MINUTE, "bfloat16")
    four = estimate(WAN, create("relax_forcing"), VideoShape(4, 240, 60, 104), "bfloat16")
    assert four.weights == one.weights
    assert four.memory == pytest.approx(4 * one.memory, rel=1e-6)
    assert 3 * one.working < four.working < 4 * one.working


@pytest.mark.parametrize(("sequence", "shares"), [(1, 1), (2, 2), (3, 1)])
def test_decoding_is_divided_where_the_columns_are(sequence, shares):
    budget = estimate(WAN, create("relax_forcing"), MINUTE, "bfloat16")
    each = divide(budget, Sizes(1, sequence, 1), MINUTE.latent_width)
    assert (each.denoising, each.decoding) == (budget.denoising // sequence, budget.decoding // shares)


def test_what_does_not_fit_says_how_much_is_needed():
    budget = estimate(WAN, create("relax_forcing"), MINUTE, "bfloat16")
    check_fits(budget, None)
    check_fits(budget, budget.total)
    with pytest.raises(UserError, match=rf"needs about {budget.total / GB:.1f} GB .* there are 24\.0 GB"):
        check_fits(budget, int(24 * GB))


def machine(root, **files: str):
    known = {"meminfo": "proc/meminfo", "own": "proc/self/cgroup"}
    for name, text in files.items():
        path = root / known.get(name, f"sys/fs/cgroup/{name}/memory.max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FREE = "MemTotal:       9000 kB\nMemAvailable:   4000 kB\n"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"meminfo": FREE}, 4000 * 1024),
        ({"meminfo": FREE, ".": "max\n"}, 4000 * 1024),
        ({"meminfo": FREE, ".": "1000\n"}, 1000),
        ({"meminfo": FREE, ".": "9000000000\n"}, 4000 * 1024),
        ({"meminfo": FREE, "own": "0::/job/step\n", "job": "2000\n", "job/step": "max\n"}, 2000),
        ({"meminfo": FREE, "own": "0::/job/step\n", "other": "2000\n"}, 4000 * 1024),
    ],
)
def test_host_memory_is_what_is_free_and_what_the_container_allows(tmp_path, files, limit):
    assert host_limit(machine(tmp_path, **files)) == limit


def test_running_out_of_memory_is_a_user_error_and_other_failures_are_not():
    with pytest.raises(UserError, match=r"^the device ran out of memory: try less$"), out_of_memory_says("try less"):
        jnp.zeros(2**45, jnp.float32).block_until_ready()
    with pytest.raises(TypeError), out_of_memory_says("try less"):
        jnp.zeros("a")
