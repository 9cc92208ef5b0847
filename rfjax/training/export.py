"""From a finished run to a checkpoint folder that generation and the next stage load."""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rfjax.config import ModelConfig, VAEConfig
from rfjax.data.reading import batches
from rfjax.errors import UserError
from rfjax.io.atomic import temporary_name
from rfjax.io.checkpoints import TOKENIZER, save
from rfjax.io.remote import local
from rfjax.models.functional import Params
from rfjax.models.vae import posterior
from rfjax.sampling.codec import to_unit
from rfjax.training.config import TrainConfig
from rfjax.training.setup import Setup


def export(config: TrainConfig, setup: Setup, networks: Mapping[str, Params], folder: Path) -> None:
    """Write a checkpoint folder, in place of an older one, which stays until the new one is complete.

    Args:
        config: of the run; networks that it did not train are copied from its `init`.
        setup: of the run.
        networks: what was trained, by name.
        folder: to be written, in the run's own folder.

    Raises:
        UserError: the folder cannot be written.
    """
    model = setup.model
    if config.stage == "vae" and not config.options.decoder_only:
        model = _with_statistics(config, setup, networks["vae"])
    init = local(config.init)
    tokenizer, whole, older = init / TOKENIZER, temporary_name(folder), temporary_name(folder)
    _remove(*folder.parent.glob(".rfjax-*.part"))  # of a process that was killed here
    try:
        save(whole, model, networks, tokenizer if tokenizer.is_dir() else None, rest=init)
        if folder.is_dir():  # of the same run, perhaps with fewer steps
            folder.rename(older)
        whole.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        _remove(whole, older)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _with_statistics(config: TrainConfig, setup: Setup, params: Params) -> ModelConfig:
    """Put the mean and standard deviation of each latent channel into the autoencoder's configuration."""
    assert setup.model.vae is not None
    reader = batches(setup.source, batch_size=config.batch_size, seed=config.seed, transforms=setup.transforms)
    videos = (batch["video"] for batch in itertools.islice(reader, config.options.statistics_batches))
    mean, std = latent_statistics(setup.model.vae, params, videos)
    return dataclasses.replace(setup.model, vae=dataclasses.replace(setup.model.vae, latent_mean=mean, latent_std=std))


def latent_statistics(
    config: VAEConfig, params: Params, videos: Iterable[np.ndarray]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the posterior's mean, for each channel.

    Args:
        config: sizes.
        params: of `WanVAE`.
        videos: batches of 8-bit video [B, T, H, W, 3]; one device encodes them, a video at a time.
    """
    encode = jax.jit(functools.partial(posterior, config))
    moments = []
    for video in itertools.chain.from_iterable(videos):
        latents = encode(params, to_unit(video[None]))[0].astype(jnp.float32)
        moments.append(jnp.stack([latents.mean((0, 1, 2, 3)), jnp.square(latents).mean((0, 1, 2, 3))]))
    mean, square = np.mean(np.asarray(moments, np.float64), axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return tuple(float(round(m, 6)) for m in mean), tuple(float(round(s, 6)) for s in std)
