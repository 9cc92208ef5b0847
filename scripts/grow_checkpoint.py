"""Write a copy of a checkpoint whose transformer has more layers and says the same: training goes on from there.

    python scripts/grow_checkpoint.py FROM TO EVERY

After each EVERY layers comes a copy of the last of them whose projections back to the residual stream are zero, as in
block expansion (LLaMA Pro, arXiv 2401.02415); it begins with what its original has learnt and adds nothing at first.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from rfjax.errors import UserError
from rfjax.io.checkpoints import TOKENIZER, check_output, load_checkpoint_config, load_network, parameter_trees, save
from rfjax.models.functional import BLOCKS

TRANSFORMER = "transformer"
BACK = ("self_attn.o.", "cross_attn.o.", "ffn.fc2.")
"""What a layer adds to the residual stream comes through these."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the grown checkpoint.

    Raises:
        UserError: there is no checkpoint, the output is in use, or EVERY is not from 1 to the number of layers.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("output", type=Path, metavar="TO", help="a new folder")
    parser.add_argument("every", type=int, metavar="EVERY", help="1 doubles the layers, 2 adds half as many")
    args = parser.parse_args(argv)
    check_output(args.output)
    config = load_checkpoint_config(args.source)
    layers = config.transformer.num_layers
    if not 1 <= args.every <= layers:
        raise UserError(f"EVERY is {args.every}; 1 to {layers} are possible, as the transformer has {layers} layers")
    params = {name: load_network(args.source, name, "float32") for name in parameter_trees(config)}
    params[TRANSFORMER] |= {BLOCKS: grown(params[TRANSFORMER][BLOCKS], layers, args.every)}
    more = dataclasses.replace(config.transformer, num_layers=layers + layers // args.every)
    tokenizer = args.source / TOKENIZER
    save(args.output, dataclasses.replace(config, transformer=more), params, tokenizer if tokenizer.is_dir() else None)
    print(f"{args.output}: {more.num_layers} layers in place of {layers}")


def grown(blocks: PyTree, layers: int, every: int) -> PyTree:
    """Return stacked layers [L, ...] with the copies among them, [L + L // every, ...]."""
    original = np.sort([*range(layers), *range(every - 1, layers, every)])
    is_copy = np.diff(original, prepend=-1) == 0

    def grow(path, leaf):
        taken = leaf[original]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.startswith(BACK):
            return taken
        return np.where(is_copy.reshape(-1, *[1] * (leaf.ndim - 1)), np.zeros_like(taken), taken)

    return jax.tree_util.tree_map_with_path(grow, blocks)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"grow_checkpoint: error: {error}", file=sys.stderr)
        sys.exit(2)
