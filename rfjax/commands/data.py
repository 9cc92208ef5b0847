"""`rfjax data`: datasets on disk, to be trained on."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable

from rfjax.commands.flags import add_batch_size, add_dtype, input_path, number, output_folder, whole
from rfjax.errors import UserError

_SECONDS_BETWEEN_LINES = 5.0
_EPILOG = """\
A dataset is a folder of ArrayRecord files that tensorflow-datasets reads; it appears only when it is complete.
rfjax data KIND --help tells more of a kind.
"""
_LESS_MEMORY = "try a smaller --batch-size, or --dtype bfloat16"
_RESUMES = "Until it is complete, DIR.parts keeps what is done: the same command goes on from there."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the kinds of datasets and their flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", title="kinds", parser_class=type(parser), required=True)

    def add(name: str, summary: str, details: str, build: Callable[[argparse.Namespace], None]):
        kind = kinds.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}", allow_abbrev=False
        )
        kind.add_argument("--output", metavar="DIR", type=output_folder, required=True, help="folder to create")
        kind.set_defaults(build=build)
        return kind

    _add_moving_shapes(
        add(
            "moving-shapes",
            "draw clips of moving shapes with captions and their exact parameters",
            "Split test shows colours and kinds of shapes together that train does not.",
            _moving_shapes,
        )
    )
    _add_video_folder(
        add(
            "video-folder",
            "cut the videos of a folder into clips with captions",
            "Videos that cannot be used are left out and listed in skipped.csv of the dataset, with the reason.",
            _video_folder,
        )
    )
    _add_latents(add("latents", "encode a dataset's clips with a checkpoint's autoencoder", _RESUMES, _latents))
    _add_redrawn(
        add("redrawn", "let a student redraw a dataset's clips, for its decoder to learn from", _RESUMES, _redrawn)
    )
    _add_trajectories(
        add("trajectories", "follow a teacher from noise to video, for train stage ode", _RESUMES, _trajectories)
    )


def _add_moving_shapes(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--clips", metavar="N", type=whole(1), default=4000, help="to train on (default: 4000)")
    kind.add_argument("--test-clips", metavar="N", type=whole(1), default=200, help="to test with (default: 200)")
    _add_sizes(kind, "81", "64", "96")
    kind.add_argument("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="draws other clips (default: 0)")


def _add_video_folder(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--videos", metavar="DIR", type=input_path, required=True, help="searched with the folders in it")
    kind.add_argument(
        "--captions",
        metavar="FILE",
        type=input_path,
        help="CSV with a header, or JSON lines (.jsonl): a video a line, its path below DIR as path, file, file_name "
        "or video, and its caption, text or prompt (default: DIR/captions.csv or DIR/captions.jsonl)",
    )
    _add_sizes(kind, "81", "480", "832")
    kind.add_argument("--fps", metavar="N", type=whole(1, 1000), default=16, help="frames a second (default: 16)")
    kind.add_argument(
        "--test-share",
        metavar="S",
        type=_number("share", 0.0, 0.9),
        default=0.0,
        help="share of the videos that make up split test (default: 0, no such split)",
    )


def _add_sizes(kind: argparse.ArgumentParser, frames: str, height: str, width: str) -> None:
    """Declare the size of a clip; the defaults are given as text, which argparse reads like the user's."""
    for flag, default, what in (("frames", frames, "frames"), ("height", height, "rows"), ("width", width, "columns")):
        kind.add_argument(
            f"--{flag}", metavar="N", type=whole(1), default=default, help=f"{what} of a clip (default: {default})"
        )


def _add_latents(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--dataset", metavar="DIR", type=input_path, required=True, help="clips: all splits are encoded")
    kind.add_argument("--checkpoint", metavar="DIR", type=input_path, required=True, help="with the autoencoder")
    kind.add_argument("--frames", metavar="N", type=whole(1), help="first video frames of each clip (default: all)")
    kind.add_argument(
        "--embed-prompts",
        action="store_true",
        help="also keep the captions' embeddings, so that training needs no text encoder",
    )
    _add_computation(kind)


def _add_redrawn(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--dataset", metavar="DIR", type=input_path, required=True, help="clips: all splits are redrawn")
    kind.add_argument("--checkpoint", metavar="DIR", type=input_path, required=True, help="the student")
    kind.add_argument("--frames", metavar="N", type=whole(1), help="first video frames of each clip (default: all)")
    kind.add_argument("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="of the noise (default: 0)")
    _add_computation(kind)


def _add_trajectories(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--prompts",
        metavar="PATH",
        type=input_path,
        required=True,
        help="text file with a prompt a line, or dataset whose captions are taken",
    )
    kind.add_argument("--checkpoint", metavar="DIR", type=input_path, required=True, help="the teacher")
    kind.add_argument(
        "--count", metavar="N", type=whole(1), required=True, help="trajectories; prompts are repeated if fewer"
    )
    kind.add_argument(
        "--guidance", metavar="G", type=_number("guidance", 0.0, 100.0), default=3.0, help="1 is none (default: 3)"
    )
    kind.add_argument(
        "--negative-prompt", metavar="TEXT", default="", help="what guidance leads away from (default: the empty one)"
    )
    kind.add_argument(
        "--solver-steps",
        metavar="N",
        type=whole(1),
        default=48,
        help="a multiple of the model's denoising steps (default: 48)",
    )
    kind.add_argument("--latent-frames", metavar="N", type=whole(1), default=21, help="length (default: 21)")
    kind.add_argument("--seed", metavar="N", type=whole(0, 2**32 - 1), default=0, help="of the noise (default: 0)")
    _add_computation(kind)


def _add_computation(kind: argparse.ArgumentParser) -> None:
    add_batch_size(kind, "clips worked on together", default=8)
    add_dtype(kind)


def run(args: argparse.Namespace) -> None:
    """Build a dataset.

    Raises:
        UserError: an input is wrong, or the disk is full; no dataset has been written then.
    """
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError:
        raise UserError('building datasets needs more packages; pip install "rfjax[train]"') from None
    args.build(args)


def _moving_shapes(args: argparse.Namespace) -> None:
    from rfjax.data.moving_shapes import MovingShapesConfig, build

    _check_sizes(args)
    sizes = {name: getattr(args, name) for name in ("frames", "height", "width", "seed")}
    build(args.output, MovingShapesConfig(train=args.clips, test=args.test_clips, **sizes))
    _print(f"{args.clips} clips to train on and {args.test_clips} to test with in {args.output}")


def _video_folder(args: argparse.Namespace) -> None:
    from rfjax.data.video_folder import VideoFolderConfig, build

    _check_sizes(args)
    config = VideoFolderConfig(
        videos=args.videos,
        captions=args.captions,
        **{name: getattr(args, name) for name in ("frames", "height", "width", "fps", "test_share")},
    )
    summary = build(args.output, config, _Progress("videos read"))
    _print(f"{summary} in {args.output}")


def _latents(args: argparse.Namespace) -> None:
    from rfjax.data.latents import LatentsConfig, build_latents

    _compute(args, LatentsConfig, build_latents, "clips encoded")


def _redrawn(args: argparse.Namespace) -> None:
    from rfjax.data.latents import RedrawnConfig, build_redrawn

    _compute(args, RedrawnConfig, build_redrawn, "clips redrawn")


def _trajectories(args: argparse.Namespace) -> None:
    from rfjax.data.latents import TrajectoriesConfig, build_trajectories

    _compute(args, TrajectoriesConfig, build_trajectories, "trajectories made")


def _compute(args: argparse.Namespace, config: type, build: Callable[..., None], what: str) -> None:
    import jax

    from rfjax.io.checkpoints import check_dtype
    from rfjax.sampling.budget import out_of_memory_says

    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    check_dtype(args.dtype)
    progress = _Progress(what)
    try:
        with out_of_memory_says(_LESS_MEMORY):
            build(args.output, config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(config)}), progress)
    except KeyboardInterrupt as interruption:
        raise type(interruption)(f"; {progress.done} {what}: the same command goes on from there") from None
    _print(f"{progress.done} {what} in {args.output}")


def _check_sizes(args: argparse.Namespace) -> None:
    """Refuse clips that Wan's autoencoder could not encode."""
    from rfjax.config import VAEConfig

    wan = VAEConfig()
    for name, value, least, factor in (
        ("frames", args.frames, 1, wan.temporal_factor),
        ("height", args.height, 0, wan.spatial_factor),
        ("width", args.width, 0, wan.spatial_factor),
    ):
        if value % factor != least:
            below = value - (value - least) % factor
            near = f"{below} or {below + factor}" if below > 0 else f"{below + factor}"
            plus = "1 plus " if least else ""
            raise UserError(f"--{name} is {value}; {plus}a multiple of {factor} is needed, such as {near}")


class _Progress:
    """Prints how far a build is, now and then."""

    def __init__(self, what: str):
        self.done = 0
        """By this and earlier runs of the command."""
        self._what = what
        self._began = self._last = time.monotonic()

    def __call__(self, kept: int, done: int, total: int) -> None:
        """Note what earlier runs left, what is done by now, and all."""
        self.done, now = done, time.monotonic()
        if done == kept > 0:
            _print(f"{done} of {total} {self._what} before")
        elif done == total or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            rate = (done - kept) / (now - self._began)
            left = f", {(total - done) / rate:.0f} s left" if done < total else ""
            _print(f"{done} of {total} {self._what}, {rate:.3g} a second{left}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _number(name: str, least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = number(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {least:g} to {most:g}")
        return value

    return parse
