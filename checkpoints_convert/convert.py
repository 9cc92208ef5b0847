"""From checkpoints as they are published to an rfjax checkpoint folder."""

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints_convert.infer import guess_settings, infer_sizes
from checkpoints_convert.matching import Matched, check, flatten, match, to_rfjax
from checkpoints_convert.names import Rule
from checkpoints_convert.networks import NETWORKS, Network
from checkpoints_convert.sources import Source, find_tokenizer, open_source
from checkpoints_convert.tensors import StoredTensor
from rfjax.config import ModelConfig, preset_path, read_mapping
from rfjax.errors import UserError
from rfjax.io.checkpoints import LazyArray, check_dtype, check_output, parameter_trees, save
from rfjax.io.paths import existing_above
from rfjax.models.functional import Params
from rfjax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Opened:
    """A network's checkpoint, opened and sorted but not yet checked."""

    source: Source
    matched: Matched
    sizes: Mapping[str, Any]
    """Settings that its tensors determine."""
    guesses: Mapping[str, Any]
    """Settings that they leave open."""


def convert(
    transformer: Path,
    output: Path,
    *,
    transformer_key: str | None = None,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    tokenizer: Path | None = None,
    config: Path | None = None,
    preset: str | None = None,
    dtype: str = "float32",
    report: Callable[[str], None] = print,
) -> ModelConfig:
    """Convert published checkpoints into an rfjax checkpoint folder, whole or not at all.

    Args:
        transformer: File or folder of the transformer.
        output: Folder to create.
        transformer_key: Which state dict of a `.pt` file, `generator_ema` if there is one.
        vae: File or folder of the autoencoder.
        text_encoder: File or folder of the text encoder.
        tokenizer: Folder of the tokenizer.
        config: YAML or JSON file whose settings take precedence over those read off the tensors.
        preset: Name of such a file in `configs/convert`, over which `config` takes precedence; it may also name the
            state dict to be preferred in a `.pt` file.
        dtype: `float32` or `bfloat16`, the type to write.
        report: Takes each line meant for the user.

    Returns:
        The configuration that was written.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    kind = check_dtype(dtype)
    target = check_output(output)
    given = read_mapping(preset_path("convert", preset)) if preset else {}
    preferred = given.pop("transformer_key", None)
    given |= read_mapping(config) if config else {}
    paths = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    keys = {"transformer": (transformer_key, preferred)}
    opened = {
        name: _open(path, NETWORKS[name], *keys.get(name, (None, None)))
        for name, path in paths.items()
        if path is not None
    }
    model_config = _configuration(opened, given, str(config or preset or ""))
    trees = {
        name: _plan(opened[name], expected, model_config.transformer.patch_size, kind)
        for name, expected in parameter_trees(model_config).items()
    }
    folder = find_tokenizer(tokenizer) if tokenizer is not None else None
    if folder is not None:
        Tokenizer.load(folder, model_config.transformer.text_len)
    sizes = {name: sum(math.prod(leaf.shape) for _, leaf in flatten(tree)) for name, tree in trees.items()}
    _check_space(target, sum(sizes.values()) * kind.itemsize)
    for name, parameters in sizes.items():
        report(_summary(opened[name], parameters, kind))
    save(output, model_config, trees, folder)
    report(f"wrote {output}")
    return model_config


def _open(path: Path, network: Network, key: str | None, preferred: str | None) -> Opened:
    source = open_source(path, network.name, key, preferred)
    matched = match(source.label, network, source.tensors)
    sizes = infer_sizes(matched, {name: tensor.shape for name, tensor in source.tensors.items()})
    return Opened(source, matched, sizes, guess_settings(matched, sizes, source.settings))


def _configuration(opened: Mapping[str, Opened], given: Mapping[str, Any], where: str) -> ModelConfig:
    """Combine what the tensors say, what was guessed and what the user's file says.

    Raises:
        UserError: the file has unknown keys or contradicts the tensors, or a setting is known from neither.
    """
    values = {("umt5" if key == "text_encoder" else key): value for key, value in given.items()}
    if "umt5" in given and "text_encoder" in given:
        raise UserError(f"{where} has both umt5 and text_encoder, which mean the same; leave one out")
    # The whole file is checked, also the sections of networks that are not converted now.
    for network in NETWORKS.values():
        section = values.get(network.section, {})
        if network.name not in opened or not isinstance(section, Mapping):
            continue
        found = opened[network.name]
        if network.name == "transformer" and "num_heads" not in {**found.guesses, **section}:
            raise UserError(
                f"{found.source.label} has dim {found.sizes['dim']}, which is no multiple of 128, Wan's usual head "
                "dimension; give transformer.num_heads with --config"
            )
        values[network.section] = {**found.guesses, **found.sizes, **section}
    config = ModelConfig.from_dict(values, where or "the checkpoint")
    for network in NETWORKS.values():
        if network.name in opened:
            _check_sizes(opened[network.name], getattr(config, network.section), network.section, where)
    absent = {n.section: None for n in NETWORKS.values() if n.name not in opened}
    return dataclasses.replace(config, **absent)


def _check_sizes(opened: Opened, config: Any, section: str, where: str) -> None:
    for name, size in opened.sizes.items():
        size = tuple(size) if isinstance(size, list) else size
        if (setting := getattr(config, name)) != size:
            raise UserError(
                f"{where} has {section}.{name} {setting!r}, but the tensors of {opened.source.label} say {size!r}"
            )


def _plan(opened: Opened, expected: Params, patch: tuple[int, ...], dtype: np.dtype[Any]) -> Params:
    """Return the network's parameters as leaves that read their tensors when they are written."""
    tensors, matched = opened.source.tensors, opened.matched
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check(matched, shapes, {name: tensor.dtype for name, tensor in tensors.items()}, expected, patch)
    _check_tied(matched, tensors)

    def leaf(keys: tuple[Any, ...], abstract: Any) -> LazyArray:
        path = ".".join(str(key.key) for key in keys)
        rule, _ = matched.rule(path)
        layers = range(abstract.shape[0] if rule.stacked else 1)
        stored = tuple(tensors[matched.slots[path, layer][0]] for layer in layers)
        read = functools.partial(_read, stored, rule, abstract.shape, dtype)
        return LazyArray(abstract.shape, dtype, rule.stacked, read)

    return jax.tree_util.tree_map_with_path(leaf, expected)


def _read(
    stored: tuple[StoredTensor, ...],
    rule: Rule,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    start: int,
    stop: int,
) -> np.ndarray:
    """Read rows of a parameter, a layer a row where layers are stacked."""
    if not rule.stacked:
        return np.array(to_rfjax(stored[0].load(), rule.pattern)[start:stop], dtype, order="C")
    values = np.empty((stop - start, *shape[1:]), dtype)
    for row, tensor in zip(values, stored[start:stop], strict=True):
        row[...] = to_rfjax(tensor.load(), rule.pattern)
    return values


def _check_tied(matched: Matched, tensors: Mapping[str, StoredTensor]) -> None:
    """Make sure that a tensor stored under two names is the same one."""
    for names in matched.slots.values():
        if len(names) != 2:
            continue
        first, second = (tensors[name] for name in names)
        rows = max(1, 2**26 // math.prod(first.shape[1:]))
        for start in range(0, first.shape[0], rows):
            # Mapped anew for each block, so that the pages read do not add up.
            blocks = [tensor.load()[start : start + rows].tobytes() for tensor in (first, second)]
            if first.dtype != second.dtype or blocks[0] != blocks[1]:
                raise UserError(f"{matched.label} holds two different tensors for one parameter: {' and '.join(names)}")


def _check_space(output: Path, size: int) -> None:
    free = shutil.disk_usage(existing_above(output)).free
    if free < size:
        raise UserError(f"cannot write {output}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _summary(opened: Opened, parameters: int, dtype: np.dtype[Any]) -> str:
    size = parameters * dtype.itemsize
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    return (
        f"{opened.matched.network.name}: {len(opened.source.tensors)} tensors, {parameters:,} parameters, {shown} in "
        f"{dtype.name}, from {opened.source.label} ({opened.matched.layout} names)"
    )
