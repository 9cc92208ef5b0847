"""Which devices make a video, by the model's size and the devices' memory."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfjax import memory
from rfjax.commands.meshes import budget_of, idle, on_mesh
from rfjax.commands.plan import Plan
from rfjax.config import load_model_config, preset_path
from rfjax.errors import UserError
from rfjax.parallel.division import Sizes
from rfjax.sampling.budget import check_fits
from rfjax.sampling.jobs import Job, places_for

GB = 10**9


def plan_of(name: str, videos: int = 16, sampler: Literal["chunk", "rolling"] = "chunk") -> Plan:
    config = load_model_config(preset_path("models", name))
    assert config.vae is not None
    jobs = [Job("a fox", sample, 240) for sample in range(videos)]
    settings = {"latent_frames": 240, "height": 480, "width": 832, "fps": 16, "dtype": "bfloat16"}
    return Plan(
        checkpoint=Path("none"),
        config=config,
        vae=config.vae,
        policy=memory.create("relax_forcing"),
        settings=settings,
        asked=jobs,
        missing=jobs,
        elsewhere=[],
        unrecorded=[],
        places=1,
        output=Path("none"),
        place="none",
        asked_seconds=None,
        sampler=sampler,
        schedule={},
    )


@pytest.fixture(autouse=True)
def eight(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)


@pytest.mark.parametrize(
    ("name", "limit", "sizes"),
    [
        ("wan_1_3b", 80 * GB, Sizes(8)),
        ("wan_1_3b", 31 * GB, Sizes(4, 2, 1)),  # 12 heads: tokens are exchanged for heads
        ("wan_1_3b", 24 * GB, Sizes(4, 1, 2)),  # the text encoder, 11.4 GB, is cut over `tensor` alone
        ("wan_1_3b", 16 * GB, Sizes(2, 2, 2)),
        ("wan_14b", 141 * GB, Sizes(8)),
        ("wan_14b", 80 * GB, Sizes(4, 2, 1)),
        ("wan_14b", 32 * GB, Sizes(2, 1, 4)),
        ("wan_14b", 16 * GB, Sizes(1, 1, 8)),
        ("wan_14b", None, Sizes(8)),
    ],
)
def test_a_video_has_as_few_devices_as_can_hold_it(name, limit, sizes):
    plan = on_mesh(plan_of(name), None, 1, limit)
    assert plan.mesh == sizes
    assert plan.places == sizes.data


def test_what_fits_nowhere_is_refused_with_the_least_that_is_needed():
    plan = on_mesh(plan_of("wan_14b"), None, 1, 2 * GB)
    assert plan.mesh.group == 8
    with pytest.raises(UserError, match=r"needs about [\d.]+ GB of device memory .* and there are 2\.0 GB"):
        check_fits(budget_of(plan), 2 * GB)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["tiny", "wan_1_3b", "wan_14b"]),
    limit=st.integers(1, 200).map(lambda size: size * GB),
    batch_size=st.integers(1, 4),
    videos=st.integers(1, 20),
)
def test_a_chosen_mesh_divides_and_fits_where_any_does(name, limit, batch_size, videos):
    plan = on_mesh(plan_of(name, videos), None, batch_size, limit)
    network, mesh = plan.config.transformer, plan.mesh
    assert 8 % mesh.group == network.num_heads % mesh.tensor == network.ffn_dim % mesh.tensor == 0
    assert mesh.data == min(videos, 8 // mesh.group)
    assert plan.places % mesh.data == 0
    assert plan.places // mesh.data <= batch_size
    asked = {"data": mesh.data, "sequence": mesh.sequence, "tensor": mesh.tensor}
    again = on_mesh(plan_of(name, videos), asked, batch_size, limit)
    assert budget_of(again).total <= budget_of(plan).total
    if budget_of(plan).total > limit:
        for sequence, tensor in ((8, 1), (2, 4), (1, 4)):
            sizes = Sizes(min(8 // (sequence * tensor), videos), sequence, tensor)
            other = dataclasses.replace(plan, mesh=sizes, places=places_for(videos, batch_size, sizes.data))
            assert budget_of(other).total > limit


def test_sizes_that_are_asked_for_are_taken():
    plan = on_mesh(plan_of("wan_14b"), {"tensor": 4}, 2, 80 * GB)
    assert plan.mesh == Sizes(2, 1, 4)
    assert plan.places == 4
    assert on_mesh(plan_of("wan_14b"), {"sequence": 8}, 1, 40 * GB).mesh == Sizes(1, 8, 1, fully_sharded=True)
    with pytest.raises(UserError, match="sequence is 7, which does not divide the 1560 tokens"):
        on_mesh(plan_of("wan_14b"), {"sequence": 7}, 1, None)
    with pytest.raises(UserError, match="runs on one device"):
        on_mesh(plan_of("wan_14b", sampler="rolling"), {"data": 2}, 1, None)


def test_devices_without_a_video_are_counted():
    plan = on_mesh(plan_of("wan_1_3b", videos=2), None, 1, 80 * GB)
    assert plan.mesh == Sizes(2)
    assert idle(plan) == 6
    assert on_mesh(plan_of("wan_1_3b", sampler="rolling"), None, 1, 80 * GB).mesh == Sizes(1)
