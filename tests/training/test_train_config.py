import pytest

from rfjax.config import preset_names, preset_path
from rfjax.errors import UserError
from rfjax.training.config import STAGES, TrainConfig, find_config, load_train_config

SMALLEST = {"stage": "vae", "init": "start", "data": {"path": "clips"}}


def test_every_shipped_configuration_reads():
    for name in preset_names("train"):
        config = load_train_config(find_config(name))
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_the_published_preset_has_the_published_numbers():
    config = load_train_config(preset_path("train", "self_forcing"))
    options = config.self_forcing
    assert options is not None
    assert (config.optimizer.learning_rate, options.critic.learning_rate) == (2e-6, 4e-7)
    assert config.optimizer.betas == options.critic.betas == (0.0, 0.999)
    assert config.optimizer.weight_decay == options.critic.weight_decay == 0.01
    assert config.ema is not None
    assert (config.ema.decay, config.ema.from_step) == (0.99, 200)
    assert (config.batch_size, config.steps, options.generator_every) == (64, 600, 5)
    assert (options.latent_frames, options.window_frames, options.guidance) == (21, 21, 3.0)
    assert (options.teacher, options.critic_init) == ("checkpoints/wan_14b", "checkpoints/wan_1_3b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "techer"}, r"stage is 'techer'; one of vae, .* is needed; did you mean 'teacher'"),
        ({"init": ""}, "init is missing"),
        ({"init": None}, "init is missing"),
        ({"data": {}}, r"data\.path is missing"),
        ({"data": {"path": "clips", "frame": 3}}, r"data\.frame is not a known setting; did you mean 'frames'"),
        ({"data": {"path": "clips", "crop": [32]}}, r"data\.crop is \[32\]; rows and columns are needed"),
        ({"stage": "ode", "data": {"path": "clips", "crop": [32, 48]}}, r"crop is \[32, 48\], but stage ode reads no"),
        (
            {"stage": "self_forcing", "data": {"path": "clips", "frames": 9}},
            "frames is 9, but .* self_forcing.latent_fra",
        ),
        ({"remat": True}, "remat is true, but stage vae has none"),
        ({"sample": {"prompts": ["a"]}}, r"sample\.prompts is \('a',\), but stage vae shows clips of its data"),
        ({"sample": {"latent_frames": 3}}, r"sample\.latent_frames is 3, but stage vae shows"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"batch_size": 6, "accumulate": 4}, r"batch_size is 6; a multiple of accumulate \(4\)"),
        ({"stage": "self_forcing", "self_forcing": {"weak_teacher": "old"}}, "is 'old' and weak_guidance 0; they go"),
        (
            {"stage": "self_forcing", "self_forcing": {"weak_teacher": "old", "weak_guidance": -1}},
            "is 'old' and weak_guidance -1; they go together: name a checkpoint and a coefficient above 0",
        ),
        ({"stage": "self_forcing", "self_forcing": {"weak_guidance": 0.5}}, "is '' and weak_guidance 0.5; they go"),
        ({"teacher": {}}, "stage is 'vae', but it has options for 'teacher'"),
        ({"optimizer": {"name": "lion"}}, r"optimizer\.name is 'lion'; adamw or muon is needed"),
        ({"optimizer": {"schedule": "linear"}}, "schedule is 'linear'"),
        ({"optimizer": {"warmup_steps": 0}}, "warmup_steps is 0; a positive whole number is needed, or null for none"),
        ({"remat": 1}, "remat is 1; true or false is needed"),
        (
            {"stage": "self_forcing", "self_forcing": {"critic": {"learning_rate": -1}}},
            r"^self_forcing\.critic\.learning_rate is -1",
        ),
        ({"optimizer": {"learning_rate": 0}}, "learning_rate is 0"),
        ({"optimizer": {"betas": [0.9]}}, r"betas is \[0\.9\]"),
        ({"optimizer": {"clip_norm": 0}}, "clip_norm is 0"),
        ({"optimizer": {"weight_decay": -1}}, "weight_decay is -1"),
        ({"ema": {"decay": 1}}, "decay is 1"),
        ({"stage": "causal", "causal": {"forcing": "none"}}, r"causal\.forcing is 'none'"),
        ({"stage": "causal", "causal": {"drop_prompt": 2}}, r"causal\.drop_prompt is 2"),
        ({"stage": "teacher", "teacher": {"drop_prompt": -0.1}}, r"teacher\.drop_prompt is -0\.1"),
        ({"stage": "teacher", "teacher": {"logit_normal": [0.4]}}, r"teacher\.logit_normal is \[0\.4\]; a mean and"),
        ({"stage": "teacher", "teacher": {"logit_normal": [0, 0]}}, r"teacher\.logit_normal is \[0\.0, 0\.0\]"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.from_dict(SMALLEST | change)


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_own_defaults_are_written_out(stage):
    config = TrainConfig.from_dict(SMALLEST | {"stage": stage})
    written = config.to_dict()
    assert written[stage] == config.options.to_dict()
    assert {name for name in STAGES if name in written} == {stage}
    assert TrainConfig.from_dict(SMALLEST | {"stage": stage, stage: written[stage]}) == config


def test_nothing_is_an_empty_text(tmp_path):
    """As in `weak_teacher:` with nothing behind it, or `--set self_forcing.weak_teacher=`."""
    path = tmp_path / "run.yaml"
    led = "self_forcing: {weak_teacher: c, weak_guidance: 1}"
    path.write_text(f"{{stage: self_forcing, init: a, data: {{path: b}}, {led}}}")
    none = {"self_forcing.weak_teacher": "", "self_forcing.weak_guidance": "0"}
    assert load_train_config(path, none).options.weak_teacher == ""


def test_single_settings_take_the_place_of_the_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stage: vae\ninit: start\ndata: {path: clips}\nsteps: 5\n")
    config = load_train_config(path, {"steps": "7", "optimizer.learning_rate": "3e-4", "data.frames": "9"})
    assert (config.steps, config.optimizer.learning_rate, config.data.frames) == (7, 3e-4, 9)
    with pytest.raises(UserError, match=r"steps of run\.yaml is 5, which has no settings"):
        load_train_config(path, {"steps.more": "1"})
    with pytest.raises(UserError, match="is not a YAML value"):
        load_train_config(path, {"init": "[1"})
