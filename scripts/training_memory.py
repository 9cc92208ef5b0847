"""Compute what training at 1.3B takes of each device, and how long a step takes, with no device.

    python scripts/training_memory.py [--fsdp 1 --fsdp 8] [--utilisation 0.4]

One example a device, 21 latent frames of 480x832, bfloat16, remat; the teacher of `self_forcing` has 14B. Parameters,
moments, average and frozen networks are those of the package's own trees, cut by its own rules; a policy's memory is
`rfjax.memory.footprint`. Gradients and activations are formulas, below: what is needed at least, without the copies
that a compiler makes (docs/training.md). Operations are counted as `rfjax benchmark` counts them, and divided by the
makers' peak numbers.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from rfjax.benchmark.flops import transformer_pass
from rfjax.benchmark.machine import peak_flops
from rfjax.config import ModelConfig, load_model_config, preset_path
from rfjax.io.checkpoints import parameter_trees
from rfjax.memory import MemoryPolicy, MemoryShape, create, footprint
from rfjax.parallel.mesh import make_mesh, parameter_sharding
from rfjax.sampling.state import memory_shape

FRAMES = 21
GB, TERA = 1e9, 1e12
HALF = 2
"""Bytes of a bfloat16 number."""
DEVICES = {"v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite", "H100": "H100", "H200": "H200"}
"""By what JAX calls them."""
GENERATOR_EVERY = 5


@dataclasses.dataclass(frozen=True)
class Memory:
    """GB a device."""

    parameters: float
    moments: float
    average: float
    frozen: float
    copies: float
    """Parameters in the type of the computation."""
    gradients: float
    """In the type of the computation, and in float32."""
    rollout: float
    activations: float

    @property
    def total(self) -> float:
        """The rollout's memory is free again when the scores are computed: the larger of the two counts."""
        kept = self.parameters + self.moments + self.average + self.frozen + self.copies + self.gradients
        return kept + max(self.rollout, self.activations)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", type=int, action="append", help="devices that share the parameters (default: 1, 8)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak (default: 0.4)")
    args = parser.parse_args()
    sizes = args.fsdp or [1, 8]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(sizes))

    model, teacher = (load_model_config(preset_path("models", name)) for name in ("wan_1_3b", "wan_14b"))
    meshes = {fsdp: make_mesh(1, fsdp, jax.devices()[:fsdp]) for fsdp in sizes}
    print_memory({name: {f: memory(m) for f, m in meshes.items()} for name, memory in stages(model, teacher).items()})
    print()
    print_time(flops_of_an_example(model, teacher), args.utilisation)


def stages(model: ModelConfig, teacher: ModelConfig) -> dict[str, Any]:
    """Return by name the functions from a mesh to the memory of a stage."""
    tokens = FRAMES * frame_tokens(model)
    window, relax = create("self_forcing", window_frames=FRAMES), create("relax_forcing")
    return {
        "teacher; causal, diffusion forcing": lambda mesh: one_network(model, mesh, tokens, frozen=()),
        "causal, teacher forcing": lambda mesh: one_network(model, mesh, 2 * tokens, frozen=()),
        "ode": lambda mesh: one_network(model, mesh, tokens, frozen=("text_encoder",)),
        "self_forcing": lambda mesh: self_forcing(model, teacher, mesh, window),
        "self_forcing, relax_forcing": lambda mesh: self_forcing(model, teacher, mesh, relax),
        "self_forcing, teacher of 1.3B": lambda mesh: self_forcing(model, model, mesh, window),
    }


def one_network(model: ModelConfig, mesh: Mesh, tokens: int, frozen: tuple[str, ...]) -> Memory:
    """Return the memory of a stage with one transformer that learns, from whole videos of so many tokens."""
    halves = parameter_trees(model, jnp.bfloat16)
    own, half = share(parameter_trees(model)["transformer"], mesh), share(halves["transformer"], mesh)
    return Memory(
        parameters=own,
        moments=2 * own,
        average=own,
        frozen=sum(share(halves[name], mesh) for name in frozen),
        copies=half,
        gradients=own + half,
        rollout=0,
        activations=activations(model, tokens),
    )


def self_forcing(model: ModelConfig, teacher: ModelConfig, mesh: Mesh, policy: MemoryPolicy) -> Memory:
    """Return the memory of generator, critic, teacher and text encoder, with the rollout's under a policy."""
    one = one_network(model, mesh, FRAMES * frame_tokens(model), frozen=("text_encoder",))
    kept = footprint(policy, policy_shape(model), FRAMES, jnp.bfloat16)
    chunk = model.chunk_frames * frame_tokens(model)
    projected = 2 * model.transformer.num_layers * chunk * model.transformer.dim * HALF
    in_rollout = kept.state_bytes + kept.view_bytes + projected
    return dataclasses.replace(
        one,
        parameters=2 * one.parameters,
        moments=2 * one.moments,
        frozen=one.frozen + share(parameter_trees(teacher, jnp.bfloat16)["transformer"], mesh),
        copies=2 * one.copies,
        rollout=in_rollout / GB + activations(model, chunk),
    )


def share(tree: PyTree, mesh: Mesh) -> float:
    """Return the GB of a tree that a device of the mesh holds."""
    shards = jax.tree.map(
        lambda leaf, sharding: int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize,
        tree,
        parameter_sharding(mesh, tree),
    )
    return sum(jax.tree.leaves(shards)) / GB


def activations(model: ModelConfig, tokens: int) -> float:
    """Return the GB of a backward pass with remat.

    Of each layer its input is kept. Of the one layer that is computed again there are about 17 vectors a token of the
    network's width (norms, queries, keys, values, outputs, before and after norm and rotation, of both attentions) and
    the feed-forward's hidden vector before and after its activation, each with its derivative. Attention keeps no
    scores, as on TPU and, by cuDNN, on NVIDIA GPUs.
    """
    network = model.transformer
    residuals = network.num_layers * network.dim
    layer = 17 * network.dim + 4 * network.ffn_dim
    return tokens * (residuals + layer) * HALF / GB


def flops_of_an_example(model: ModelConfig, teacher: ModelConfig) -> dict[str, float]:
    """Count a step's operations for one example; a backward pass is two forward ones, remat another.

    A rollout's chunk takes 2.5 denoising passes on average and a clean one; the generator's backward pass another clean
    one and, for the exit pass, four. Scores are one forward pass each. Memory is computed with at its full width.
    The prompt's share is left out: it is below 1%.
    """
    tokens, chunk = frame_tokens(model), model.chunk_frames
    chunks = FRAMES // chunk

    def forward(frames: int, attended: int, network: ModelConfig = model) -> float:
        return transformer_pass(network.transformer, 1, frames, attended, tokens).total

    whole, real = forward(FRAMES, FRAMES), forward(FRAMES, FRAMES, teacher)
    causal = sum(forward(chunk, chunk * (index + 1)) for index in range(chunks))

    def distilled(attended: int, score: float) -> float:
        one = chunks * forward(chunk, attended)
        rollout = 3.5 * one
        critic, generator = rollout + 4 * whole, rollout + 5 * one + whole + 2 * score
        return critic + generator / GENERATOR_EVERY

    relax = footprint(create("relax_forcing"), policy_shape(model), FRAMES, jnp.bfloat16)
    return {
        "teacher": 4 * whole,
        "causal, diffusion forcing; ode": 4 * causal,
        "causal, teacher forcing": 8 * causal,
        "self_forcing": distilled(FRAMES, real),
        "self_forcing, relax_forcing": distilled(relax.attended_frames, real),
        "self_forcing, teacher of 1.3B": distilled(FRAMES, whole),
    }


def policy_shape(model: ModelConfig) -> MemoryShape:
    """Sizes of the memory of one example."""
    return memory_shape(model, 1, (model.latent_height, model.latent_width))


def frame_tokens(model: ModelConfig) -> int:
    """Tokens of a latent frame."""
    return model.transformer.frame_tokens(model.latent_height, model.latent_width)


def print_memory(table: dict[str, dict[int, Memory]]) -> None:
    """Print a row a stage and number of devices that share the parameters."""
    names = [field.name for field in dataclasses.fields(Memory)]
    print("| stage | fsdp |", " | ".join(names), "| total GB |")
    print("|" + "---|" * (len(names) + 3))
    for stage, rows in table.items():
        for fsdp, memory in rows.items():
            numbers = " | ".join(f"{value:.1f}" for value in dataclasses.astuple(memory))
            print(f"| {stage} | {fsdp} | {numbers} | {memory.total:.1f} |")


def print_time(table: dict[str, float], utilisation: float) -> None:
    """Print a row a stage: operations of an example, and seconds of a step with one example a device."""
    print("| stage | TFLOP |", " | ".join(f"{name}, s" for name in DEVICES), "|")
    print("|" + "---|" * (len(DEVICES) + 2))
    for stage, count in table.items():
        peaks = [peak_flops(kind, "bfloat16") for kind in DEVICES.values()]
        seconds = " | ".join(f"{count / (peak * utilisation):.1f}" for peak in peaks if peak)
        print(f"| {stage} | {count / TERA:.0f} | {seconds} |")


if __name__ == "__main__":
    main()
