"""`rfjax compile`: fill the compilation cache with what `rfjax generate` with the same flags will need."""

import argparse

from rfjax.commands import generate

add_arguments = generate.add_arguments


def run(args: argparse.Namespace) -> None:
    """Compile; nothing is written but the cache.

    Raises:
        UserError: an input is wrong, as for `rfjax generate`, or there is no cache.
    """
    from rfjax.commands.compilation import compile_programs  # imports JAX

    compile_programs(args, *generate.read_inputs(args))
