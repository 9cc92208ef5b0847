"""Tell by classical vision what the last frames of a bidirectional network's clips of moving shapes show.

    python scripts/measure_teacher.py --checkpoint DIR --output FILE.png [--latent-frames 1] [--prompts 48]
        [--guidance 2.5] [--steps 24] [--split train] [--seed 0] [--weak DIR --weak-guidance 1]

For the stages before the student: the network of `moving_shapes_pictures` (one latent frame), `moving_shapes_short`
(3), `moving_shapes_teacher` (21) or `moving_shapes_score` (9). Prompts are captions of new scenes of the kind that
training shows, or with `--split test` of those that it never shows; all things stay in the picture. The file shows the
frames that were read. With `--weak` the network is led away from that of a worse checkpoint, as
`self_forcing.weak_teacher` does in training.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import rfjax
from rfjax.data.shapes import Scene, caption, staying_scenes
from rfjax.errors import UserError
from rfjax.evaluation.frames import opencv
from rfjax.evaluation.shape_videos import shown
from rfjax.evaluation.shapes import read_frame
from rfjax.models.model import Model
from rfjax.sampling.bidirectional import Weak, sample_bidirectional
from rfjax.sampling.codec import encode_tokens, to_bytes, tokenizer_of

SHARES = ("things", "colours", "kinds", "background")
COLUMNS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Make the clips, read their last frames, print a table and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--latent-frames", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--weak", type=Path, metavar="DIR", help="a worse checkpoint, to be led away from")
    parser.add_argument("--weak-guidance", type=float, help="how far, with --weak; default: 1")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.weak is None and args.weak_guidance is not None:
        raise UserError(f"--weak-guidance is {args.weak_guidance:g}, but there is no --weak; name a worse checkpoint")
    cv2 = opencv()
    scenes = staying_scenes(np.random.default_rng((args.seed, 1)), args.split, args.prompts)
    frames = last_frames(args, scenes)
    told = [shown([read_frame(frame)], scene) for frame, scene in zip(frames, scenes, strict=True)]
    print("| captions of | clips | colours and kinds | colours | kinds | background |\n|---|---|---|---|---|---|")
    for count, name in ((1, "one thing"), (2, "two things")):
        own = [each for each, scene in zip(told, scenes, strict=True) if len(scene.shapes) == count]
        shares = " | ".join(f"{np.mean([each[share] for each in own]):.0%}" for share in SHARES)
        print(f"| {name} | {len(own)} | {shares} |")
    rows = [np.concatenate(list(frames[i : i + COLUMNS]), 1) for i in range(0, len(frames) - COLUMNS + 1, COLUMNS)]
    cv2.imwrite(str(args.output), cv2.cvtColor(np.concatenate(rows).repeat(2, 0).repeat(2, 1), cv2.COLOR_RGB2BGR))


def last_frames(args: argparse.Namespace, scenes: Sequence[Scene]) -> np.ndarray:
    """Make a clip of each scene's caption and return its last frame."""
    model = rfjax.load(args.checkpoint)
    config = model.config
    embeds = rfjax.encode_prompt(model, [caption(scene) for scene in scenes])
    nothing = encode_tokens(model, *tokenizer_of(model).nothing())
    size = config.latent_height, config.latent_width, config.transformer.in_dim
    shape = (len(scenes), args.latent_frames, *size)
    key = jax.random.key(args.seed)
    weak = None if args.weak is None else led_away_from(args.weak, args.weak_guidance, model)
    latents = sample_bidirectional(
        config, model.transformer, embeds, nothing, shape, key, args.steps, args.guidance, weak
    )
    return np.asarray(to_bytes(rfjax.decode(model, latents)[:, -1]))


def led_away_from(folder: Path, guidance: float | None, model: Model) -> Weak:
    """Load the worse network.

    Raises:
        UserError: there is none in the folder, or it has other sizes than the number of layers.
    """
    worse = rfjax.load(folder)
    sizes, others = model.config.transformer, worse.config.transformer
    if dataclasses.replace(others, num_layers=sizes.num_layers) != sizes:
        raise UserError(
            f"--weak is {folder}, whose transformer has other sizes than that of --checkpoint; only the number of "
            "layers may differ"
        )
    return Weak(worse.transformer, 1.0 if guidance is None else guidance)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"measure_teacher: error: {error}", file=sys.stderr)
        sys.exit(2)
