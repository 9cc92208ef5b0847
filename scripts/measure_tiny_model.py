"""Measure by classical vision whether a model of moving shapes shows what it is asked for, policy by policy.

    python scripts/measure_tiny_model.py --checkpoint DIR --output DIR [--prompts 48] [--seconds 5 60]
        [--policies relax_forcing self_forcing:window_frames=21 ...] [--split test] [--batch 8] [--seed 0] [--quick]

The prompts are captions of scenes held out from training (or, with --split train, of new ones with things that training
shows together) whose things all stay in the picture. Every video is made in
the longest of the asked lengths; a length is measured in the 5 seconds before it. Two rows of reference come first: the
scenes as they are drawn, and after a round trip through the checkpoint's autoencoder. The output folder gets
`results.csv` (a row a video and length), `windows.csv` (a row for every 5 seconds of a video), `table.md`, and for each
row of the table `NAME_SECONDSs.png`, a line a prompt and five moments of the video side by side.
"""

import argparse
import dataclasses
import functools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

import rfjax
from rfjax.commands.plan import latent_frames
from rfjax.data.shapes import FPS, Scene, caption, render, staying_scenes
from rfjax.errors import UserError
from rfjax.evaluation.frames import opencv
from rfjax.evaluation.shape_videos import WINDOW_SECONDS, Window, measure_windows
from rfjax.evaluation.tables import spread, write_table
from rfjax.io.atomic import replacing
from rfjax.io.names import folder_name
from rfjax.io.outputs import check_writable, make_folder
from rfjax.memory import MemoryPolicy
from rfjax.memory.registry import parse_text
from rfjax.models.model import Model
from rfjax.sampling.codec import to_bytes, to_unit, vae_of
from rfjax.sampling.pipeline import keys_from_seed, stream_video

POLICIES = ("relax_forcing", "self_forcing:window_frames=21", "attention_sink", "context_forcing")
DRAWN, RECONSTRUCTED = "drawn", "drawn, through the autoencoder"
SHEET_PROMPTS, SHEET_MOMENTS, SHEET_SCALE = 8, 5, 2
SHARES = ("things", "colours", "kinds", "background")
MEANS = ("motion", "jumps", "flicker", "area_change", "background_drift", "colour_drift")

Videos = UInt8[np.ndarray, "B T H W 3"]
Maker = Callable[[range], Videos]
"""Makes the videos of the prompts of such numbers."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured."""

    model: Model
    scenes: list[Scene]
    seconds: tuple[int, ...]
    """Lengths, ascending."""
    batch: int
    seed: int
    output: Path

    @property
    def frames(self) -> int:
        """Video frames of the longest length."""
        return self.seconds[-1] * FPS

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.model.config.latent_height, self.model.config.latent_width

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        rows, columns = self.latent_size
        factor = vae_of(self.model)[0].spatial_factor
        return rows * factor, columns * factor


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the tables."""

    name: str
    videos: list[list[Window]]
    """Of each prompt."""

    def at(self, seconds: int) -> list[Window]:
        """Return each video's window that ends there."""
        return [windows[seconds // WINDOW_SECONDS - 1] for windows in self.videos]


def main(argv: Sequence[str] | None = None) -> None:
    """Make, measure and write everything."""
    args = parse_arguments(argv)
    policies = {text: parse_text(text) for text in args.policies}
    check_writable(args.output)
    opencv()
    model = rfjax.load(args.checkpoint)
    scenes = staying_scenes(np.random.default_rng(args.seed), args.split, args.prompts)
    study = Study(model, scenes, tuple(sorted(set(args.seconds))), args.batch, args.seed, args.output)
    make_folder(args.output)
    makers: dict[str, Maker] = {
        DRAWN: functools.partial(drawn, study),
        RECONSTRUCTED: functools.partial(reconstructed, study),
        **{text: functools.partial(generated, study, policy) for text, policy in policies.items()},
    }
    # JAX runs threads, which a forked process would lack.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        rows = [measured(study, name, make, pool) for name, make in makers.items()]
    write_tables(study, rows)
    print(markdown(study, rows))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: a number that is not possible.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=48, help="how many; default: 48")
    parser.add_argument("--seconds", type=int, nargs="+", default=[5, 60], help="lengths; default: 5 60")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help=f"default: {' '.join(POLICIES)}")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="whose things; default: test")
    parser.add_argument("--batch", type=int, default=8, help="videos made together; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the noise; default: 0")
    parser.add_argument("--workers", type=int, help="processes that measure; default: one a core")
    parser.add_argument("--quick", action="store_true", help="2 prompts, 5 seconds, the first 2 policies")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompts, args.seconds, args.policies = 2, [WINDOW_SECONDS], args.policies[:2]
    for name in ("prompts", "batch", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; 1 or more is needed")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; 0 or more is needed")
    for seconds in args.seconds:
        if seconds < 1 or seconds % WINDOW_SECONDS:
            raise UserError(f"--seconds is {seconds}; a multiple of {WINDOW_SECONDS} is needed, such as 5 or 60")
    return args


def drawn(study: Study, numbers: range) -> Videos:
    """Draw the scenes themselves, and one frame more than is measured."""
    return np.stack([render(study.scenes[number], study.frames + 1, *study.size) for number in numbers])


def reconstructed(study: Study, numbers: range) -> Videos:
    """Encode and decode the drawn scenes, a window at a time."""
    video, length = drawn(study, numbers), WINDOW_SECONDS * FPS
    for start in range(0, study.frames, length):
        # The first latent frame stands for one frame, so that pieces begin with the last one's end.
        piece = to_unit(video[:, start : start + length + 1])
        decoded = rfjax.decode(study.model, rfjax.encode(study.model, piece))
        video[:, start : start + length] = to_bytes(decoded[:, :-1])
    return video


def generated(study: Study, policy: MemoryPolicy, numbers: range) -> Videos:
    """Generate videos from the scenes' captions; all policies start from the same noise."""
    config, (vae, _) = study.model.config, vae_of(study.model)
    length = latent_frames(config.chunk_frames, vae.temporal_factor, float(study.seconds[-1]), None, FPS)
    embeds = rfjax.encode_prompt(study.model, [caption(study.scenes[number]) for number in numbers])
    keys = keys_from_seed(study.seed, numbers)
    chunks = stream_video(study.model, policy, embeds, length, study.latent_size, keys)
    return np.concatenate([chunk.frames for chunk in chunks], axis=1)


def measured(study: Study, name: str, make: Maker, pool: ProcessPoolExecutor) -> Row:
    """Make and measure the videos of a row, and draw its sheets."""
    since, total = time.perf_counter(), len(study.scenes)
    waiting: list[Future[list[Window]]] = []
    strips: dict[int, list[np.ndarray]] = {seconds: [] for seconds in study.seconds}
    for numbers in batches(total, study.batch):
        videos = make(numbers)[:, : study.frames]
        for number, video in zip(numbers, videos, strict=True):
            waiting.append(pool.submit(measure_windows, video, study.scenes[number]))
            for seconds in study.seconds if number < SHEET_PROMPTS else ():
                strips[seconds].append(strip(video[: seconds * FPS], caption(study.scenes[number])))
        print(f"{name}: {numbers.stop} of {total} videos made, {time.perf_counter() - since:.0f} s", flush=True)
    for seconds, lines in strips.items():
        write_png(study.output / f"{folder_name(name)}_{seconds}s.png", np.concatenate(lines))
    row = Row(name, [future.result() for future in waiting])
    right = ", ".join(f"{share(row.at(seconds), 'things')} at {seconds} s" for seconds in study.seconds)
    print(f"{name}: measured, {time.perf_counter() - since:.0f} s; what was named is shown by {right}", flush=True)
    return row


def batches(total: int, size: int) -> Iterator[range]:
    """Yield the numbers of the videos that are made together."""
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def strip(video: UInt8[np.ndarray, "T H W 3"], text: str) -> UInt8[np.ndarray, "h w 3"]:
    """Draw moments of a video side by side below its prompt, with the seconds."""
    cv2 = opencv()
    moments = np.linspace(0, len(video) - 1, SHEET_MOMENTS).round().astype(int)
    frames = np.pad(video[moments], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    line = np.concatenate(list(frames.repeat(SHEET_SCALE, 1).repeat(SHEET_SCALE, 2)), axis=1)
    head = np.full((20, line.shape[1], 3), 255, np.uint8)
    end = f"{moments[-1] / FPS:.0f} s"
    cv2.putText(head, f"{text}   (0 to {end})", (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([head, line])


def write_png(path: Path, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a picture, whole or not at all."""
    cv2 = opencv()
    with replacing(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes())


def write_tables(study: Study, rows: Sequence[Row]) -> None:
    """Write both CSV tables and the Markdown one."""
    every = range(WINDOW_SECONDS, study.seconds[-1] + 1, WINDOW_SECONDS)
    for file, lengths in (("results", study.seconds), ("windows", every)):
        records = [
            {"row": row.name, "prompt": caption(scene), **dataclasses.asdict(window)}
            for row in rows
            for seconds in lengths
            for scene, window in zip(study.scenes, row.at(seconds), strict=True)
        ]
        write_table(study.output / file, {key: [record[key] for record in records] for key in records[0]}, "csv")
    with replacing(study.output / "table.md") as temporary:
        temporary.write_text(markdown(study, rows), encoding="utf-8")


def share(windows: Sequence[Window], name: str) -> str:
    """Write in how many windows something is shown."""
    right = sum(getattr(window, name) for window in windows)
    return f"{right / len(windows):.0%} ({right}/{len(windows)})"


def markdown(study: Study, rows: Sequence[Row]) -> str:
    """Lay out the table of all rows and lengths, and below it one of what is shown in the course of the video."""
    lines = [
        "| videos | length | colours and kinds | colours | kinds | background | motion, of the data's | jumps | "
        "flicker | change of area | drift of background | drift of colours |",
        "|---|---|" + "---|" * (len(SHARES) + len(MEANS)),
    ]
    for seconds in study.seconds:
        for row in rows:
            windows = row.at(seconds)
            means = {name: spread([getattr(window, name) for window in windows]).mean for name in MEANS}
            # The row of the drawn scenes is the first.
            means["motion"] /= spread([window.motion for window in rows[0].at(seconds)]).mean
            cells = [share(windows, name) for name in SHARES] + [number(means[name]) for name in MEANS]
            lines.append(f"| {row.name} | {seconds} s | {' | '.join(cells)} |")
    ends = range(WINDOW_SECONDS, study.seconds[-1] + 1, WINDOW_SECONDS)
    lines += ["", f"| colours and kinds, in the {WINDOW_SECONDS} s before | {' | '.join(f'{end} s' for end in ends)} |"]
    lines += ["|---|" + "---|" * len(ends)]
    for row in rows:
        shares = [sum(window.things for window in row.at(end)) / len(row.videos) for end in ends]
        lines.append(f"| {row.name} | {' | '.join(f'{value:.0%}' for value in shares)} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Write a mean, which is unknown where no thing was seen."""
    return "-" if math.isnan(value) else f"{value:.3g}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"measure_tiny_model: error: {error}", file=sys.stderr)
        sys.exit(2)
