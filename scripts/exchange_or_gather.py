"""Time the two ways in which devices that divide the tokens of a video can see all its keys.

    python scripts/exchange_or_gather.py [--preset tiny] [--mesh sequence=2 sequence=4] [--chunks 8] [--rounds 3]

Exchanged: each device gives tokens of the other heads for those of its own heads, all-to-all, and holds the memory of
its heads. Gathered: each device holds the memory of its tokens, and all keys are gathered before they are attended.
`rfjax` exchanges wherever the heads divide. On a CPU the devices are host devices, whose links are its memory. Weights
are random; rounds alternate.
"""

import argparse
import os
import statistics
import time


def main() -> None:
    """Measure in turns and print a row a mesh."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="of configs/benchmark (default: tiny)")
    parser.add_argument("--policy", default="relax_forcing")
    parser.add_argument("--mesh", nargs="+", default=["sequence=2", "sequence=4"])
    parser.add_argument("--chunks", type=int, default=8, help="of the video")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

    import jax
    import jax.numpy as jnp

    from rfjax import Model, make_mesh, memory, parallelize, stream
    from rfjax.benchmark import parts
    from rfjax.benchmark.machine import this_machine
    from rfjax.benchmark.preset import load_subject
    from rfjax.commands.flags import mesh as read_mesh
    from rfjax.models import chunk_attention, layout
    from rfjax.models.transformer import WanTransformer

    subject = load_subject(args.preset)
    config, network = subject.config, subject.config.transformer
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    alone = Model(config, parts.random_weights(WanTransformer, network, dtype), dtype=dtype)
    exchanges = layout.exchanges
    ways = {"exchanged": exchanges, "gathered": lambda heads: False}

    def run(axes: dict[str, int], way: str) -> float:
        """Return seconds a chunk, without the first."""
        layout.exchanges = chunk_attention.exchanges = ways[way]
        jax.clear_caches()  # the way is none of the arguments
        model = parallelize(alone, make_mesh(**axes, devices=jax.devices()[: axes["sequence"]]))
        embeds = jax.random.normal(jax.random.key(1), (1, network.text_len, network.text_dim), dtype)
        shape = (1, args.chunks * config.chunk_frames, *subject.frame_size, network.in_dim)
        chunks = stream(model, memory.create(args.policy), embeds, shape, key=jax.random.key(2))
        jax.block_until_ready(next(chunks).latents)
        since = time.perf_counter()
        jax.block_until_ready([chunk.latents for chunk in chunks])
        return (time.perf_counter() - since) / (args.chunks - 1)

    print(f"machine: {this_machine()}; {args.preset}, {jnp.dtype(dtype).name}, {args.policy}, median of {args.rounds}")
    print("| mesh | exchanged, ms a chunk | gathered, ms a chunk | gathered to exchanged |\n|---|---|---|---|")
    for text in args.mesh:
        axes = read_mesh(text)
        rounds = [{way: run(axes, way) for way in ways} for _ in range(args.rounds)]
        ratio = statistics.median(each["gathered"] / each["exchanged"] for each in rounds)
        ours, theirs = (1e3 * statistics.median(each[way] for each in rounds) for way in ways)
        print(f"| {text} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
