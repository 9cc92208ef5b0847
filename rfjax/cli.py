"""The command line: `rfjax generate | compile | convert | sweep | data | train | benchmark`.

A mistake of the user is one line on standard error and exit code 2; an interruption is one line and exit code 130, or
143 for SIGTERM.
JAX is imported only when a command runs, so that help is quick.
"""

import argparse
import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rfjax.commands.interruptions import Terminated, signals_raise
from rfjax.errors import UserError, nearest
from rfjax.io.paths import cache_folder
from rfjax.version import rfjax_version

COMMANDS = {
    "generate": ("rfjax.commands.generate", "make videos from prompts"),
    "compile": ("rfjax.commands.compile", "compile what `rfjax generate` with the same flags will need"),
    "convert": ("checkpoints_convert", "turn PyTorch checkpoints into rfjax checkpoints and back"),
    "sweep": ("rfjax.commands.sweep", "compare memory policies and their settings on the same prompts"),
    "data": ("rfjax.commands.data", "build datasets to train on"),
    "train": ("rfjax.commands.train", "train a model, a stage at a time"),
    "benchmark": ("rfjax.commands.benchmark", "measure speed and memory on this machine"),
}
"""Module with `add_arguments(parser)` and `run(args)`, and one line of help, of each command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


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
        raise UserError(f"unknown command {first!r}; there are: {', '.join(COMMANDS)}{nearest(first, COMMANDS)}")
    command = _kind(command, first, argv[1:])
    flags = [flag for action in command._actions for flag in action.option_strings]
    # Before argparse, which would rather speak of a required flag that is missing because it was misspelt.
    _refuse([word for word in argv if word[:2] == "--" and " " not in word and _name(word) not in flags], flags)
    args, unknown = parser.parse_known_args(argv)
    _refuse(unknown, flags)
    return args


def _kind(command: argparse.ArgumentParser, name: str, words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the kind that the words after a command name, or the command's own if it has no kinds."""
    kinds = next((action.choices for action in command._actions if isinstance(action.choices, dict)), None)
    if name not in COMMANDS or kinds is None or words[:1] in (["-h"], ["--help"]):
        return command
    if not words or words[0] not in kinds:
        what = f"unknown kind {words[0]!r}" if words else "no kind given"
        hint = nearest(words[0], kinds) if words else ""
        raise UserError(f"rfjax {name}: {what}; there are: {', '.join(kinds)}{hint}")
    return kinds[words[0]]


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def _keep_compiled_programs() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless its own settings say where, or not to.

    Programs for a CPU suit its model alone, so each model of CPU has a folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = hashlib.sha256("".join(sorted({line for line in lines if line.startswith(("model", "flags"))})).encode())
        folder = cache_folder() / "compiled" / cpu.hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, no right to write there, or no Linux: compile each time
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    # Dozens of small programs, none of which JAX would keep, take seconds together.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _refuse(unknown: Sequence[str], flags: Sequence[str]) -> None:
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}{nearest(_name(unknown[0]), flags)}")


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
        with signals_raise():
            args = _parse(argv)
            _keep_compiled_programs()
            args.run(args)
    except UserError as error:
        message = " ".join(str(error).splitlines())
        print(f"rfjax: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, Terminated)
        print(f"rfjax: {'terminated' if terminated else 'interrupted'}{interruption}", file=sys.stderr)
        return 143 if terminated else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
