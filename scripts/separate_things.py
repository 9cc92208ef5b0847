"""Teach the text encoder of a model of moving shapes that the words of a thing mean the same beside any other thing.

    python scripts/separate_things.py FROM TO [--steps 1500]

A text encoder that learns with the teacher remembers which sets of things there are: where training shows a green
triangle and a purple ring, but never "a purple triangle and a green ring", the embedding of the latter says the former.
So it learns from its former self: the tokens of each of two things become the mean of those beside other things. The
captions are those of training; those of one thing, and the empty prompt, keep their embeddings, and all other networks
their parameters.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

import rfjax
from rfjax.config import TextEncoderConfig
from rfjax.data.shapes import COLOURS, KINDS, SIDES, Scene, caption, held_out, random_scene
from rfjax.errors import UserError
from rfjax.io.checkpoints import TOKENIZER, check_output, save
from rfjax.models.functional import Params
from rfjax.models.text_encoder import encode_tokens
from rfjax.models.tokenizer import Tokenizer
from rfjax.sampling.codec import tokenizer_of

CAPTIONS = 64
"""In a step; half of them have two things."""
OTHERS = 8
"""Things that stand beside each of two in place of the other."""
LEARNING_RATE = 1e-3
LOG_EVERY = 100


def main(argv: Sequence[str] | None = None) -> None:
    """Write the checkpoint with the new text encoder, which is in float32.

    Raises:
        UserError: there is no checkpoint with a text encoder and a tokenizer, the output is in use, or --steps is no
            possible number.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FROM")
    parser.add_argument("output", type=Path, metavar="TO", help="a new folder")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; 1 or more is needed")
    check_output(args.output)
    model = rfjax.load(args.source, dtype="float32")
    tokenizer = tokenizer_of(model)
    if model.config.umt5 is None or model.text_encoder is None:
        raise UserError(f"{args.source} has no text encoder; one that knows moving shapes is needed")
    learnt = separated(model.config.umt5, model.text_encoder, tokenizer, args.steps)
    save(args.output, model.config, {"text_encoder": learnt}, args.source / TOKENIZER, rest=args.source)


def separated(config: TextEncoderConfig, params: Params, tokenizer: Tokenizer, steps: int) -> Params:
    """Return the text encoder's parameters after it has learnt from its former self."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    former = params

    @jax.jit
    def step(params, state, ids, mask, first):
        target = embeddings_apart(config, former, ids, mask, first)

        def loss(params):
            error = encode_tokens(config, params, ids[:, 0], mask[:, 0]) - target
            return jnp.sum(jnp.square(error)) / (jnp.sum(mask[:, 0]) * config.dim)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for number, batch in zip(range(1, steps + 1), batches(np.random.default_rng(0), tokenizer), strict=False):
        params, state, value = step(params, state, *batch)
        if number % LOG_EVERY == 0 or number == steps:
            print(f"step {number} of {steps}: squared error {value:.5f}", flush=True)
    return params


def embeddings_apart(
    config: TextEncoderConfig,
    params: Params,
    ids: Int[Array, "B 1+2*N L"],
    mask: Int[Array, "B 1+2*N L"],
    first: Bool[Array, "B L"],
) -> Float[Array, "B L D"]:
    """Return embeddings of captions in which no thing knows of the other; the arguments are those of `batches`."""
    others = ids.shape[1] // 2
    beside = jax.vmap(lambda *tokens: encode_tokens(config, params, *tokens))(ids[:, 1:], mask[:, 1:])
    return jnp.where(first[..., None], beside[:, :others].mean(1), beside[:, others:].mean(1))


def batches(
    rng: np.random.Generator, tokenizer: Tokenizer
) -> Iterator[tuple[Int[np.ndarray, "B 1+2*N L"], Int[np.ndarray, "B 1+2*N L"], Bool[np.ndarray, "B L"]]]:
    """Yield captions of training drawn at random, and the empty prompt, as tokens and their mask.

    With each come N captions in which its second thing is another, then N of which the first is; where there is but one
    thing, they are all the same. The last array tells which tokens are those of the first thing.
    """
    nothing = [part[:, None] for part in tokenizer.nothing()]
    while True:
        texts = [row for _ in range(CAPTIONS) for row in with_others(random_scene(rng, "train"), rng)]
        ids, mask = (
            np.concatenate([part.reshape(CAPTIONS, 1 + 2 * OTHERS, -1), empty.repeat(1 + 2 * OTHERS, axis=1)])
            for part, empty in zip(tokenizer(texts), nothing, strict=True)
        )
        parted = (ids[:, 1 : 1 + OTHERS] != ids[:, :1]).any(1)
        yield ids, mask, np.cumsum(parted, axis=1) == 0


def with_others(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return the scene's caption, then those beside other second things and those beside other first ones."""
    scenes = [beside(scene, which, rng) for which in (1, 0) for _ in range(OTHERS)] if len(scene.shapes) > 1 else []
    return [caption(each) for each in [scene, *(scenes or [scene] * 2 * OTHERS)]]


def beside(scene: Scene, which: int, rng: np.random.Generator) -> Scene:
    """Return the scene with thing `which` in any colour and kind that training shows beside the other thing."""
    shapes, taken = list(scene.shapes), scene.shapes[1 - which].colour
    kinds = [kind for kind in KINDS if shapes[which].motion != "turns" or kind in SIDES]
    colours = [colour for colour in COLOURS if colour != taken]
    while True:
        colour, kind = str(rng.choice(colours)), str(rng.choice(kinds))
        shapes[which] = dataclasses.replace(shapes[which], colour=colour, kind=kind)
        if not held_out(changed := dataclasses.replace(scene, shapes=tuple(shapes))):
            return changed


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"separate_things: error: {error}", file=sys.stderr)
        sys.exit(2)
