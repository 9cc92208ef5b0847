"""What is said of policies that break the contract, by their shapes or by what they do."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
import test_policy_file
from test_policies import SHAPE
from test_policy_file import EXAMPLE

from rfjax import memory
from rfjax.config import preset_names
from rfjax.errors import UserError
from rfjax.memory.check import RECACHED_CHUNKS, check_policy
from rfjax.memory.dry_run import dry_run
from rfjax.pytree import pytree
from rfjax.sampling.switching import WINDOW_CHUNKS

registered = test_policy_file.registered


def spoilt(**functions):
    made = type("Mine", (memory.AttentionSink,), functions)
    made = dataclasses.dataclass(frozen=True, kw_only=True)(made)
    return pytree(static=["sink_frames", "tail_frames"])(made)


def check(policy):
    return check_policy(policy, SHAPE, 30, jnp.float32)


def view_with(**changes):
    def read(self, state, start):
        view = memory.AttentionSink.read(self, state, start)
        trace = {key[6:]: changes[key](getattr(view.trace, key[6:])) for key in changes if key.startswith("trace_")}
        own = {key: change(getattr(view, key)) for key, change in changes.items() if not key.startswith("trace_")}
        return _replace(view, **own, trace=_replace(view.trace, **trace))

    return read


def choice_with(**changes):
    def choose(self, stored, start):
        choice = memory.AttentionSink.choose(self, stored, start)
        return _replace(choice, **{key: change(getattr(choice, key)) for key, change in changes.items()})

    return choose


def _replace(tree, **changes):
    """`dataclasses.replace` without the shape checks of a real construction."""
    copy = object.__new__(type(tree))
    for field in dataclasses.fields(tree):
        object.__setattr__(copy, field.name, changes.get(field.name, getattr(tree, field.name)))
    return copy


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"commit": None}, "(Mine) has no function commit(state, chunk)"),
        ({"recache": None}, "(Mine) has no function recache(state, frames)"),
        ({"read": lambda self, state, start: state.keys}, "read returned ShapeDtypeStruct; a rfjax.memory.View"),
        (
            {"read": view_with(keys=lambda k: k[:, :, :, :2])},
            "read returned a view's keys of shape [2, 2, 18, 2, 8] and type float32; [L=2, B=2, S=18, T=3, C=8]",
        ),
        (
            {"read": view_with(values=lambda v: v.astype(jnp.bfloat16))},
            "a view's values of shape [2, 2, 18, 3, 8] and type bf",
        ),
        ({"read": view_with(positions=lambda p: p[0])}, "a view's positions of shape [2, 18, 1]"),
        ({"read": view_with(positions=lambda p: p[0])}, "[Y=1 or 2, B=2, S=18, P=1 or 3] and int32 are needed"),
        ({"read": view_with(length=lambda n: n.sum())}, "a view's length of shape []"),
        ({"read": view_with(trace_frames=lambda f: f[:, 0])}, "a trace's frames of shape [2, 18, 1]"),
        ({"commit": lambda self, state, chunk: state.keys}, "commit returned PyTreeDef(*)"),
        (
            {"commit": lambda self, state, chunk: _replace(state, frames=state.frames[:, 1:])},
            "commit returned state.frames of shape [2, 17] and type int32; init made it [2, 18] and int32",
        ),
        ({"commit": lambda self, state, chunk: 1 / 0}, "commit failed"),
        ({"read": view_with(positions=lambda p: None)}, "a view's positions that is NoneType; an array is needed"),
        ({"read": view_with(keys=lambda k: None)}, "a view's keys that is NoneType; an array is needed"),
        (
            {"read": lambda self, state, start: _replace(memory.AttentionSink.read(self, state, start), trace=None)},
            "a view whose trace is NoneType; a rfjax.memory.Trace is needed",
        ),
        (
            {"recache": lambda self, state, frames: (frames.frames.reshape(SHAPE.batch, 3), state)[1]},
            "recache failed: TypeError: cannot reshape array of shape (2, 6)",
        ),
        (
            {"choose": lambda self, stored, start: stored.frames},
            "; a rfjax.memory.Choice is needed, as from plain_choice",
        ),
        (
            {"choose": choice_with(positions=lambda p: p[1:])},
            "choose returned frames [18], positions [17], roles [18]; one axis of the same length is needed",
        ),
        ({"choose": choice_with(scores=lambda s: jnp.zeros(2))}, "choose returned candidates [0], scores [2]; one"),
    ],
)
def test_what_is_said_of_a_policy_that_breaks_the_contract(functions, message):
    with pytest.raises(UserError) as error:
        check(spoilt(**functions)())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_failing_function_is_found_in_the_users_file(tmp_path, registered):
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE.replace("jnp.arange(-len(frames), 0)", "jnp.arange(-start, 0)"), encoding="utf-8")
    line = 1 + path.read_text(encoding="utf-8").splitlines().index("        positions = jnp.arange(-start, 0)")
    with pytest.raises(
        UserError, match=rf"\(RandomHistory\): read failed in line {line} of mine.py: ConcretizationTypeError"
    ):
        check(memory.create(f"{path}:RandomHistory"))


def test_what_is_no_policy():
    unregistered = dataclasses.dataclass(frozen=True)(type("Mine", (memory.AttentionSink,), {}))
    for policy, message in (
        ("relax_forcing", "policy is 'relax_forcing'; one made by rfjax.memory.create(NAME, ...) is needed"),
        (memory.RelaxForcing, "policy is the class RelaxForcing; one made by rfjax.memory.create"),
        (object(), "(object) has no function init(shape, video_frames, dtype)"),
        (unregistered(), "(Mine) is not registered"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            check(policy)


def test_recache_is_checked_for_all_that_it_is_given():
    assert RECACHED_CHUNKS == WINDOW_CHUNKS


def test_an_if_on_a_traced_setting_is_found(tmp_path, registered):
    path = tmp_path / "mine.py"
    text = EXAMPLE.replace("seed: int = 0", "seed: int = 0\n    weight: float = 1.0")
    text = text.replace("        oldest =", "        if self.weight > 0.5:\n            pass\n        oldest =")
    path.write_text(text, encoding="utf-8")
    line = 1 + text.splitlines().index("        if self.weight > 0.5:")
    with pytest.raises(UserError, match=rf"read failed in line {line} of mine.py: TracerBoolConversionError"):
        check(memory.create(f"{path}:RandomHistory", weight=0.7))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "return self.sink_frames + self.reservoir_frames",
            "return 3",
            "with frame 6, it attends to frame 0, whose keys are not stored",
        ),
        ("frame + self.reservoir_frames)", "frame + 3)", "whose keys are not stored; see capacity and last_reader"),
        ("start[None] - 1]", "start[None]]", "the chunk that begins with frame 6, it attends to frame 6; only earlier"),
        ("jnp.arange(-len(frames), 0)", "jnp.arange(-2, 2)", "stands at position 0; what is remembered stands below 0"),
        ("[HISTORY, TAIL]", "[0, TAIL]", "has the role NONE"),
    ],
)
def test_wrong_decisions_are_found_by_a_dry_run(tmp_path, registered, old, new, message):
    path = tmp_path / "mine.py"
    assert old in EXAMPLE
    path.write_text(EXAMPLE.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as error:
        check(memory.create(f"{path}:RandomHistory", reservoir_frames=12))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": lambda n: n + 1000}, "the view's length is 18 and its trace names 0 frames"),
        ({"trace_positions": lambda p: p - 1}, "stands at -3, but at -4 in the trace"),
        ({"values": lambda v: v + 1}, "it attends to frame 0, whose values are not stored"),
        ({"trace_roles": lambda r: jnp.full_like(r, memory.SINK)}, "an empty slot has another role than NONE"),
    ],
)
def test_views_that_contradict_themselves_are_found_by_a_dry_run(changes, message):
    policy = spoilt(read=view_with(**changes))()
    with pytest.raises(UserError, match=message):
        dry_run(policy, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names("policies"))
def test_built_in_policies_pass_the_dry_run(name):
    dry_run(memory.create(name), 2, 3)


def test_an_unspoilt_policy_passes():
    state, view = check(spoilt()())
    assert state.keys.shape == view.keys.shape == (2, 2, 18, 3, 8)


@pytest.mark.parametrize("name", preset_names("policies"))
def test_a_video_of_a_single_chunk_fits_every_policy(name):
    check_policy(memory.create(name), SHAPE, SHAPE.chunk_frames, jnp.float32)
