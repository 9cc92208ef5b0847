"""From an rfjax checkpoint folder back to safetensors under upstream's names."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.matching import flatten, rule_for, source_shape, to_torch
from checkpoints_convert.names import Rule
from checkpoints_convert.networks import NETWORKS, Network
from checkpoints_convert.safetensors_file import write_safetensors
from rfjax.errors import UserError
from rfjax.io import checkpoints
from rfjax.io.atomic import write_json
from rfjax.io.paths import kind_of

CONFIG = "rfjax_config.json"
"""Sizes and rollout settings in the form that `--config` takes; named so that no other tool mistakes it for its own."""
_TOKENIZER = Path("google") / "umt5-xxl"


def export(checkpoint: Path, output: Path, report: Callable[[str], None] = print) -> None:
    """Write an rfjax checkpoint as safetensors under upstream's names, in the type it is stored in.

    Args:
        checkpoint: Folder that `convert` or training wrote.
        output: Folder to create; it gets upstream's layout, with `rfjax_config.json` for the way back.
        report: Takes each line meant for the user.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    checkpoints.check_output(output)
    config = checkpoints.load_checkpoint_config(checkpoint)
    trees = checkpoints.parameter_trees(config)
    types = {name: _one_type(checkpoint / name, tree) for name, tree in trees.items()}

    def write(folder: Path) -> None:
        for name, tree in trees.items():
            network = NETWORKS[name]
            shapes = upstream_shapes(network, tree, config.transformer.patch_size)
            values = _values(checkpoint / name, network, tree, config.transformer.patch_size)
            write_safetensors(folder / network.upstream_file, shapes, types[name], values)
            parameters = sum(math.prod(shape) for shape in shapes.values())
            report(f"{name}: {len(shapes)} tensors, {parameters:,} parameters in {types[name]}")
        if kind_of(checkpoint / checkpoints.TOKENIZER, "the folder") == "folder":
            checkpoints.copy_tokenizer(checkpoint / checkpoints.TOKENIZER, folder / _TOKENIZER)
        write_json(folder / CONFIG, config.to_dict())

    checkpoints.write_folder(output, write)
    report(f"wrote {output}")


def _one_type(folder: Path, tree: Mapping[str, Any]) -> str:
    types = set(checkpoints.stored_types(folder, dict(tree)).values())
    if len(types) != 1 or not types <= set(checkpoints.DTYPES):
        raise UserError(f"{folder} holds parameters of the types {', '.join(sorted(types))}; a single one is needed")
    return types.pop()


def _layers(network: Network, path: str, shape: tuple[int, ...]) -> tuple[Rule, list[str]]:
    """Return the rule of a parameter and the upstream names of its layers."""
    rule, values = rule_for(path, next(iter(network.layouts.values())))
    count = shape[0] if rule.stacked else 1
    return rule, [rule.source.format(**{**values, "layer": layer}) for layer in range(count)]


def upstream_shapes(network: Network, tree: Mapping[str, Any], patch: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the upstream name and shape of every tensor of a network, in the order of its parameters."""
    shapes = {}
    for path, leaf in flatten(dict(tree)):
        rule, names = _layers(network, path, leaf.shape)
        shape = source_shape(rule.pattern, leaf.shape[1:] if rule.stacked else leaf.shape, patch)
        shapes.update(dict.fromkeys(names, shape))
    return shapes


def _values(folder: Path, network: Network, tree: Mapping[str, Any], patch: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the tensors in the order of `upstream_shapes`, holding one layer of a stacked parameter at a time."""
    for path, leaf in flatten(dict(tree)):
        rule, _ = _layers(network, path, leaf.shape)
        for layer in checkpoints.read_leaf(folder, path, leaf.shape[0] if rule.stacked else None):
            yield to_torch(layer, rule.pattern, patch)
