"""Studies: what they say, and what is wrong with them."""

from pathlib import Path

import pytest
import yaml

from rfjax.config import preset_names
from rfjax.errors import UserError
from rfjax.evaluation.study import Study, check_same, expand_variants, find_study, load_study, resolved, write_study
from rfjax.memory import POLICIES, create

CUSTOM = """
import dataclasses
from rfjax.memory import register
from rfjax.memory.window import AttentionSink

@register("mine")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(AttentionSink):
    \"\"\"Mine.\"\"\"
"""


@pytest.fixture
def own_policies():
    """Forget afterwards what a policy's file has registered."""
    before = set(POLICIES)
    yield
    for name in POLICIES.keys() - before:
        del POLICIES[name]


def study_of(*policies, **changes) -> Study:
    return Study.from_dict({"prompts": ["a cat"], "policies": list(policies), **changes})


def names_of(*policies, folder: Path = Path()) -> list[str]:
    return [variant.name for variant in expand_variants(study_of(*policies), folder / "study.yaml")]


def test_lists_make_a_grid_and_values_are_fixed():
    settings = {"redundancy_weight": [0.5, 1], "history_frames": [1, 2], "sink_frames": 3}
    variants = expand_variants(study_of({"policy": "relax_forcing", "settings": settings}), Path("s.yaml"))
    assert [variant.name for variant in variants] == [
        "relax_forcing,redundancy_weight=0.5,history_frames=1,sink_frames=3",
        "relax_forcing,redundancy_weight=0.5,history_frames=2,sink_frames=3",
        "relax_forcing,redundancy_weight=1,history_frames=1,sink_frames=3",
        "relax_forcing,redundancy_weight=1,history_frames=2,sink_frames=3",
    ]
    assert variants[2].policy == create("relax_forcing", redundancy_weight=1.0, history_frames=1, sink_frames=3)
    assert variants[2].settings == {"redundancy_weight": 1.0, "history_frames": 1, "sink_frames": 3}


def test_a_range_is_evenly_spaced_and_names_are_short():
    weights = {"redundancy_weight": {"from": 0, "to": 1, "steps": 11}}
    assert names_of({"policy": "relax_forcing", "settings": weights})[1:4] == [
        "relax_forcing,redundancy_weight=0.1",
        "relax_forcing,redundancy_weight=0.2",
        "relax_forcing,redundancy_weight=0.3",
    ]
    tails = {"tail_frames": {"from": 3, "to": 9, "steps": 3}}
    assert names_of({"policy": "attention_sink", "settings": tails}) == [
        f"attention_sink,tail_frames={value}" for value in (3, 6, 9)
    ]


def test_names_have_as_many_digits_as_tell_them_apart():
    weights = {"redundancy_weight": [1.0, 1.0000001]}
    assert names_of({"policy": "relax_forcing", "settings": weights}) == [
        "relax_forcing,redundancy_weight=1.0",
        "relax_forcing,redundancy_weight=1.0000001",
    ]


@pytest.mark.usefixtures("own_policies")
def test_none_presets_and_files_beside_the_study(tmp_path):
    (tmp_path / "near.yaml").write_text("policy: attention_sink\nsettings: {tail_frames: 3}\n")
    (tmp_path / "own.py").write_text(CUSTOM)
    policies = [
        {"policy": "self_forcing", "settings": {"window_frames": [None, 9]}},
        {"policy": "causvid"},
        {"policy": "near.yaml", "settings": {"sink_frames": 1}},
        {"policy": "own.py:Mine"},
    ]
    assert names_of(*policies, folder=tmp_path) == [
        "self_forcing,window_frames=none",
        "self_forcing,window_frames=9",
        "causvid",
        "near,sink_frames=1",
        "mine",
    ]


WRONG = {
    "unknown key": ({"prompt": ["a"]}, r"s.yaml.prompt is not a known setting; did you mean 'prompts'\?"),
    "number for a key": ({1: 2}, "s.yaml.1 is not a known setting"),
    "seed": ({"seed": -1}, "s.yaml.seed is -1; a whole number from 0 to 4294967295 is needed"),
    "seed of a wrong type": ({"seed": True}, "s.yaml.seed is True"),
    "samples": ({"num_samples": 0}, "s.yaml.num_samples is 0; a positive whole number"),
    "seconds": ({"seconds": 0}, "s.yaml.seconds is 0; a positive number"),
    "both lengths": ({"seconds": 1, "latent_frames": 3}, "s.yaml has seconds and latent_frames"),
    "height": ({"height": 10**6}, "s.yaml.height is 1000000; at most 16384"),
    "fps": ({"fps": 2000}, "s.yaml.fps is 2000; at most 1000"),
    "no prompts": ({"prompts": []}, "s.yaml has neither of prompts and prompt_file"),
    "both prompts": ({"prompt_file": "x"}, "s.yaml has both of prompts and prompt_file"),
    "no policies": ({"policies": []}, "s.yaml has no policies"),
    "policies is no list": ({"policies": "relax_forcing"}, "s.yaml.policies is 'relax_forcing'; a list is needed"),
    "settings is no mapping": (
        {"policies": [{"policy": "relax_forcing", "settings": [1]}]},
        r"s.yaml.policies\[0\].settings is \[1\]; dict is needed",
    ),
    "unknown key of a policy": (
        {"policies": [{"policy": "relax_forcing", "setting": {}}]},
        r"s.yaml.policies\[0\].setting is not a known setting; did you mean 'settings'\?",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_says_what_is_wrong_with_a_study(tmp_path, changes, message):
    values = {"prompts": ["a cat"], "policies": [{"policy": "relax_forcing"}], **changes}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        load_study(tmp_path / "s.yaml")


WEIGHT = "redundancy_weight"
WRONG_POLICIES = {
    "no name": ([{"settings": {}}], r"study.yaml: policies\[0\] has no policy"),
    "unknown policy": ([{"policy": "relax"}], r"policies\[0\]: unknown policy 'relax'; .* did you mean"),
    "unknown setting": (
        [{"policy": "attention_sink"}, {"policy": "relax_forcing", "settings": {"redundancy": 1}}],
        r"policies\[1\]: relax_forcing has no setting 'redundancy'; .*did you mean 'redundancy_weight'",
    ),
    "setting called name": ([{"policy": "relax_forcing", "settings": {"name": 1}}], "has no setting 'name'"),
    "wrong value": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: [1, "much"]}}],
        "redundancy_weight is 'much'; it must be a finite number",
    ),
    "true for a word": ([{"policy": "relax_forcing", "settings": {"positions": True}}], "positions is 'True'"),
    "empty list": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: []}}],
        r"policies\[0\]: redundancy_weight is an empty list; at least one value",
    ),
    "list in a list": ([{"policy": "relax_forcing", "settings": {WEIGHT: [[1]]}}], r"has \[1\]; a list holds single"),
    "key of a range": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: {"from": 0, "to": 1, "step": 3}}}],
        "has 'step'; a range has from, to and steps; did you mean 'steps'",
    ),
    "range without end": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: {"from": 0, "steps": 3}}}],
        "redundancy_weight has no 'to'",
    ),
    "one step": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: {"from": 0, "to": 1, "steps": 1}}}],
        "redundancy_weight.steps is 1; a whole number from 2 to 1000",
    ),
    "range of words": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: {"from": "a", "to": 1, "steps": 3}}}],
        "redundancy_weight.from is 'a'; a finite number",
    ),
    "value twice": (
        [{"policy": "relax_forcing", "settings": {WEIGHT: [2, 2.0]}}],
        r"policies\[0\] makes RelaxForcing\(.*which the study has already",
    ),
    "default twice": (
        [{"policy": "relax_forcing"}, {"policy": "relax_forcing", "settings": {WEIGHT: 2}}],
        r"policies\[1\] makes .*which the study has already",
    ),
    "too many": (
        [
            {
                "policy": "relax_forcing",
                "settings": {WEIGHT: {"from": 0, "to": 1, "steps": 1000}, "history_frames": [1, 2]},
            }
        ],
        "makes 2000 variants; a study has at most 1000",
    ),
    "contradiction": (
        [{"policy": "relax_forcing", "settings": {"history_frames": [1, 9]}}],
        r"policies\[0\]: relax_forcing: history_candidates is 4; history_frames 9 need at least as many",
    ),
}


@pytest.mark.parametrize(("policies", "message"), WRONG_POLICIES.values(), ids=WRONG_POLICIES.keys())
def test_says_what_is_wrong_with_the_policies(policies, message):
    with pytest.raises(UserError, match=message):
        names_of(*policies)


def test_two_files_of_one_name_are_refused(tmp_path):
    for place, tail in (("a", 3), ("b", 6)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.yaml").write_text(f"policy: attention_sink\nsettings: {{tail_frames: {tail}}}\n")
    with pytest.raises(UserError, match=r"policies\[1\] and another policy of the study are both named 'x'"):
        names_of({"policy": "a/x.yaml"}, {"policy": "b/x.yaml"}, folder=tmp_path)


@pytest.mark.parametrize("name", preset_names("sweeps"))
def test_shipped_studies_can_be_read(name):
    path = find_study(name)
    variants = expand_variants(load_study(path), path)
    assert len(variants) == {"policies": 8, "redundancy_weight": 50}[name]


def test_a_name_that_is_not_shipped_is_told():
    with pytest.raises(UserError, match=r"no preset 'polices' in configs/sweeps; .*did you mean 'policies'\?"):
        find_study("polices")
    assert find_study("polices.yaml") == Path("polices.yaml")


@pytest.mark.usefixtures("own_policies")
def test_the_study_in_the_document_is_one(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    blocks = {}
    for name, kind in (("sweep", "yaml"), ("write_a_policy", "python")):
        blocks[name] = (
            (docs / f"{name}.md").read_text(encoding="utf-8").partition(f"```{kind}\n")[2].partition("```")[0]
        )
    (tmp_path / "my_study.yaml").write_text(blocks["sweep"], encoding="utf-8")
    (tmp_path / "random_history.py").write_text(blocks["write_a_policy"], encoding="utf-8")
    variants = expand_variants(load_study(tmp_path / "my_study.yaml"), tmp_path / "my_study.yaml")
    assert len(variants) == 17
    assert variants[-1].name == "random_history"


SIZES = {"latent_frames": 6, "height": 16, "width": 32}


def test_a_resolved_study_says_the_same(tmp_path):
    weights = {WEIGHT: {"from": 0, "to": 4, "steps": 3}}
    study = study_of({"policy": "relax_forcing", "settings": weights}, {"policy": "attention_sink"}, seconds=1, seed=7)
    variants = expand_variants(study, tmp_path / "study.yaml")
    write_study(tmp_path / "again.yaml", resolved(study, variants, SIZES))
    again = load_study(tmp_path / "again.yaml")
    assert (again.seed, again.latent_frames, again.height, again.seconds) == (7, 6, 16, None)
    assert [v.policy for v in expand_variants(again, tmp_path / "again.yaml")] == [v.policy for v in variants]


def test_a_study_may_grow_in_its_folder_and_not_change(tmp_path):
    def values(**changes):
        study = study_of({"policy": "attention_sink"}, **changes)
        return resolved(study, expand_variants(study, tmp_path / "study.yaml"), SIZES)

    path = tmp_path / "study.yaml"
    check_same(tmp_path, path, values())
    write_study(path, values(num_samples=2))
    check_same(tmp_path, path, values(num_samples=3, prompts=["a dog", "a cat"], description="other words"))
    for changes, message in (
        ({"num_samples": 2, "seed": 1}, "seed 0, this one has 1"),
        ({"num_samples": 1}, "num_samples 2, this one has 1"),
        ({"num_samples": 2, "prompts": ["a dog"]}, "'a cat' among its prompts, which this one lacks"),
        ({"num_samples": 2, "policies": [{"policy": "relax_forcing"}]}, "'attention_sink'.* among its policies"),
    ):
        study = study_of(**{"policies": [{"policy": "attention_sink"}], **changes})
        wanted = resolved(study, expand_variants(study, path), SIZES)
        with pytest.raises(UserError, match=f"holds another study, with .*{message}.*; choose another --output"):
            check_same(tmp_path, path, wanted)
