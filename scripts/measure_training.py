"""Measure a stage of training on one device: seconds a step, those of the first, and the most memory that it took.

    python scripts/measure_training.py --stage self_forcing --model wan_1_3b --teacher wan_14b
    python scripts/measure_training.py --stage teacher --model moving_shapes --latent-frames 9 --batch-size 256

Sizes are those of `configs/models`; weights and data are random numbers, prompts embedded. Nothing is read from disk or
written. A process measures one stage, for the device counts its peak from the process's beginning on.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rfjax.benchmark.machine import process_memory, this_machine
from rfjax.benchmark.parts import random_weights
from rfjax.config import ModelConfig, TransformerConfig, load_model_config, preset_path
from rfjax.errors import UserError
from rfjax.memory import create
from rfjax.models.functional import Params
from rfjax.models.transformer import WanTransformer
from rfjax.training.config import CausalOptions, EMAConfig, OptimizerConfig, TeacherOptions, TrainConfig
from rfjax.training.optimizer import make_optimizer
from rfjax.training.stage import Stage
from rfjax.training.stages.causal import CausalStage
from rfjax.training.stages.self_forcing import SelfForcingStage
from rfjax.training.stages.teacher import TeacherStage
from rfjax.training.state import TrainState
from rfjax.training.update import Update, make_update

STAGES = ("teacher", "causal-diffusion", "causal-teacher", "self_forcing")


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a step of each player takes."""
    args = parse(argv)
    model = load_model_config(preset_path("models", args.model))
    teacher = load_model_config(preset_path("models", args.teacher or args.model)).transformer
    stage = make_stage(args, model, teacher)
    config = TrainConfig(
        stage=args.stage.partition("-")[0],
        batch_size=args.batch_size,
        optimizer=OptimizerConfig(clip_norm=1.0),
        ema=EMAConfig(),
        dtype=args.dtype,
        remat=args.remat,
    )
    optimizer = make_optimizer(config.optimizer, args.steps)
    state = first_state(stage, optimizer, model)
    frozen, batch = inputs(args, model, teacher)
    print(f"{args.stage}, {args.model}, {args.batch_size} x {args.latent_frames} latent frames, {args.dtype}", end="")
    print(", remat" if args.remat else "", flush=True)
    updates = {player: make_update(stage, player, optimizer, config, model) for player in stage.players}
    for player, update in updates.items():
        state, first = measure(update, state, frozen, batch, 1)
        print(f"{player}: the first step, with its compilation, took {first:.0f} s", flush=True)
    for player, update in updates.items():
        state, seconds = measure(update, state, frozen, batch, args.steps)
        print(f"{player}: {seconds:.3f} s a step, {args.batch_size / seconds:.3g} examples/s", flush=True)
    memory = process_memory()
    print("; ".join(f"{name.replace('_', ' ')} {value / 1e9:.1f}e9" for name, value in memory.items()))
    print(f"machine: {this_machine()}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--model", default="wan_1_3b", help="sizes: a name in configs/models (default: wan_1_3b)")
    parser.add_argument("--teacher", help="sizes of self_forcing's real score (default: those of --model)")
    parser.add_argument("--policy", help="memory of self_forcing's rollout (default: the window self_forcing)")
    parser.add_argument("--latent-frames", type=int, default=21)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one that is not (default: 3)")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch_size, args.latent_frames) < 1:
        parser.error("--steps, --batch-size and --latent-frames are numbers from 1 on")
    if args.stage != "self_forcing" and (args.teacher or args.policy):
        parser.error(f"--teacher and --policy are of stage self_forcing, not of {args.stage}; leave them out")
    return args


def make_stage(args: argparse.Namespace, model: ModelConfig, teacher: TransformerConfig) -> Stage:
    """Return the stage asked for."""
    if args.stage == "teacher":
        return TeacherStage(model, TeacherOptions(), args.remat)
    if args.stage.startswith("causal"):
        return CausalStage(model, CausalOptions(forcing=args.stage.partition("-")[2]), args.remat)
    return SelfForcingStage(
        config=model,
        policy=create(args.policy or "self_forcing"),
        latent_frames=args.latent_frames,
        latent_size=(model.latent_height, model.latent_width),
        window_frames=args.latent_frames,
        teacher=teacher,
        remat=args.remat,
    )


def first_state(stage: Stage, optimizer: optax.GradientTransformation, model: ModelConfig) -> TrainState:
    """Return the state of a fresh run, of random float32 weights."""
    params = {
        player: {"transformer": random_weights(WanTransformer, model.transformer, jnp.float32)}
        for player in stage.players
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={player: jax.jit(optimizer.init)(networks) for player, networks in params.items()},
        ema=jax.tree.map(jnp.copy, params[stage.players[0]]),
    )


def inputs(args: argparse.Namespace, model: ModelConfig, teacher: TransformerConfig) -> tuple[dict[str, Any], Params]:
    """Return what does not learn and a batch of random latents with embedded prompts."""
    network, count = model.transformer, args.batch_size
    prompt = (network.text_len, network.text_dim)
    shape = (count, args.latent_frames, model.latent_height, model.latent_width, network.in_dim)
    batch = {
        "latents": jax.random.normal(jax.random.key(1), shape),
        "prompt_embeds": jax.random.normal(jax.random.key(2), (count, *prompt)),
    }
    frozen: dict[str, Any] = {"negative_embeds": jax.random.normal(jax.random.key(3), (1, *prompt))}
    if args.stage == "self_forcing":
        frozen["teacher"] = random_weights(WanTransformer, teacher, jnp.dtype(args.dtype))
    return frozen, batch


def measure(
    update: Update, state: TrainState, frozen: dict[str, Any], batch: Params, steps: int
) -> tuple[TrainState, float]:
    """Return the state after some steps and the seconds that one took."""
    since, numbers = time.perf_counter(), {}
    for step in range(steps):
        state, numbers = update(state, frozen, batch, step)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - since) / steps
    assert all(jnp.isfinite(value) for value in numbers.values()), numbers
    return state, seconds


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"measure_training: error: {error}", file=sys.stderr)
        sys.exit(2)
