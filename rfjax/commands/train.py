"""`rfjax train`: one stage of training, from a configuration to a checkpoint folder."""

import argparse
import sys
from types import ModuleType

from rfjax.commands.flags import add_settings, output_folder, processes
from rfjax.commands.interruptions import Terminated
from rfjax.errors import UserError
from rfjax.parallel.processes import ALONE

_FOLDER = """\
DIR receives:
  config.yaml     the configuration with every default written out
  checkpoints/    states of the run; the same command goes on from the newest
  tensorboard/    metrics (tensorboard --logdir DIR)
  samples/        sample videos, where the configuration asks for them
  model/          at the end, a checkpoint for rfjax generate --checkpoint and for the next stage's init

Ctrl-C and SIGTERM end the step, save and leave; after SIGTERM the exit code is 0.

With --processes the same command is started on every host of a TPU pod slice, by every task of a Slurm job or in other
places, and DIR is a folder that all of them see. What they compute they compute together: if one ends, so do all.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rfjax train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _FOLDER
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="a YAML file, or the name of one in configs/train"
    )
    parser.add_argument("--output", metavar="DIR", type=output_folder, required=True, help="folder of the run")
    add_settings(parser, "a setting in place of the file's", "optimizer.learning_rate=1e-4")
    parser.add_argument(
        "--processes",
        metavar="WHO",
        type=processes,
        default=ALONE,
        help="be one of several processes that train together: auto (TPU pod slice, Slurm) or HOST:PORT,COUNT,INDEX "
        "with the address of process 0",
    )


def run(args: argparse.Namespace) -> None:
    """Train, or go on training.

    Raises:
        UserError: an input is wrong, or the loss diverged.
    """
    from rfjax.training.config import find_config, load_train_config

    try:
        config = load_train_config(find_config(args.config), dict(args.settings))
        _training().run(config, args.output, args.processes)
    except Terminated:  # before the first step or after the last
        print("stopped; nothing is lost, and the same command goes on", file=sys.stderr)


def _training() -> ModuleType:
    """Import what trains, and JAX with it."""
    try:
        from rfjax.commands import training
    except ModuleNotFoundError as error:
        raise UserError(f'training needs more packages, such as {error.name}; pip install "rfjax[train]"') from None
    return training
