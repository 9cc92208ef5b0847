"""`python -m checkpoints_convert`: the same command as `rfjax convert`."""

import sys

from rfjax.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
