"""What devices that divide a video send each other for a chunk, counted in the compiled program.

    python scripts/communication.py --model wan_1_3b --mesh sequence=2 sequence=4 tensor=4

The denoising of a chunk, with the pass that remembers it, is compiled for as many host devices, in the model's full
size; no weight is made and nothing is run. It is compiled in float32 and counted at the two bytes a number of bfloat16,
with which a CPU's compiler has its own ways. `--gather` has keys gathered where heads could be exchanged. Times are
what links and matrix units take at their makers' peaks, apart from each other; a program may do both at once.
"""

import argparse
import collections
import dataclasses
import os
from typing import Any

PEAKS = {"H100/H200": (989e12, 450e9), "TPU v5e": (197e12, 90e9), "TPU v6e": (918e12, 180e9)}
"""Operations a second of a device in bfloat16, and bytes a second that it sends: NVLink, an ICI axis both ways."""


def main() -> None:
    """Compile the chunk for every mesh asked for and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan_1_3b", help="a preset of configs/models (default: wan_1_3b)")
    parser.add_argument("--mesh", nargs="+", default=["sequence=2", "sequence=4", "tensor=2", "tensor=4"])
    parser.add_argument("--policy", default="relax_forcing")
    parser.add_argument("--gather", action="store_true")
    parser.add_argument("--fully-sharded", action="store_true", help="cut the parameters over sequence too")
    args = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = "64"
    from rfjax.commands.flags import mesh as read_mesh
    from rfjax.parallel.division import ONE_DEVICE

    columns = " | ".join(f"{name}: links / computation, ms" for name in PEAKS)
    print(f"| {args.model} | collectives a chunk | sent by a device a chunk | {columns} |")
    print("|---|---|---|" + "---|" * len(PEAKS))
    for asked in args.mesh:
        sizes = dataclasses.replace(ONE_DEVICE, **read_mesh(asked))
        found = count(args, sizes)
        kinds = collections.Counter[str]()
        for each in found:
            kinds[each.kind] += each.times
        sent = sum(each.sent for each in found) // 2
        how = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "none"
        work = operations(args) / sizes.group
        links = " | ".join(f"{1e3 * sent / link:.0f} / {1e3 * work / peak:.0f}" for peak, link in PEAKS.values())
        extra = ", keys gathered" * args.gather + ", fully sharded" * args.fully_sharded
        print(f"| {asked}{extra} | {how} | {sent / 1e9:.2f} GB | {links} |", flush=True)


def operations(args: argparse.Namespace) -> int:
    """Floating-point operations of a chunk of one video, whose memory is full."""
    import jax.numpy as jnp

    from rfjax import memory
    from rfjax.benchmark.flops import transformer_pass
    from rfjax.config import load_model_config, preset_path
    from rfjax.sampling.state import memory_shape

    config = load_model_config(preset_path("models", args.model))
    frame = config.latent_height, config.latent_width
    shape = memory_shape(config, 1, frame)
    attended = memory.footprint(memory.create(args.policy), shape, 240, jnp.float32).attended_frames
    tokens = config.transformer.frame_tokens(*frame)
    a_pass = transformer_pass(config.transformer, 1, config.chunk_frames, attended, tokens).total
    return (len(config.denoising_steps) + 1) * a_pass


def count(args: argparse.Namespace, axes: Any) -> list[Any]:
    """Return the collectives of a chunk, compiled for as many host devices as the `Sizes` of a mesh say."""
    import jax
    import jax.numpy as jnp

    from rfjax import memory
    from rfjax.config import load_model_config, preset_path
    from rfjax.io.checkpoints import parameter_trees
    from rfjax.models import chunk_attention, layout
    from rfjax.parallel.collectives import collectives
    from rfjax.parallel.division import division_mesh, network_shardings
    from rfjax.sampling import rollout
    from rfjax.sampling.request import request_of

    if args.gather:
        layout.exchanges = chunk_attention.exchanges = lambda heads: False
    config = load_model_config(preset_path("models", args.model))
    mesh = division_mesh(axes, jax.devices())
    dtype = jnp.float32
    shapes = parameter_trees(config, dtype)["transformer"]
    shardings = network_shardings(config, mesh, {"transformer": shapes}, args.fully_sharded)["transformer"]

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params, samples = jax.tree.map(placed, shapes, shardings), axes.data
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
