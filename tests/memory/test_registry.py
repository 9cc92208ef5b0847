import jax.numpy as jnp
import numpy as np
import pytest

from rfjax import memory
from rfjax.errors import UserError
from rfjax.memory import MemoryShape, footprint

SHAPE = MemoryShape(layers=30, batch=1, heads=12, head_dim=128, rows=30, columns=52, chunk_frames=3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("relax_forcin", {}, "; did you mean 'relax_forcing'"),
        ("relax_forcing", {"sink_frame": 1}, "no setting 'sink_frame'; it has: reservoir_frames, sink_frames"),
        ("relax_forcing", {"sink_frames": "two"}, "sink_frames is 'two'; it must be a whole number"),
        ("relax_forcing", {"sink_frames": 1.5}, "sink_frames is 1.5; it must be a whole number"),
        ("relax_forcing", {"sink_frames": True}, "sink_frames is True"),
        ("relax_forcing", {"redundancy_weight": float("nan")}, "redundancy_weight is nan; it must be a finite number"),
        ("relax_forcing", {"positions": "hybird"}, "positions is 'hybird'; it must be one of 'hybrid', 'true'"),
        ("relax_forcing", {"history_frames": 3, "history_candidates": 2}, "history_candidates is 2; history_frames 3"),
        ("relax_forcing", {"tail_frames": 0}, "tail_frames is 0; 1 or more"),
        ("relax_forcing", {"history_candidates": 10**11}, "reservoir_frames is 120; history_candidates 100000000000"),
        ("relax_forcing", {"reservoir_frames": 10**9}, "reservoir_frames is 1000000000; history_candidates 4 need"),
        ("self_forcing", {"window_frames": 0}, "window_frames is 0; a positive number"),
        ("self_forcing", {"sink_frames": -1}, "sink_frames is -1; 0 or more"),
        ("attention_sink", {"tail_frames": -2}, "tail_frames is -2; 0 or more"),
        ("relax_forcing:sink_frames=2", {}, "settings go apart from the name, as --set KEY=VALUE"),
    ],
)
def test_create_says_what_is_wrong(name, settings, message):
    with pytest.raises(UserError) as error:
        memory.create(name, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("relax_forcing", {"reservoir_frames": 7}, "reservoir_frames is 7; sink 2, history 1, tail 1"),
        ("relax_forcing", {"reservoir_frames": 11, "history_frames": 4}, "reservoir_frames is 11; sink 2, history 4"),
        ("self_forcing", {"window_frames": 2}, "window_frames is 2; sink_frames 0 and the chunk's 3 need at least 3"),
        ("self_forcing", {"window_frames": 6, "sink_frames": 3}, "need at least 7"),
    ],
)
def test_settings_must_fit_the_chunk(name, settings, message):
    with pytest.raises(UserError, match=message):
        memory.create(name, **settings).init(SHAPE, 60, jnp.bfloat16)


def test_the_smallest_reservoir_has_all_its_history():
    from rfjax.memory.relaxed import _plan

    for history in (1, 2, 4):
        with pytest.raises(UserError, match="need at least") as error:
            memory.create("relax_forcing", reservoir_frames=4, history_frames=history).init(SHAPE, 60, jnp.float32)
        least = int(str(error.value).split()[-1])
        policy = memory.create("relax_forcing", reservoir_frames=least, history_frames=history)
        assert isinstance(policy, memory.RelaxForcing)
        assert (_plan(policy._sizes(3)).candidates[-1] >= 0).sum() >= history


def test_settings_as_typed():
    typed = {"positions": "true", "redundancy_weight": "1e-3", "sink_frames": " 3 "}
    assert memory.parse("relax_forcing", typed) == memory.create(
        "relax_forcing", positions="true", redundancy_weight=0.001, sink_frames=3
    )
    assert memory.parse("self_forcing", {"window_frames": "none"}) == memory.create("self_forcing")
    with pytest.raises(UserError, match="sink_frames is 'two'; it must be a whole number"):
        memory.parse("relax_forcing", {"sink_frames": "two"})
    with pytest.raises(UserError, match="redundancy_weight is inf; it must be a finite number"):
        memory.parse("relax_forcing", {"redundancy_weight": "inf"})


def test_numpy_numbers_are_numbers():
    policy = memory.create("relax_forcing", sink_frames=np.int64(3), redundancy_weight=np.float32(0.5))
    assert policy == memory.create("relax_forcing", sink_frames=3, redundancy_weight=0.5)


def test_footprint_of_the_1_3b_model():
    """K and V of one frame take 287.5 MB in bfloat16 (memory_policies.md)."""
    frame = 30 * 2 * 1560 * 1536 * 2
    relaxed = footprint(memory.create("relax_forcing"), SHAPE, 240, "bfloat16")
    assert relaxed.attended_frames == 7
    assert 47 * frame <= relaxed.state_bytes < 47.01 * frame
    assert relaxed.view_bytes == 4 * frame
    window = footprint(memory.create("self_forcing", window_frames=21), SHAPE, 240, "bfloat16")
    assert window.attended_frames == 21
    assert 18 * frame <= window.state_bytes < 18.01 * frame


def test_only_the_dense_memory_depends_on_the_length():
    for name, settings in (("relax_forcing", {}), ("attention_sink", {}), ("self_forcing", {"window_frames": 21})):
        policy = memory.create(name, **settings)
        assert footprint(policy, SHAPE, 21, "bfloat16") == footprint(policy, SHAPE, 2100, "bfloat16")
    dense = memory.create("self_forcing")
    assert footprint(dense, SHAPE, 21, "bfloat16").attended_frames == 21
    assert footprint(dense, SHAPE, 42, "bfloat16").attended_frames == 42
