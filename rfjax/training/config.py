"""A training run, read strictly from YAML: one stage, its data, its optimizer and what is kept."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rfjax.config import _Config, preset_path, read_mapping
from rfjax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Config):
    """What is read."""

    path: str = ""
    """A dataset's folder, or a text file with a prompt a line where only prompts are needed."""
    split: str = "train"
    frames: int | None = None
    """Window of each example: its first video frames (stage `vae`) or latent frames; None takes whole clips."""
    crop: tuple[int, ...] | None = None
    """Rows and columns of a random piece of the pictures (stage `vae`); None takes whole pictures."""

    def __post_init__(self):
        if self.crop is not None and len(self.crop) != 2:
            raise UserError(f"data.crop is {list(self.crop)}; rows and columns are needed, such as [32, 48]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Config):
    """The optimizer, with the learning rate that it follows."""

    name: str = "adamw"
    """`adamw`, or `muon`: Muon for the matrices of the layers, AdamW for all else, at the same learning rate."""
    learning_rate: float = 1e-4
    """Its highest value."""
    schedule: str = "constant"
    """After warming up: `constant`, or `cosine` down to 1% at the last step."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises linearly from 0."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 0.01
    clip_norm: float | None = None
    """Largest norm of a gradient, all parameters together."""

    def check(self, where: str) -> None:
        """Check the values of the optimizer that the run has at `where`.

        Raises:
            UserError: one is out of its range.
        """
        if self.name not in ("adamw", "muon"):
            raise UserError(f"{where}.name is {self.name!r}; adamw or muon is needed")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"{where}.schedule is {self.schedule!r}; constant or cosine is needed")
        if self.learning_rate <= 0:
            raise UserError(f"{where}.learning_rate is {self.learning_rate:g}; a positive number is needed")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{where}.betas is {list(self.betas)}; two numbers from 0 to below 1 are needed")
        if self.weight_decay < 0:
            raise UserError(f"{where}.weight_decay is {self.weight_decay:g}; a number from 0 on is needed")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"{where}.clip_norm is {self.clip_norm:g}; a positive number is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig(_Config):
    """The running average of the parameters, which is what the run exports."""

    decay: float = 0.99
    from_step: int | None = None
    """Before this step the average is the parameters themselves."""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay is {self.decay:g}; a number from 0 to below 1 is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(_Config):
    """How devices share the work."""

    data: int | None = None
    """Groups of devices with whole copies of the parameters; None: as many as there are devices for."""
    fsdp: int = 1
    """Devices of a group, each with its share of every large parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Config):
    """What is kept of the run's states."""

    every: int = 100
    """Steps between two."""
    keep: int = 2
    """How many of the newest stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(_Config):
    """Videos that show how training goes."""

    every: int = 500
    """Steps between two times."""
    prompts: tuple[str, ...] = ()
    latent_frames: int = 21
    """Length."""


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"{name} is {share:g}; a number from 0 to 1 is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEOptions(_Config):
    """Stage `vae`."""

    kl_weight: float = 1e-6
    """Of the KL divergence from a standard normal, per latent number."""
    squared_weight: float = 1.0
    """Of the mean squared error of the pixels, added to the mean absolute one."""
    statistics_batches: int = 16
    """Batches of latents of which the exported mean and standard deviation are taken."""
    decoder_only: bool = False
    """Whether the encoder stays as it is, so that latents made with it, and networks trained on them, stay of use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions(_Config):
    """Stage `teacher`."""

    drop_prompt: float = 0.1
    """Share of the examples that learn without a prompt, for guidance."""
    train_text_encoder: bool = False
    """Whether the text encoder learns as well; else it stays as it was loaded."""
    guidance: float = 3.0
    """Of the sample videos."""
    logit_normal: tuple[float, ...] | None = None
    """Mean and standard deviation of the logit of the timestep's place on the grid, from 0 (clean) to 1 (noise);
    without them, all timesteps of the grid are drawn alike."""

    def __post_init__(self):
        _check_share("teacher.drop_prompt", self.drop_prompt)
        drawn = self.logit_normal
        if drawn is not None and not (len(drawn) == 2 and drawn[1] > 0):
            raise UserError(
                f"teacher.logit_normal is {list(drawn)}; a mean and a standard deviation above 0 are needed, "
                "such as [0, 1]"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalOptions(_Config):
    """Stage `causal`."""

    forcing: str = "teacher"
    """`teacher`: noisy chunks see the clean past; `diffusion`: every chunk has a noise level of its own."""
    drop_prompt: float = 0.1
    """Share of the examples that learn without a prompt."""

    def __post_init__(self):
        _check_share("causal.drop_prompt", self.drop_prompt)
        if self.forcing not in ("teacher", "diffusion"):
            raise UserError(f"causal.forcing is {self.forcing!r}; teacher or diffusion is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODEOptions(_Config):
    """Stage `ode`, which has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfForcingOptions(_Config):
    """Stage `self_forcing`."""

    teacher: str = ""
    """Checkpoint of the real score; it may have other sizes than the generator."""
    critic_init: str = ""
    """Checkpoint that the critic begins as, of the generator's sizes; none is that of `teacher`."""
    policy: str = "self_forcing"
    """Memory of the rollout, as `rfjax generate --policy` takes it."""
    settings: dict = dataclasses.field(default_factory=dict)
    """Of the policy."""
    latent_frames: int = 21
    """Length of the rollout; the loss sees the last `window_frames`."""
    window_frames: int = 21
    """What the scores see."""
    guidance: float = 3.0
    """Coefficient of cond - uncond, added to cond."""
    negative_prompt: str = ""
    """Prompt of the real score's other side; none is the end-of-sequence token alone."""
    weak_teacher: str = ""
    """Checkpoint of a worse network, such as an earlier or a smaller one, that the real score is led away from
    (autoguidance, arXiv 2406.02507)."""
    weak_guidance: float = 0.0
    """Coefficient of cond - weak, added to the real score."""
    generator_every: int = 5
    """The critic learns at every step, the generator at every so many."""
    critic: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self):
        if self.weak_guidance < 0 or bool(self.weak_teacher) != bool(self.weak_guidance):
            raise UserError(
                f"self_forcing.weak_teacher is {self.weak_teacher!r} and weak_guidance {self.weak_guidance:g}; "
                "they go together: name a checkpoint and a coefficient above 0, or neither"
            )


_OPTIONS = {
    "vae": VAEOptions,
    "teacher": TeacherOptions,
    "causal": CausalOptions,
    "ode": ODEOptions,
    "self_forcing": SelfForcingOptions,
}
STAGES = tuple(_OPTIONS)
"""In the order in which a model goes through them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(_Config):
    """One run of one stage."""

    description: str = ""
    stage: str = ""
    init: str = ""
    """Checkpoint folder to begin with; what the stage does not train is exported unchanged."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    steps: int = 1000
    batch_size: int = 8
    """Examples of one step, over all devices and processes."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema: EMAConfig | None = None
    dtype: str = "float32"
    """Of the networks' computation (`bfloat16` or `float32`); parameters are float32."""
    remat: bool = False
    """Whether activations are computed again in the backward pass, a layer at a time, to save memory."""
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log_every: int = 10
    """Steps between two lines of metrics."""
    sample: SampleConfig | None = None
    vae: VAEOptions | None = None
    """Of this and the next four the run's stage has its own, by default if the file has none; the others are None."""
    teacher: TeacherOptions | None = None
    causal: CausalOptions | None = None
    ode: ODEOptions | None = None
    self_forcing: SelfForcingOptions | None = None

    def __post_init__(self):
        for name in STAGES:
            if name != self.stage and getattr(self, name) is not None:
                raise UserError(f"the run's stage is {self.stage!r}, but it has options for {name!r}; remove them")
        if self.stage in STAGES and getattr(self, self.stage) is None:
            object.__setattr__(self, self.stage, _OPTIONS[self.stage]())
        self.optimizer.check("optimizer")
        if self.self_forcing is not None:
            self.self_forcing.critic.check("self_forcing.critic")
        self._check_use()
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size is {self.batch_size}; a multiple of accumulate ({self.accumulate}) is needed")
        if self.vae is not None and self.vae.decoder_only and self.optimizer.weight_decay:
            raise UserError(
                f"optimizer.weight_decay is {self.optimizer.weight_decay:g}; with vae.decoder_only, 0 is needed, "
                "lest the encoder's parameters decay"
            )

    def _check_use(self) -> None:
        """Refuse what the stage has no use for, and miss what it needs."""
        if self.data.crop is not None and self.stage != "vae":
            raise UserError(f"data.crop is {list(self.data.crop)}, but stage {self.stage} reads no pictures; remove it")
        if self.data.frames is not None and self.stage == "self_forcing":
            raise UserError(
                f"data.frames is {self.data.frames}, but stage self_forcing reads prompts alone; the length of its "
                "rollouts is self_forcing.latent_frames"
            )
        if self.remat and self.stage == "vae":
            raise UserError("remat is true, but stage vae has none; a larger accumulate or data.crop needs less memory")
        if self.sample is None:
            return
        if self.stage != "vae" and not self.sample.prompts:
            raise UserError("sample.prompts is missing; name a prompt or more, or leave sample out")
        for name in ("prompts", "latent_frames") if self.stage == "vae" else ():
            if (value := getattr(self.sample, name)) != getattr(SampleConfig, name):
                raise UserError(f"sample.{name} is {value!r}, but stage vae shows clips of its data; remove it")

    @property
    def options(self) -> Any:
        """The stage's own options."""
        return getattr(self, self.stage)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "train") -> "TrainConfig":
        """Build from a mapping.

        Raises:
            UserError: as `_Config.from_dict`, an unknown stage, or a value out of its range.
        """
        values = dict(values)
        stage = values.get("stage")
        if stage not in STAGES:
            raise UserError(
                f"{where}.stage is {stage!r}; one of {', '.join(STAGES)} is needed{nearest(str(stage), STAGES)}"
            )
        seed = values.pop("seed", 0)  # a number that may be 0
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(f"{where}.seed is {seed!r}; a whole number from 0 to {2**32 - 1} is needed")
        config = dataclasses.replace(super().from_dict(values, where), seed=seed)
        if not config.data.path:
            raise UserError(f"{where}.data.path is missing; name a dataset's folder (see rfjax data --help)")
        if not config.init:
            raise UserError(f"{where}.init is missing; name the checkpoint folder to begin with")
        if config.dtype not in ("float32", "bfloat16"):
            raise UserError(f"{where}.dtype is {config.dtype!r}; float32 or bfloat16 is needed")
        return config


def find_config(text: str) -> Path:
    """Return the path of a run's configuration: a YAML file's own, or that of `configs/train/NAME.yaml`.

    Raises:
        UserError: there is no shipped configuration of this name.
    """
    return Path(text) if text.endswith((".yaml", ".yml", ".json")) or "/" in text else preset_path("train", text)


def load_train_config(path: Path, settings: Mapping[str, str] | None = None) -> TrainConfig:
    """Read a run's configuration and put single settings in place of the file's.

    Args:
        path: YAML or JSON.
        settings: values as YAML text by dotted name, such as `{"optimizer.learning_rate": "1e-4"}`.

    Raises:
        UserError: no such file, an unknown key, or a wrong value.
    """
    values = read_mapping(path)
    for name, text in (settings or {}).items():
        *parents, last = name.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UserError(f"--set {name}: {parent} of {path.name} is {inner!r}, which has no settings")
        try:
            inner[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {name}: {text!r} is not a YAML value") from None
    return TrainConfig.from_dict(values, where=path.name)
