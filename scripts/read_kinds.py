"""Count as which kinds classical vision reads the single things that a model of moving shapes makes.

    python scripts/read_kinds.py [--checkpoint DIR] [--policy relax_forcing] [--prompts 24] [--latent-frames 21]
        [--split train] [--seed 7]

The prompts are captions of new scenes with one thing that stays in the picture. A row is a kind that was asked for, a
column what is read in a quarter of a second of video: a kind, `unclear` where the thing looks like none, `several` for
more than one thing of the colour, `nothing` for no such thing.
"""

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import rfjax
from rfjax.commands.plan import SHIPPED
from rfjax.data.shapes import KINDS, caption, staying_scenes
from rfjax.errors import UserError
from rfjax.evaluation.shape_videos import read_video
from rfjax.evaluation.shapes import Reading
from rfjax.memory.registry import parse_text
from rfjax.sampling.codec import to_bytes
from rfjax.sampling.pipeline import keys_from_seed

OTHERS = ("unclear", "several", "nothing")
SCENES_A_PROMPT = 8
"""Scenes drawn for each prompt, of which about half have one thing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the videos and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--policy", default="relax_forcing")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--latent-frames", type=int, default=21)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    drawn = staying_scenes(np.random.default_rng((args.seed, 1)), args.split, SCENES_A_PROMPT * args.prompts)
    scenes = [scene for scene in drawn if len(scene.shapes) == 1][: args.prompts]
    model = rfjax.load(args.checkpoint)
    config = model.config
    shape = (len(scenes), args.latent_frames, config.latent_height, config.latent_width, config.transformer.in_dim)
    embeds = rfjax.encode_prompt(model, [caption(scene) for scene in scenes])
    keys = keys_from_seed(0, range(len(scenes)))
    made = rfjax.rollout(model, parse_text(args.policy), embeds, shape, key=keys)
    counts = {kind: collections.Counter() for kind in KINDS}
    for scene, video in zip(scenes, np.asarray(to_bytes(rfjax.decode(model, made.latents))), strict=True):
        (thing,) = scene.shapes
        counts[thing.kind].update(seen_as(reading, thing.colour) for reading in read_video(video))
    print(f"| asked for | {' | '.join((*KINDS, *OTHERS))} |\n|---|{'---|' * len((*KINDS, *OTHERS))}")
    for kind, seen in counts.items():
        print(f"| {kind} | {' | '.join(str(seen[name]) for name in (*KINDS, *OTHERS))} |")


def seen_as(reading: Reading, colour: str) -> str:
    """Say what the thing of a colour is read as."""
    own = [thing for thing in reading.things if thing.colour == colour]
    if len(own) != 1:
        return "several" if own else "nothing"
    return own[0].kind or "unclear"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"read_kinds: error: {error}", file=sys.stderr)
        sys.exit(2)
