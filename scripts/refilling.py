"""How busy a batch stays whose videos have different lengths, against one whose videos all end together.

    python scripts/refilling.py [--checkpoint DIR] [--seconds 60 30 5] [--videos 7 9 20] [--places 4] [--rounds 2]

Both are jobs of `rfjax generate` with the same number of chunks: so many videos of each length, whose places become
empty at different times, and one video a place, of the length that makes up for it. What they call is compiled before.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

from rfjax import cli
from rfjax.commands.plan import SHIPPED, latent_frames, read_config
from rfjax.sampling.jobs import steps_needed

FPS = 16


def main() -> None:
    """Run the jobs in alternation and print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 30.0, 5.0])
    parser.add_argument("--videos", type=int, nargs="+", default=[7, 9, 20], help="of each length")
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    config, vae = read_config(args.checkpoint)
    frames = [latent_frames(config.chunk_frames, vae.temporal_factor, s, None, FPS) for s in args.seconds]
    mixed = [length for length, count in zip(frames, args.videos, strict=True) for _ in range(count)]
    chunks = sum(mixed) // config.chunk_frames
    if chunks % args.places:
        parser.error(f"{chunks} chunks do not divide among {args.places} places; choose another --videos or --places")
    even = [chunks // args.places * config.chunk_frames] * args.places
    for lengths in (frames, even[:1] * args.places):
        run(args, [min(length, 2 * config.chunk_frames) for length in lengths] + [config.chunk_frames])
    steps = steps_needed([], sorted((length // config.chunk_frames for length in mixed), reverse=True), args.places)
    print(
        f"{len(mixed)} videos, {chunks} chunks in {args.places} places; the other job has {args.places} videos; "
        f"{100 * chunks / args.places / steps:.1f}% were possible, as the last videos do not end together"
    )
    for _ in range(args.rounds):
        ours, ideal = run(args, mixed), run(args, even)
        share = f"{100 * ideal / ours:.1f}% of the ideal"
        print(f"mixed lengths {ours:.1f} s, one length {ideal:.1f} s: {share}", flush=True)


def run(args: argparse.Namespace, lengths: list[int]) -> float:
    """Make videos of so many latent frames; return how long it took, from the flags to the last record."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        lines = [
            json.dumps({"prompt": f"a red circle bounces {number}", "latent_frames": length})
            for number, length in enumerate(lengths)
        ]
        prompts = Path(temporary) / "prompts.jsonl"
        prompts.write_text("\n".join(lines))
        flags = ["--prompt-file", str(prompts), "--batch-size", str(args.places), "--mesh", "data=1"]
        since = time.perf_counter()
        if cli.main(["generate", "--checkpoint", str(args.checkpoint), *flags, "--output", f"{temporary}/videos"]):
            raise SystemExit("the job failed")
        return time.perf_counter() - since


if __name__ == "__main__":
    main()
