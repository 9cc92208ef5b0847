"""`rfjax benchmark` end to end at the tiny preset, and everything around it that needs no measuring."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rfjax.benchmark import build, machine, parts, preset
from rfjax.benchmark.measure import needed_memory
from rfjax.benchmark.summary import verdicts
from rfjax.benchmark.timing import in_turns, ratio
from rfjax.cli import main
from rfjax.config import ModelConfig, TransformerConfig, preset_path
from rfjax.errors import UserError
from rfjax.memory import create, parse_text
from rfjax.models.functional import abstract_params
from rfjax.models.transformer import WanTransformer

SMALL = ModelConfig(
    transformer=TransformerConfig(
        text_len=4, in_dim=4, out_dim=4, dim=16, ffn_dim=16, freq_dim=8, text_dim=8, num_heads=2, num_layers=1
    )
)


@pytest.mark.slow
def test_tiny_preset_measures_every_part(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    assert main(["benchmark", "--preset", "tiny", "--repeats", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found["policies"]) == ["relax_forcing", "self_forcing:window_frames=21"]
    assert set(found["shared"]) == {build.TEXT_ENCODER, build.TEXT_CONTEXT, build.DECODE}
    every = list(found["shared"].values())
    for policy in found["policies"].values():
        assert set(policy["parts"]) == set(build.PER_POLICY)
        every += policy["parts"].values()
        assert policy["frames_per_second"]["rollout"] > policy["frames_per_second"]["end_to_end"] > 0
        assert policy["chunk_memory"]["reused_bytes"] >= policy["state_bytes"]  # the state is updated in place
        assert policy["late_over_early"] > 0
    for part in every:
        assert len(part["runs"]) == 2
        assert 0 < part["call_seconds"] == np.median(part["runs"])
        assert part["seconds"] == pytest.approx(part["calls"] * part["call_seconds"])
        assert part["compile_seconds"] > 0
        if part["call_flops"] is not None:
            assert part["flops_per_second"] == pytest.approx(part["call_flops"] / part["call_seconds"])
    relax, dense = found["policies"].values()
    assert (relax["attended_frames"], dense["attended_frames"]) == (7, 21)
    work = [policy["parts"][build.SELF_ATTENTION]["call_flops"] for policy in (relax, dense)]
    assert work[1] == 3 * work[0]
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    assert "Self-attention: relax_forcing is" in output
    assert "Rollout: relax_forcing is" in output
    assert "relax_forcing: chunk 500 costs" in output
    assert f"jax {jax.__version__}" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "smal"], "no preset 'smal' in configs/benchmark; there are: small, tiny, wan_1_3b"),
        (["--policy", "relax"], "did you mean 'relax_forcing'?"),
        (["--policy", "self_forcing:window=21"], "sink_frames; did you mean 'window_frames'?"),
        (["--policy", "self_forcing:window_frames=many"], "window_frames is 'many'"),
        (["--policy", "self_forcing:21"], "has '21' for a setting; write NAME:KEY=VALUE,KEY=VALUE"),
        (["--policy", "self_forcing:window_frames=[2"], "window_frames is '[2'"),
        (["--policy", "self_forcing:window_frames=2"], "window_frames is 2"),
        (["--policy", "relax_forcing", "--policy", "relax_forcing"], "is given twice"),
        (["--repeats", "0"], "--repeats is 0; 1 or more is needed"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--dtype", "float16"], "float16"),
        (["--json", "/nowhere/at/all.json"], "no folder /nowhere/at"),
        (["--json", "x" * 300], "File name too long"),
        (["--preset", "wan_1_3b", "--batch-size", "1000"], "GB of device memory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(flags, message, capsys):
    assert main(["benchmark", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_existing_file_is_not_overwritten(tmp_path, capsys):
    file = tmp_path / "old.json"
    file.write_text("mine")
    assert main(["benchmark", "--json", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_the_run_is_refused_where_memory_does_not_suffice():
    subject = preset.load_subject("wan_1_3b")
    setup = build.Setup(subject, preset.policies_of(subject.preset.policies), 1, "bfloat16", 1, None)
    needed = needed_memory(setup)
    assert 40e9 < needed < 80e9  # what configs/benchmark/wan_1_3b.yaml promises
    assert needed_memory(dataclasses.replace(setup, limit=needed)) == needed
    with pytest.raises(UserError, match="try --preset small"):
        needed_memory(dataclasses.replace(setup, limit=needed - 1))


def test_policies_are_written_with_their_settings():
    assert parse_text("relax_forcing") == create("relax_forcing")
    assert parse_text("self_forcing:window_frames=none") == create("self_forcing")
    expected = create("relax_forcing", history_frames=2, redundancy_weight=0.001, positions="true")
    assert parse_text("relax_forcing:history_frames=2,redundancy_weight=1e-3,positions=true") == expected


def test_presets_name_models_of_the_published_sizes():
    sizes = {}
    for name in ("wan_1_3b", "wan_14b"):
        config = preset.load_model_config(preset_path("models", name))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(WanTransformer, config.transformer)))
    assert sizes["wan_1_3b"] == pytest.approx(1.419e9, rel=1e-3)
    assert sizes["wan_14b"] == pytest.approx(14.29e9, rel=1e-3)
    assert preset.load_model_config(preset_path("models", "wan_1_3b")).transformer == TransformerConfig()
    assert preset.load_subject("small").config.transformer == TransformerConfig(num_layers=2)
    assert preset.load_subject("small").frame_size == (30, 52)


@pytest.mark.parametrize("key", ["height", "width", "latent_frames"])
def test_a_preset_of_sizes_that_do_not_divide_is_refused(key, tmp_path, monkeypatch):
    file = tmp_path / "odd.yaml"
    file.write_text(f"model: tiny\n{key}: 100")
    monkeypatch.setattr(
        preset, "preset_path", lambda kind, name: file if kind == "benchmark" else preset_path(kind, name)
    )
    with pytest.raises(UserError, match=rf"odd.yaml: {key} is 100; a multiple of (16|3) is needed"):
        preset.load_subject("odd")


@pytest.mark.parametrize(
    ("text", "frames"),
    [("self_forcing:window_frames=21", range(12, 30)), ("attention_sink", [*range(3), *range(15, 30)])],
)
def test_a_filled_memory_holds_what_generating_would_have_left(text, frames):
    state = parts.state_at(SMALL, (2, 2), 2, 60, "float32", parse_text(text), 10)
    assert state.start.tolist() == [30, 30]
    for sample in np.asarray(state.memory.frames):
        assert sorted(sample) == list(frames)


def test_a_filled_memory_lets_relax_forcing_choose():
    policy = create("relax_forcing")
    state = parts.state_at(SMALL, (2, 2), 1, 60, "float32", policy, 500)
    view = policy.read(state.memory, state.start)
    sink, tail, selected = (0, 1), 1499, int(view.trace.selected_frames[0, 0, 0])
    assert sorted(view.trace.frames[0, 0, :, 0].tolist()) == sorted([*sink, selected, tail])
    assert selected in (1442, 1456, 1470, 1484)


def test_tasks_run_in_turns_and_the_first_round_does_not_count():
    order, rounds = [], []
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = in_turns(tasks, {"a": 3, "b": 2}, lambda *number: rounds.append(number))
    assert "".join(order) == "abababa"
    assert rounds == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 2}


def test_a_ratio_is_not_moved_by_a_slow_round():
    assert ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0


def test_verdicts_say_what_is_slower_and_what_grows():
    policies = {
        "a": {"attended_frames": 7, "memory_grows": False, "late_over_early": 1.004},
        "b": {"attended_frames": 21, "memory_grows": True, "late_over_early": None},
    }
    pair = {"policy": "a", "against": "b", build.SELF_ATTENTION: 2.64, build.DENOISE: 1.4, build.STEP: 0.5}
    assert verdicts({"policies": policies, "ratios": [pair]}) == [
        "Self-attention: a is 2.64 times faster than b (7 against 21 frames).",
        "Rollout: a is 2.00 times slower than b.",
        "a: chunk 500 costs 1.00 times chunk 5, in the same memory.",
        "b keeps every frame: its memory and its chunks grow with the video.",
    ]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks_of_known_devices(kind, peak):
    assert machine.peak_flops(kind, "bfloat16") == peak
    assert machine.peak_flops(kind, "float32") is None
