"""One video a device on 1, 2, 4 and 8 devices, against as many videos in a batch on one.

    python scripts/weak_scaling.py [--preset tiny] [--devices 1 2 4 8] [--chunks 8] [--rounds 5]

On a CPU the devices are host devices that share its cores; the batch on one device does the same work on the same
cores, and what N devices take beyond it is what the division costs there. On GPUs and TPUs the time of a chunk should
stay that of one device. Weights are random.
"""

import argparse
import os
import statistics
import time


def main() -> None:
    """Measure in turns and print a row a number of devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="of configs/benchmark (default: tiny)")
    parser.add_argument("--policy", default="relax_forcing")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunks", type=int, default=8, help="of each video")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(max(args.devices)))

    import jax
    import jax.numpy as jnp

    from rfjax import Model, make_mesh, memory, parallelize, stream
    from rfjax.benchmark import parts
    from rfjax.benchmark.machine import this_machine
    from rfjax.benchmark.preset import load_subject
    from rfjax.models.transformer import WanTransformer

    subject = load_subject(args.preset)
    config = subject.config
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    alone = Model(config, parts.random_weights(WanTransformer, config.transformer, dtype), dtype=dtype)
    network = config.transformer

    def run(model: Model, videos: int) -> float:
        """Return seconds a chunk, without the first."""
        embeds = jax.random.normal(jax.random.key(1), (videos, network.text_len, network.text_dim), dtype)
        shape = (videos, args.chunks * config.chunk_frames, *subject.frame_size, network.in_dim)
        chunks = stream(model, memory.create(args.policy), embeds, shape, key=jax.random.key(2))
        jax.block_until_ready(next(chunks).latents)
        since = time.perf_counter()
        jax.block_until_ready([chunk.latents for chunk in chunks])
        return (time.perf_counter() - since) / (args.chunks - 1)

    tasks = {("devices", n): parallelize(alone, make_mesh(devices=jax.devices()[:n])) for n in args.devices}
    tasks |= {("batch", n): alone for n in args.devices}
    times: dict[tuple[str, int], list[float]] = {task: [] for task in tasks}
    for number in range(args.rounds + 1):
        for (kind, n), model in tasks.items():
            seconds = run(model, n)
            if number:  # the first compiles
                times[kind, n].append(seconds)

    print(f"machine: {this_machine()}; {args.preset}, {jnp.dtype(dtype).name}, {args.policy}, median of {args.rounds}")
    print("| devices = videos | ms a chunk | as a batch on one device | overhead of division |\n|---|---|---|---|")
    for n in args.devices:
        ratio = statistics.median(a / b for a, b in zip(times["devices", n], times["batch", n], strict=True))
        ours, batch = (1e3 * statistics.median(times[kind, n]) for kind in ("devices", "batch"))
        print(f"| {n} | {ours:.1f} | {batch:.1f} | {100 * (ratio - 1):+.0f}% |")


if __name__ == "__main__":
    main()
