"""Write a copy of a checkpoint with its parameters in another type.

python scripts/cast_checkpoint.py FROM TO bfloat16
"""

import sys
from pathlib import Path

from rfjax.io.checkpoints import TOKENIZER, load_checkpoint_config, load_network, parameter_trees, save


def main(source: str, target: str, dtype: str) -> None:
    """Write the checkpoint folder `target`, which must not exist; `dtype` is float32 or bfloat16."""
    config, folder = load_checkpoint_config(Path(source)), Path(source)
    params = {name: load_network(folder, name, dtype) for name in parameter_trees(config)}
    tokenizer = folder / TOKENIZER
    save(target, config, params, tokenizer if tokenizer.is_dir() else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
