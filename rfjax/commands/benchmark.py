"""`rfjax benchmark`: speed and memory of the rollout's parts on this machine, policies side by side."""

import argparse
from pathlib import Path

from rfjax.errors import UserError
from rfjax.io.paths import kind_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rfjax benchmark`."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        default="tiny",
        help="sizes: tiny (seconds), small (minutes on 2 CPU cores) or wan_1_3b (480x832, for an accelerator); "
        "default: tiny",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME[:KEY=VALUE,...]",
        action="append",
        dest="policies",
        help="memory policy; repeated, the first is compared with each other one "
        "(default: relax_forcing and self_forcing:window_frames=21)",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=1, help="videos made together (default: 1)")
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float32 or bfloat16 (default: bfloat16 on a GPU or TPU, float32 on a CPU)",
    )
    parser.add_argument("--repeats", metavar="N", type=int, help="measurements of each part (default: the preset's)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every number here; must not exist yet")


def run(args: argparse.Namespace) -> None:
    """Measure, print the tables and write the numbers.

    Raises:
        UserError: an input is wrong, or the device's memory does not suffice; nothing has been written then.
    """
    for flag, value in (("--repeats", args.repeats), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; 1 or more is needed")
    if args.json is not None:
        _check_new(args.json)

    import jax
    from rich.console import Console

    from rfjax.benchmark.build import Setup
    from rfjax.benchmark.measure import LESS_MEMORY, measure
    from rfjax.benchmark.preset import load_subject, policies_of
    from rfjax.benchmark.report import print_report
    from rfjax.benchmark.summary import summarise
    from rfjax.io.atomic import write_json
    from rfjax.io.checkpoints import check_dtype
    from rfjax.sampling.budget import device_limit, out_of_memory_says

    subject = load_subject(args.preset)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    check_dtype(dtype)
    setup = Setup(
        subject=subject,
        policies=policies_of(args.policies or subject.preset.policies),
        batch=args.batch_size,
        dtype=dtype,
        repeats=args.repeats or subject.preset.repeats,
        limit=device_limit(jax.devices()[0]),
    )
    progress = Console(stderr=True, highlight=False, markup=False)
    with out_of_memory_says(LESS_MEMORY):
        summary = summarise(measure(setup, lambda doing: progress.print(f"{args.preset}: {doing}")))
    width = None if Console().is_terminal else 100
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    print_report(console, summary)
    if args.json is not None:
        write_json(args.json, summary)
        console.print(f"Every number is in {args.json}.")


def _check_new(path: Path) -> None:
    if kind_of(path, "--json") != "missing":
        raise UserError(f"--json {path} exists already; name another file, or delete it first")
    if kind_of(path.absolute().parent, "the folder") != "folder":
        raise UserError(f"--json {path} cannot be written: there is no folder {path.absolute().parent}")
