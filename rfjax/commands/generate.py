"""`rfjax generate`: the flags, and what can be checked of them without a checkpoint or a device."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rfjax.commands.flags import (
    add_batch_size,
    add_dtype,
    add_settings,
    input_path,
    mesh,
    number,
    output_place,
    processes,
    whole,
)
from rfjax.commands.prompt_schedule import ScheduledPrompt, read_schedule
from rfjax.errors import UserError
from rfjax.io import prompts
from rfjax.io.prompts import Request, has_word
from rfjax.parallel.processes import ALONE

DEFAULT_PROMPT = "a blue square bounces on a sand background"
DEFAULT_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `rfjax generate`."""
    _add_what(parser.add_argument_group("what to make"))
    _add_how(parser.add_argument_group("how to make it"))
    _add_where(parser.add_argument_group("where to put it"))


def _add_what(what: argparse._ArgumentGroup) -> None:
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="what the video shows; may be repeated, for more videos (default: two moving shapes)",
    )
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        type=input_path,
        help='a prompt a line, UTF-8; in a .jsonl file {"prompt": TEXT, "seconds": S} a line, videos of any lengths',
    )
    source.add_argument(
        "--prompt-schedule",
        metavar="FILE",
        type=input_path,
        help="prompts that change in the video: a YAML list of {at: SECOND, prompt: TEXT}, cut: true for a new scene",
    )
    what.add_argument(
        "--prompt-switch",
        choices=("recache", "plain"),
        help="how a scheduled prompt takes over: recache makes the newest frames of the memory anew under it, plain "
        "leaves them (default: recache)",
    )
    length = what.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        metavar="S",
        type=_seconds,
        help=f"length, rounded up to whole chunks (default: {DEFAULT_SECONDS:g})",
    )
    length.add_argument("--latent-frames", metavar="N", type=whole(1), help="length in latent frames instead")
    what.add_argument("--height", metavar="PIXELS", type=whole(1, 2**14), help="rows (default: the checkpoint's)")
    what.add_argument("--width", metavar="PIXELS", type=whole(1, 2**14), help="columns (default: the checkpoint's)")
    what.add_argument("--fps", metavar="N", type=whole(1, 1000), default=16, help="frames a second (default: 16)")
    what.add_argument(
        "--num-samples", metavar="N", type=whole(1, 10**6), default=1, help="videos a prompt (default: 1)"
    )
    what.add_argument(
        "--seed",
        metavar="N",
        type=whole(0, 2**32 - 1),
        default=0,
        help="with the number of the sample it fixes the video, whatever the batch (default: 0)",
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=input_path,
        help="written by rfjax convert, or its address, as gs://BUCKET/DIR (default: the small model of moving shapes "
        "that comes with rfjax)",
    )
    how.add_argument(
        "--policy",
        metavar="NAME",
        default="relax_forcing",
        help="memory policy or preset of one, a preset's file (.yaml), or FILE.py:CLASS (default: relax_forcing)",
    )
    add_settings(how, "a setting of the policy", "history_frames=2")
    how.add_argument(
        "--sampler",
        choices=("chunk", "rolling"),
        default="chunk",
        help="chunk: one chunk after the other; rolling: as many chunks as denoising steps together, at rising noise "
        "levels (Rolling Forcing; default: chunk)",
    )
    add_batch_size(how, "videos made together on each device", default=1)
    how.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        type=mesh,
        help="data=N: devices, or groups of them, that share the videos to be made; sequence=N, tensor=N: devices of a "
        "group that divide the tokens, and the heads, of each video (default: groups as small as can hold the model, "
        "and as many as there are)",
    )
    how.add_argument(
        "--processes",
        metavar="WHICH",
        type=processes,
        default=ALONE,
        help="be one of several processes that divide the videos and share --output: auto (TPU pod slice, Slurm) or "
        "HOST:PORT,COUNT,INDEX with the address of process 0",
    )
    how.add_argument(
        "--processes-timeout",
        metavar="S",
        type=_seconds,
        default=300.0,
        help="seconds to wait until all processes are there (default: 300)",
    )
    add_dtype(how)


def _add_where(where: argparse._ArgumentGroup) -> None:
    where.add_argument(
        "--output",
        metavar="DIR",
        type=output_place,
        default=Path("outputs"),
        help="folder of <prompt>-<sample>.mp4, metadata.json and the memory timelines, or its address, as "
        "gs://BUCKET/DIR (default: outputs); videos that it already holds are not made again",
    )
    where.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=whole(1),
        help="keep the state of the unfinished videos in the output folder every so many chunks, so that the same "
        "command goes on inside them after it was stopped or killed (default: an unfinished video begins anew)",
    )
    where.add_argument("--overwrite", action="store_true", help="make and replace videos that are already there")


def run(args: argparse.Namespace) -> None:
    """Make the videos.

    Raises:
        UserError: an input is wrong; nothing has been written then.
    """
    from rfjax.commands import generation  # imports JAX

    generation.generate(args, *read_inputs(args))


def read_inputs(args: argparse.Namespace) -> tuple[list[Request], list[ScheduledPrompt]]:
    """Return the prompts of the flags, and the schedule of a prompt that changes.

    Raises:
        UserError: flags that do not go together, or a file that is wrong.
    """
    if args.prompt_schedule is None:
        if args.prompt_switch is not None:
            raise UserError(f"--prompt-switch {args.prompt_switch} needs --prompt-schedule")
        return read_requests(args.prompt, args.prompt_file), []
    if args.sampler != "chunk":
        raise UserError(f"--prompt-schedule does not go with --sampler {args.sampler}, whose chunks overlap; use chunk")
    schedule = read_schedule(args.prompt_schedule)
    return [Request(schedule[0].prompt)], schedule


def read_requests(given: Sequence[str] | None, prompt_file: Path | None) -> list[Request]:
    """Return the prompts asked for, the default one if there are none.

    Raises:
        UserError: an empty prompt, or a file that is missing, empty, not UTF-8 or wrong in another way.
    """
    if prompt_file is not None:
        return prompts.read_requests(prompt_file)
    return [Request(_checked(prompt)) for prompt in given or [DEFAULT_PROMPT]]


def _checked(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt is {prompt!r}, which is not valid UTF-8") from None
    if not has_word(prompt):
        raise UserError(f"--prompt is {prompt!r}; it needs at least one word")
    return prompt.strip()


def _seconds(text: str) -> float:
    value = number(text)
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive, finite number of seconds")
    return value
