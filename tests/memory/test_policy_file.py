"""Policies in a user's own file, that of docs/write_a_policy.md among them, and presets of settings."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_policies import SHAPE, attended, follow, holds_its_frames

from rfjax import cli, memory
from rfjax.errors import UserError
from rfjax.memory.policy_file import policy_source

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
    drawn: list[list[int]] = [[], []]
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
            drawn[sample].append(start - frames[2])
    assert all(len(set(ages)) > 4 for ages in drawn)
    assert drawn[0] != drawn[1]
    with pytest.raises(UserError, match="sink_frames >= 0 and reservoir_frames >= 2 are needed"):
        memory.create(example, reservoir_frames=1)


@pytest.mark.slow
def test_the_documented_policy_makes_a_video(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = cli.main(["generate", "--policy", example, "--set", "reservoir_frames=6", "--seconds", "1"])
    assert code == 0, capsys.readouterr().err
    assert "random_history attending to 7 latent frames" in capsys.readouterr().out
    assert len(list(Path("outputs").glob("*.mp4"))) == 1


def test_an_unchanged_file_gives_the_same_class_and_an_edited_one_another(example):
    first, second = memory.create(example), memory.create(example, seed=1)
    assert type(first) is type(second)
    assert memory.parse_text(f"{example}:seed=1") == second
    path = Path(example.removesuffix(":RandomHistory"))
    path.write_text(EXAMPLE.replace("seed: int = 0", "seed: int = 3"), encoding="utf-8")
    third = memory.create(example)
    assert type(third) is not type(first)
    assert dataclasses.asdict(third)["seed"] == 3  # pyright: ignore[reportArgumentType]
    assert policy_source(first)["file"] == policy_source(third)["file"] == "random_history.py"
    assert policy_source(first)["code"] != policy_source(third)["code"]
    assert re.fullmatch("sha256:[0-9a-f]{16}", policy_source(third)["code"])
    path.write_text(EXAMPLE, encoding="utf-8")
    assert type(memory.create(example)) is type(first)


def test_a_built_in_policy_has_no_source():
    assert policy_source(memory.create("relax_forcing")) == {}


def test_files_of_one_name_in_two_folders(tmp_path, registered):
    names = []
    for folder, sink in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "mine.py"
        path.write_text(EXAMPLE.replace("sink_frames: int = 2", f"sink_frames: int = {sink}"), encoding="utf-8")
        names.append(f"{path}:RandomHistory")
    sinks = [dataclasses.asdict(memory.create(name))["sink_frames"] for name in (*names, *names)]  # pyright: ignore
    assert sinks == [1, 2, 1, 2]


HEAD = "import dataclasses\nimport typing\nfrom rfjax.memory import *\n@register('mine')\n"
FROZEN = HEAD + "@dataclasses.dataclass(frozen=True, kw_only=True)\n"


def test_settings_of_every_type(tmp_path, registered):
    path = tmp_path / "mine.py"
    fields = "flag: bool = False; word: str = 'a'; most: typing.Optional[int] = None; kind: typing.Literal[1, 'x'] = 1"
    path.write_text(f"{FROZEN}class Mine(AttentionSink):\n    {fields}\n", encoding="utf-8")
    name = f"{path}:Mine"
    typed = memory.parse(name, {"flag": "True", "word": "b", "most": "3", "kind": "x"})
    assert typed == memory.create(name, flag=np.True_, word="b", most=3, kind="x")
    assert memory.parse(name, {"most": "none", "kind": "1"}) == memory.create(name)
    for settings, message in (
        ({"flag": 1}, "flag is 1; it must be true or false"),
        ({"word": 1}, "word is 1; it must be text"),
        ({"most": True}, "most is True; it must be a whole number or none"),
        ({"kind": "y"}, "kind is 'y'; it must be one of 1, 'x'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            memory.create(name, **settings)


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
        ("import sys\nsys.exit('no')\n", "Mine", "does not run: line 2: SystemExit: no"),
        (HEAD + "class Mine(AttentionSink): weight: float = 1.0\n", "Mine", "policy Mine is no frozen dataclass"),
        (
            FROZEN + "class Mine(FramePolicy):\n    def capacity(self, shape, video_frames): return 3\n",
            "Mine",
            "policy Mine lacks choose(stored, start), last_reader(frame, shape)",
        ),
        (
            FROZEN + "class Mine(AttentionSink): sizes: tuple[int, ...] = ()\n",
            "Mine",
            "policy Mine: the setting sizes is a tuple[int, ...]; it can be int, float, bool, str, Literal[...]",
        ),
        (FROZEN + "class Mine(AttentionSink): size: int\n", "Mine", "cannot be made: TypeError: "),
        (
            FROZEN.replace("mine", "causvid") + "class Mine(AttentionSink): pass\n",
            "Mine",
            "the policy name 'causvid' belongs to a preset of rfjax",
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
    assert "\n" not in str(error.value)


def test_a_file_without_a_class_lists_its_classes(example):
    path = example.removesuffix(":RandomHistory")
    for name in (path, f"{path}:"):
        with pytest.raises(UserError, match=r"write .*random_history.py:CLASS; it has: RandomHistory"):
            memory.create(name)
    with pytest.raises(UserError, match="has ';' after its class"):
        memory.parse_text(f"{example};seed=3")


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
        ("policy: relax_forcing\nsettings: []\n", "settings is []; a mapping is needed"),
        ("policy: relax_forcing\nsettings: {on: 2}\n", "relax_forcing has no setting True"),
        ("policy: [relax_forcing]\n", "policy is ['relax_forcing']; there are:"),
        ("description: 2024-99-99\n", "is not valid YAML: month must be in 1..12"),
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


def test_a_preset_may_hold_text_numbers_and_name_a_file(tmp_path, registered):
    (tmp_path / "mine.py").write_text(FROZEN + "class Mine(AttentionSink): rate: float = 1.0\n", encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text("policy: mine.py:Mine\nsettings: {rate: 1e-3, sink_frames: 2}\n", encoding="utf-8")
    assert memory.create(str(path)) == memory.create(f"{tmp_path}/mine.py:Mine", rate=0.001, sink_frames=2)


def test_a_float_field_of_a_users_policy_is_traced(tmp_path, registered):
    path = tmp_path / "weighted.py"
    path.write_text(EXAMPLE.replace("seed: int = 0", "seed: int = 0\n    weight: float = 1.0"), encoding="utf-8")
    policy = memory.create(f"{path}:RandomHistory", weight=2)
    np.testing.assert_array_equal(jax.tree.leaves(policy), [2.0])
