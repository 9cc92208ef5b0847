"""Policies in a user's own file: that of docs/write_a_policy.md, and what is said of those that break the contract."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_policies import SHAPE, attended, follow, holds_its_frames

from rfjax import cli, memory
from rfjax.errors import UserError
from rfjax.memory.check import check_policy

DOCUMENT = Path(__file__).parents[2] / "docs" / "write_a_policy.md"
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def registered():
    """Forget what a test registers."""
    before = dict(memory.POLICIES)
    yield
    memory.POLICIES.clear()
    memory.POLICIES.update(before)


@pytest.fixture
def example(tmp_path, registered):
    path = tmp_path / "random_history.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    return f"{path}:RandomHistory"


def test_the_documented_policy_is_short():
    assert len(EXAMPLE.splitlines()) <= 40


def test_the_documented_policy_follows_its_rule(example):
    policy = memory.create(example, reservoir_frames=9)
    drawn = []
    for start, view, history in follow(policy, 40):
        holds_its_frames(view, history)
        for sample in range(SHAPE.batch):
            pairs = attended(view, sample)
            if start < 6:
                assert pairs == []
                continue
            frames, positions = zip(*sorted(pairs, key=lambda pair: pair[1]), strict=True)
            assert positions == (-4, -3, -2, -1)
            assert (frames[0], frames[1], frames[3]) == (0, 1, start - 1)
            assert max(2, start - 9) <= frames[2] < start - 1
            drawn.append(start - frames[2])
    assert len(set(drawn)) > 4


@pytest.mark.slow
def test_the_documented_policy_makes_a_video(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["generate", "--policy", example, "--set", "reservoir_frames=6", "--seconds", "1"])
    assert code == 0, capsys.readouterr().err
    assert "random_history attending to 7 latent frames" in capsys.readouterr().out
    assert len(list(Path("outputs").glob("*.mp4"))) == 1


def test_loading_a_file_twice_gives_the_same_class(example):
    first, second = memory.create(example), memory.create(example, seed=1)
    assert type(first) is type(second)
    assert memory.parse_text(f"{example}:seed=1") == second


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "Mine", "there is no policy file"),
        ("x = 1\n", "Mine", "has no class 'Mine'; it has: none"),
        ("class Mine2: pass\n", "Mine", "has no class 'Mine'; it has: Mine2; did you mean 'Mine2'"),
        ("class Mine: pass\n", "Mine", "is not registered; put @rfjax.memory.register"),
        ("import nowhere\n", "Mine", "does not run: line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def f(:\n", "Mine", "does not run: line 1: SyntaxError"),
        (
            "from rfjax.memory import register\n@register('mine')\nclass Mine: pass\n",
            "Mine",
            "policy Mine is no frozen dataclass",
        ),
        (
            "import dataclasses\nfrom rfjax.memory import register\n@register('relax_forcing')\n"
            "@dataclasses.dataclass(frozen=True)\nclass Mine: pass\n",
            "Mine",
            "the policy name 'relax_forcing' belongs to rfjax.memory.relaxed.RelaxForcing",
        ),
    ],
)
def test_files_that_hold_no_policy(tmp_path, registered, content, name, message):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        memory.create(f"{path}:{name}")
    assert message in str(error.value)


def spoilt(**functions):
    made = type("Mine", (memory.AttentionSink,), functions)
    return dataclasses.dataclass(frozen=True, kw_only=True)(made)


def check(policy):
    return check_policy(policy, SHAPE, 30, jnp.float32)


def view_with(**changes):
    def read(self, state, start):
        view = memory.AttentionSink.read(self, state, start)
        trace = {key[6:]: changes[key](getattr(view.trace, key[6:])) for key in changes if key.startswith("trace_")}
        own = {key: change(getattr(view, key)) for key, change in changes.items() if not key.startswith("trace_")}
        return _replace(view, **own, trace=_replace(view.trace, **trace))

    return read


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


def test_an_unspoilt_policy_passes():
    state, view = check(spoilt()())
    assert state.keys.shape == view.keys.shape == (2, 2, 18, 3, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("policy: relax_forcin\n", "policy is 'relax_forcin'; there are:"),
        (
            "policy: relax_forcing\nsettigs: {}\n",
            "has 'settigs'; a policy's preset has description, policy and settings",
        ),
        ("policy: relax_forcing\nsettings: {sink: 1}\n", "relax_forcing has no setting 'sink'"),
        ("policy: relax_forcing\nsettings: {sink_frames: x}\n", "sink_frames is 'x'; it must be a whole number"),
        ("policy: relax_forcing\nsettings: 3\n", "settings is 3; a mapping is needed"),
    ],
)
def test_presets_that_are_wrong(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        memory.create(str(path))
    assert message in str(error.value)


def test_a_preset_can_be_changed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("policy: relax_forcing\nsettings: {sink_frames: 4, tail_frames: 2}\n", encoding="utf-8")
    policy = memory.create(str(path), tail_frames=3)
    assert policy == memory.create("relax_forcing", sink_frames=4, tail_frames=3)


def test_a_float_field_of_a_users_policy_is_traced(tmp_path, registered):
    path = tmp_path / "weighted.py"
    path.write_text(EXAMPLE.replace("seed: int = 0", "seed: int = 0\n    weight: float = 1.0"), encoding="utf-8")
    policy = memory.create(f"{path}:RandomHistory", weight=2)
    np.testing.assert_array_equal(jax.tree.leaves(policy), [2.0])
