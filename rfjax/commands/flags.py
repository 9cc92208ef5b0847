"""Flags that several commands have, and how their values are read."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from rfjax.errors import UserError
from rfjax.io.paths import is_address
from rfjax.parallel.processes import Processes

MESH_AXES = "data", "sequence", "tensor"


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the reader of a whole number within bounds."""
    wanted = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def number(text: str) -> float:
    """Read a number; NaN stands for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def setting(example: str) -> Callable[[str], tuple[str, str]]:
    """Return the reader of `KEY=VALUE`."""

    def parse(text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as {example}")
        return key, value

    return parse


def input_path(text: str) -> Path:
    """Read a path, or an address such as `gs://bucket/checkpoint`, of which the path of a local copy is returned."""
    if not is_address(text):
        return Path(text)
    from rfjax.io.remote import local

    try:
        return local(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_folder(text: str) -> Path:
    """Read the path of a folder to write to."""
    if is_address(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address, to which only `rfjax generate` writes; name a folder, or mount the bucket "
            "(gcsfuse, Mountpoint for S3)"
        )
    return Path(text)


def output_place(text: str) -> str | Path:
    """Read the path of a folder to write to, or its address."""
    return text if is_address(text) else Path(text)


def mesh(text: str) -> dict[str, int]:
    """Read `data=N,sequence=N,tensor=N`, any of them: how many devices there are along each axis of the mesh."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or axis in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is not data=N,sequence=N,tensor=N, any of them once")
        sizes[axis] = whole(1)(size)
    return sizes


def processes(text: str) -> Processes | None:
    """Read `HOST:PORT,COUNT,INDEX`; None stands for `auto`."""
    if text == "auto":
        return None
    address, *numbers = text.split(",")
    host, _, port = address.rpartition(":")
    if not host or len(numbers) != 2 or not all(part.isdecimal() for part in (port, *numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto or HOST:PORT,COUNT,INDEX, such as 10.0.0.2:8476,4,0")
    count, index = map(int, numbers)
    if index >= count:
        raise argparse.ArgumentTypeError(f"{text!r} has the index {index}; it must be from 0 to {count - 1}")
    return Processes(address, count, index)


def add_settings(parser: argparse._ActionsContainer, what: str, example: str) -> None:
    """Declare `--set KEY=VALUE ...`, which may be repeated."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        type=setting(example),
        dest="settings",
        help=f"{what}, such as {example}; one or more, and may be repeated",
    )


def add_batch_size(parser: argparse._ActionsContainer, what: str, default: int) -> None:
    """Declare `--batch-size`."""
    parser.add_argument(
        "--batch-size", metavar="N", type=whole(1, 10**6), default=default, help=f"{what} (default: {default})"
    )


def add_dtype(parser: argparse._ActionsContainer) -> None:
    """Declare `--dtype`."""
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float32 or bfloat16 (default: bfloat16 on a GPU or TPU, float32 on a CPU)",
    )
