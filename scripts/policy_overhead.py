"""Compare each policy's chunk with that of a plain window which attends to as many frames.

    python scripts/policy_overhead.py [--preset small] [--repeats 3] [--policy NAME ...]

The window does nothing but keep the last frames at their true positions, so the ratio is what a policy's decisions, its
moving of frames and its positions cost. Chunks lie far into a video, where every memory is full; weights are random.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp

from rfjax.benchmark import parts
from rfjax.benchmark.build import Kept
from rfjax.benchmark.machine import this_machine
from rfjax.benchmark.preset import load_subject
from rfjax.benchmark.timing import compile_ahead, in_turns
from rfjax.memory import POLICIES, create, footprint
from rfjax.models.transformer import WanTransformer
from rfjax.sampling.request import ChunkNoise, sample_keys
from rfjax.sampling.rollout import step
from rfjax.sampling.state import memory_shape

LATE = 100
"""Chunk before which the memories are filled."""


def main() -> None:
    """Measure and print a row a policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=2, help="chunks measured; an even number for deep_forcing")
    parser.add_argument("--policy", action="append", help="default: all but the dense self_forcing")
    args = parser.parse_args()

    subject = load_subject(args.preset)
    config, size, dtype = subject.config, subject.frame_size, jnp.float32
    shape = memory_shape(config, 1, size)
    weights = parts.random_weights(WanTransformer, config.transformer, dtype)
    prompt = jax.random.normal(jax.random.key(1), (1, config.transformer.text_len, config.transformer.text_dim))
    text = parts.text_context(config, weights, prompt)
    noise = ChunkNoise(sample_keys(jax.random.key(2), 1), None, None)
    shared = (config, size)

    def chunks_of(policy):
        """Return a task that makes the next chunk."""
        state = Kept(parts.state_at(config, size, 1, 3 * LATE, dtype, policy, LATE))
        compiled = compile_ahead(step, *shared, policy, weights, text, state.value, noise)

        def run():
            state.value, _ = compiled.call(policy, weights, text, state.value, noise)
            return state.value

        return run

    print(f"machine: {this_machine()}; {args.preset}, float32, mean of {args.repeats} chunks, in turns")
    for name in args.policy or sorted(set(POLICIES) - {"self_forcing"}):
        policy = create(name)
        attended = footprint(policy, shape, 3 * LATE, dtype).attended_frames
        window = create("self_forcing", window_frames=attended)
        tasks = {"policy": chunks_of(policy), "window": chunks_of(window)}
        seconds = in_turns(tasks, {task: args.repeats for task in tasks}, lambda number, last: None)
        own, plain = (statistics.mean(seconds[task]) for task in ("policy", "window"))  # deep_forcing's differ in turns
        print(
            f"{name:16} {attended:3} frames  {own:7.3f} s  window {plain:7.3f} s  ratio {own / plain:.3f}",
            flush=True,
        )
        del tasks, policy, window
        jax.clear_caches()


if __name__ == "__main__":
    main()
