"""The command line: `rfjax generate | convert | benchmark`.

A mistake of the user is one line on standard error and exit code 2; an interruption is one line and exit code 130.
JAX is imported only when a command runs, so that help is quick.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from rfjax.errors import UserError, nearest

COMMANDS = {
    "generate": ("rfjax.commands.generate", "make videos from prompts"),
    "convert": ("checkpoints_convert", "turn PyTorch checkpoints into rfjax checkpoints and back"),
    "benchmark": ("rfjax.commands.benchmark", "measure speed and memory on this machine"),
}
"""Module with `add_arguments(parser)` and `run(args)`, and one line of help, of each command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def rfjax_version() -> str:
    """Return the installed version of rfjax."""
    try:
        return version("rfjax")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _parser(chosen: str | None) -> tuple[_Parser, _Parser]:
    """Return the parser and that of the chosen command; the other commands' modules are not imported."""
    parser = _Parser(
        prog="rfjax",
        description="Minute-long video from causal diffusion transformers in JAX.",
        epilog="rfjax COMMAND --help tells more of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rfjax {rfjax_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    selected = parser
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if name == chosen:
            selected = command
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    return parser, selected


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    first = argv[0] if argv else None
    parser, command = _parser(first)
    if first is None:
        raise UserError(f"no command given; there are: {', '.join(COMMANDS)} (see rfjax --help)")
    if not first.startswith("-") and first not in COMMANDS:
        raise UserError(f"unknown command {first!r}{nearest(first, COMMANDS)}; there are: {', '.join(COMMANDS)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in command._actions for flag in action.option_strings]
        raise UserError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own by default, and return its exit code."""
    code = _run(sys.argv[1:] if argv is None else argv)
    if argv is None and code:
        # JAX crashes if Python winds down while the device still works on what nobody waits for any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        args = _parse(argv)
        args.run(args)
    except UserError as error:
        message = " ".join(str(error).splitlines())
        print(f"rfjax: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"rfjax: interrupted{interruption}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
