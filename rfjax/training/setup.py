"""From a run's configuration to everything the loop needs: sizes, networks, stage and data, all checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rfjax.config import ModelConfig, TransformerConfig
from rfjax.data.reading import (
    Crop,
    Dataset,
    Prompts,
    Transform,
    check_crop,
    check_window,
    open_dataset,
    tokenise,
    window,
)
from rfjax.errors import UserError
from rfjax.io.checkpoints import TOKENIZER, load_checkpoint_config, load_network
from rfjax.io.remote import local
from rfjax.memory import parse
from rfjax.models.functional import AnyArray, Params
from rfjax.models.text_encoder import encode_tokens
from rfjax.models.tokenizer import Tokenizer
from rfjax.training.config import DataConfig, SelfForcingOptions, TrainConfig
from rfjax.training.stage import Stage
from rfjax.training.stages.causal import CausalStage
from rfjax.training.stages.ode import ODEStage
from rfjax.training.stages.self_forcing import SelfForcingStage
from rfjax.training.stages.teacher import TeacherStage
from rfjax.training.stages.vae import VAEStage

FIELDS = {"vae": "video", "teacher": "latents", "causal": "latents", "ode": "trajectory", "self_forcing": None}
"""What a stage reads of an example besides its prompt."""
TEACHERS = ("teacher", "weak_teacher")
SHARED_SIZES = ("patch_size", "in_dim", "out_dim", "text_dim", "text_len")
"""What scores of other sizes have in common with the generator."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, ready to be started."""

    stage: Stage
    model: ModelConfig
    params: dict[str, dict[str, Params]]
    """float32, by player and network."""
    frozen: dict[str, Any]
    """Networks and embeddings that do not learn, in the type of the computation."""
    source: Any
    """Examples by number."""
    transforms: tuple[Transform, ...]
    """From an example to what the stage reads of it."""
    tokenizer: Tokenizer | None


def prepare(config: TrainConfig) -> Setup:
    """Open the data, load the networks and make the stage.

    Raises:
        UserError: a checkpoint or dataset is missing, lacks a part that the stage needs, or does not fit.
    """
    folder = local(config.init)
    model = load_checkpoint_config(folder)
    _check_sample(config, model)
    stage, tokenizer = _stage(config, model, folder), _tokenizer(folder, model)
    source, transforms = _open_data(config, model, tokenizer)
    params = {stage.players[0]: {name: load_network(folder, name, "float32") for name in _learning_networks(config)}}
    frozen = _frozen_networks(config, folder, has_embeds="prompt_embeds" in source[0])
    if config.stage == "self_forcing":
        params["critic"] = {"transformer": _first_critic(config, model)}
        for option in TEACHERS:
            if teacher := getattr(config.options, option):
                frozen[option] = load_network(local(teacher), "transformer", config.dtype)
    frozen |= _fixed_prompts(config, model, folder, tokenizer, frozen)
    return Setup(stage, model, params, frozen, source, transforms, tokenizer)


def _tokenizer(folder: Path, model: ModelConfig) -> Tokenizer | None:
    path = folder / TOKENIZER
    return Tokenizer.load(path, model.transformer.text_len) if path.is_dir() else None


def _check_sample(config: TrainConfig, model: ModelConfig) -> None:
    """Check the length of sample videos now: it would stop the run when the first is made."""
    sample, chunk = config.sample, model.chunk_frames
    if sample is not None and config.stage in ("causal", "ode", "self_forcing") and sample.latent_frames % chunk:
        raise UserError(
            f"sample.latent_frames is {sample.latent_frames}; stage {config.stage} makes videos in chunks of {chunk}"
        )


def _open_data(
    config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[Any, tuple[Transform, ...]]:
    data = config.data
    source = open_dataset(local(data.path), data.split)
    if isinstance(source, Prompts) and data.split != DataConfig.split:
        raise UserError(f"data.split is {data.split!r}, but {data.path} is a text file, which has no splits; remove it")
    field = FIELDS[config.stage]
    transforms: list[Transform] = []
    wanted = {field} - {None}
    if field is not None:
        _check_examples(config, model, source[0], field)
        # Beside videos, latents are what the decoder makes them of.
        paired = model.vae if field == "video" and "latents" in source[0] else None
        wanted |= {"latents"} if paired else set()
        if data.frames is not None and isinstance(source, Dataset):
            check_window(source, field, data.frames)
            transforms.append(window(field, data.frames))
            if paired:
                transforms.append(window("latents", 1 + (data.frames - 1) // paired.temporal_factor))
        if data.crop is not None and isinstance(source, Dataset):
            height, width = data.crop
            check_crop(source, (height, width))
            transforms.append(Crop(height, width))
    if config.stage != "vae":
        if "prompt_embeds" in source[0]:
            _check_embeds(config, model, source[0]["prompt_embeds"].shape)
        transforms.append(tokenise(tokenizer))
        wanted |= {"ids", "mask", "prompt_embeds"}
    transforms.append(lambda example: {key: np.asarray(value) for key, value in example.items() if key in wanted})
    return source, tuple(transforms)


def _check_examples(config: TrainConfig, model: ModelConfig, example: Mapping[str, Any], field: str) -> None:
    path = config.data.path
    if field not in example:
        raise UserError(
            f"stage {config.stage} reads {field!r}, but the examples of {path} have {', '.join(sorted(example))}"
        )
    if field == "video":
        if "latents" in example:
            _check_pairs(config, model, example["latents"].shape[-1])
        return
    *_, height, width, channels = example[field].shape
    if channels != model.transformer.in_dim:
        raise UserError(
            f"the {field} of {path} have {channels} channels, but the transformer of {config.init} takes "
            f"{model.transformer.in_dim}; encode the clips with its own autoencoder"
        )
    for name, size, patch in zip(("rows", "columns"), (height, width), model.transformer.patch_size[1:], strict=True):
        if size % patch:
            raise UserError(f"the {field} of {path} have {size} {name}; a multiple of the patch's {patch} is needed")


def _check_embeds(config: TrainConfig, model: ModelConfig, shape: tuple[int, ...]) -> None:
    path = config.data.path
    if _trains_text(config):
        raise UserError(
            f"teacher.train_text_encoder is true, but {path} has the prompts' embeddings already; set it to false, or "
            "make the latents without --embed-prompts"
        )
    for name, size, wanted in zip(
        ("tokens", "channels"), shape, (model.transformer.text_len, model.transformer.text_dim), strict=True
    ):
        if size != wanted:
            raise UserError(
                f"the prompt_embeds of {path} have {size} {name}, but the transformer of {config.init} takes {wanted}; "
                "embed the prompts with its own text encoder"
            )


def _check_pairs(config: TrainConfig, model: ModelConfig, channels: int) -> None:
    path = config.data.path
    if not config.options.decoder_only:
        raise UserError(
            f"the videos of {path} have latents beside them, from which the decoder alone can learn; "
            "set vae.decoder_only to true"
        )
    if config.data.crop is not None:
        raise UserError(
            f"data.crop is {list(config.data.crop)}, but the latents of {path} are of whole pictures, whose decoder "
            "sees beyond such a piece; remove it"
        )
    if model.vae and channels != model.vae.z_dim:
        raise UserError(
            f"the latents of {path} have {channels} channels, but the autoencoder of {config.init} takes "
            f"{model.vae.z_dim}; make them with its own checkpoint"
        )


def _learning_networks(config: TrainConfig) -> tuple[str, ...]:
    if config.stage == "vae":
        return ("vae",)
    return ("transformer", "text_encoder") if _trains_text(config) else ("transformer",)


def _trains_text(config: TrainConfig) -> bool:
    return config.stage == "teacher" and config.options.train_text_encoder


def _frozen_networks(config: TrainConfig, folder: Path, has_embeds: bool) -> dict[str, Any]:
    frozen: dict[str, Any] = {}
    if config.stage == "vae":
        return frozen
    if not _trains_text(config) and not has_embeds:
        frozen["text_encoder"] = load_network(folder, "text_encoder", config.dtype)
    if config.sample is not None or _reencodes(config):
        frozen["vae"] = load_network(folder, "vae", config.dtype)
    return frozen


def _reencodes(config: TrainConfig) -> bool:
    options = config.options
    return isinstance(options, SelfForcingOptions) and options.latent_frames > options.window_frames


def _teacher_sizes(config: TrainConfig, model: ModelConfig, option: str) -> TransformerConfig | None:
    """Sizes of a real score, which has to read what the generator reads and writes."""
    folder = getattr(config.options, option)
    if not folder:
        return None
    sizes = load_checkpoint_config(local(folder)).transformer
    _check_sizes(config, model, option, sizes, SHARED_SIZES, "a teacher of the same latents and prompts is needed")
    return sizes


def _first_critic(config: TrainConfig, model: ModelConfig) -> Params:
    option = "critic_init" if config.options.critic_init else "teacher"
    folder = local(getattr(config.options, option))
    sizes = load_checkpoint_config(folder).transformer
    needed = "name a checkpoint of the generator's sizes in self_forcing.critic_init, for the critic to begin as"
    _check_sizes(config, model, option, sizes, [field.name for field in dataclasses.fields(sizes)], needed)
    return load_network(folder, "transformer", "float32")


def _check_sizes(
    config: TrainConfig, model: ModelConfig, option: str, sizes: TransformerConfig, names: Sequence[str], needed: str
) -> None:
    for name in names:
        own, other = getattr(model.transformer, name), getattr(sizes, name)
        if own != other:
            raise UserError(
                f"self_forcing.{option} {getattr(config.options, option)} has transformer.{name} {other}, but the "
                f"generator {config.init} has {own}; {needed}"
            )


def _fixed_prompts(
    config: TrainConfig, model: ModelConfig, folder: Path, tokenizer: Tokenizer | None, frozen: Mapping[str, Any]
) -> dict[str, AnyArray]:
    """The prompts that the run itself uses: tokens where the text encoder learns, else embeddings.

    They are what stands for a dropped or negative prompt, and those of the sample videos.
    """
    texts = {}
    if config.stage in ("teacher", "causal", "self_forcing"):
        texts["negative"] = [getattr(config.options, "negative_prompt", "")]
    if config.stage != "vae" and config.sample is not None:
        texts["sample"] = list(config.sample.prompts)
    if not texts:
        return {}
    if tokenizer is None or model.umt5 is None:
        raise UserError(
            f"the checkpoint {config.init} lacks a text encoder or tokenizer; stage {config.stage} needs both"
        )
    tokens = {name: tokenizer(prompts) if any(prompts) else tokenizer.nothing() for name, prompts in texts.items()}
    if _trains_text(config):
        return {
            f"{name}_{part}": a for name, pair in tokens.items() for part, a in zip(("ids", "mask"), pair, strict=True)
        }
    # Loaded for these alone where the data has embeddings, and let go of.
    params = frozen.get("text_encoder") or load_network(folder, "text_encoder", config.dtype)
    return {
        f"{name}_embeds": encode_tokens(model.umt5, params, *map(jnp.asarray, pair)) for name, pair in tokens.items()
    }


def _stage(config: TrainConfig, model: ModelConfig, folder: Path) -> Stage:
    options = config.options
    if config.stage == "vae":
        if model.vae is None:
            raise UserError(f"the checkpoint {folder} has no vae to train")
        return VAEStage(model.vae, options)
    if config.stage == "teacher":
        return TeacherStage(model, options, config.remat)
    if config.stage == "causal":
        return CausalStage(model, options, config.remat)
    if config.stage == "ode":
        return ODEStage(model, config.remat)
    policy = parse(options.policy, {key: str(value) for key, value in options.settings.items()})
    if not options.teacher:
        raise UserError("self_forcing.teacher is missing; name the checkpoint folder of the real score")
    return SelfForcingStage(
        config=model,
        policy=policy,
        latent_frames=options.latent_frames,
        latent_size=(model.latent_height, model.latent_width),
        window_frames=options.window_frames,
        guidance=options.guidance,
        weak_guidance=options.weak_guidance,
        teacher=_teacher_sizes(config, model, "teacher"),
        weak_teacher=_teacher_sizes(config, model, "weak_teacher"),
        generator_every=options.generator_every,
        remat=config.remat,
    )
