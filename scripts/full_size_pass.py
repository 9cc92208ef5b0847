"""Run one real pass of the full-size 1.3B network at 480x832 and say how long it took and how much memory.

    python scripts/full_size_pass.py [--dtype float32]

A chunk of 3 frames attends to Relax Forcing's 4 frames and itself, as from the third chunk of any video on. Weights are
random; speed does not depend on them. The store of 47 frames is left out, for a pass reads the gathered frames alone.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from rfjax.benchmark import flops, parts
from rfjax.benchmark.machine import process_memory, program_memory, this_machine
from rfjax.benchmark.preset import load_subject
from rfjax.benchmark.timing import compile_ahead
from rfjax.models.transformer import AttendedMemory, WanTransformer

MEMORY_FRAMES = 4


def main() -> None:
    """Run the pass and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    dtype = jnp.dtype(parser.parse_args().dtype)

    subject = load_subject("wan_1_3b")
    config, network = subject.config, subject.config.transformer
    weights = parts.random_weights(WanTransformer, network, dtype)
    prompt = jax.random.normal(jax.random.key(0), (1, network.text_len, network.text_dim))
    text = parts.text_context(config, weights, prompt)
    tokens = network.frame_tokens(*subject.frame_size)
    keys = jax.random.normal(jax.random.key(1), (network.num_layers, 1, MEMORY_FRAMES, tokens, network.dim), dtype)
    memory = AttendedMemory(keys, keys, jnp.full(1, MEMORY_FRAMES, jnp.int32))
    latents = jax.random.normal(jax.random.key(2), (1, config.chunk_frames, *subject.frame_size, network.in_dim))
    timestep = jnp.full((1, config.chunk_frames), 625.0)

    compiled = compile_ahead(parts.denoising_pass, config, weights, text, memory, latents, timestep)
    since = time.perf_counter()
    flow = jax.block_until_ready(compiled.call(weights, text, memory, latents, timestep))
    seconds = time.perf_counter() - since

    count = flops.transformer_pass(network, 1, config.chunk_frames, MEMORY_FRAMES + config.chunk_frames, tokens).total
    numbers = sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert jnp.isfinite(flow).all()
    print(
        f"{numbers / 1e9:.3f}e9 parameters, {dtype}, {subject.preset.height}x{subject.preset.width}, flow {flow.shape}"
    )
    print(f"compiled in {compiled.seconds:.1f} s; one pass {seconds:.1f} s, {count / 1e12:.1f} TFLOP:", end=" ")
    print(f"{count / seconds / 1e9:.0f} GFLOP/s")
    print(f"program: {program_memory(compiled.call)}")
    print(f"process: {process_memory()}")
    print(f"machine: {this_machine()}")


if __name__ == "__main__":
    main()
