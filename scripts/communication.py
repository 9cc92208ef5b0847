"""What devices that divide a video send each other for a chunk, counted in the compiled program.

    python scripts/communication.py --model wan_1_3b --mesh sequence=2 sequence=4 tensor=4

The denoising of a chunk, with the pass that remembers it, is compiled for as many host devices, in the model's full
size; no weight is made and nothing is run. `--gather` has keys gathered where heads could be exchanged. The CPU's
compiler sums in float32 where others may in bfloat16: all-reduces are counted at the type that was asked for.
"""

import argparse
import collections
import os
import time
from typing import Any

PEAKS = {"H100/H200": (989e12, 450e9), "TPU v5e": (197e12, 100e9), "TPU v6e": (918e12, 180e9)}
"""bfloat16 operations a second of a device, and bytes a second that it can send its neighbours (one direction)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan_1_3b", help="a preset of configs/models (default: wan_1_3b)")
    parser.add_argument("--mesh", nargs="+", default=["sequence=2", "sequence=4", "tensor=2", "tensor=4"])
    parser.add_argument("--policy", default="relax_forcing")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gather", action="store_true")
    parser.add_argument("--fully-sharded", action="store_true", help="cut the parameters over sequence too")
    args = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = "64"
    from rfjax.commands.flags import mesh as read_mesh

    print(f"| {args.model} | collectives a chunk | sent by a device a chunk | " + " | ".join(PEAKS) + " |")
    print("|---|---|---|" + "---|" * len(PEAKS))
    for asked in args.mesh:
        since = time.perf_counter()
        found = count(args, read_mesh(asked))
        kinds = collections.Counter[str]()
        for each in found:
            kinds[each.kind] += each.times
        sent = sum(each.sent for each in found)
        how = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "none"
        links = " | ".join(f"{1e3 * sent / link:.0f} ms" for _, link in PEAKS.values())
        extra = ", keys gathered" * args.gather + ", fully sharded" * args.fully_sharded
        print(f"| {asked}{extra} | {how} | {sent / 1e9:.2f} GB | {links} |", flush=True)
        for kind in sorted(kinds):
            part = sum(each.sent for each in found if each.kind == kind)
            print(f"#   {kind}: {part / 1e9:.3f} GB")
        print(f"#   compiled in {time.perf_counter() - since:.0f} s")


def count(args: argparse.Namespace, axes: dict[str, int]):
    import jax
    import jax.numpy as jnp

    from rfjax import make_mesh, memory
    from rfjax.config import load_model_config, preset_path
    from rfjax.io.checkpoints import parameter_trees
    from rfjax.models import chunk_attention, layout
    from rfjax.parallel.collectives import collectives
    from rfjax.parallel.division import network_shardings
    from rfjax.sampling import rollout
    from rfjax.sampling.request import request_of

    if args.gather:
        layout.exchanges = chunk_attention.exchanges = lambda heads: False
    config = load_model_config(preset_path("models", args.model))
    size = axes.get("data", 1) * axes.get("sequence", 1) * axes.get("tensor", 1)
    mesh = make_mesh(axes.get("data", 1), axes.get("sequence", 1), axes.get("tensor", 1), devices=jax.devices()[:size])
    dtype = jnp.dtype(args.dtype)
    shapes = parameter_trees(config, dtype)["transformer"]
    shardings = network_shardings(config, mesh, {"transformer": shapes}, args.fully_sharded)["transformer"]

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params, samples = jax.tree.map(placed, shapes, shardings), axes.get("data", 1)
    frame = config.latent_height, config.latent_width
    shape = (samples, 240, *frame, config.transformer.in_dim)
    embeds = jnp.zeros((samples, config.transformer.text_len, config.transformer.text_dim), dtype)
    policy = memory.create(args.policy)
    sizes, noise = request_of(config, embeds, shape, None, jax.random.key(0), None)
    embeds, noise = rollout.spread(embeds, mesh), rollout.spread_noise(noise, mesh)
    begin = rollout._begin.lower(config, sizes, dtype, policy, params, embeds, mesh)
    text, state = jax.tree.map(placed, begin.out_info, begin.compile().output_shardings)
    step = rollout.step.lower(config, sizes.frame_size, policy, params, text, state, noise.at(0), mesh)
    return collectives(step.compile())


if __name__ == "__main__":
    main()
