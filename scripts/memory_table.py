"""Memory that each device needs for a video, by model, mesh and policy: what `rfjax generate` checks before it begins.

    python scripts/memory_table.py [--model wan_1_3b wan_14b] [--seconds 60] [--policy NAME ...]

In GB, bfloat16, at the model's own frame size, one video a device or group; all networks are counted, the text encoder
too. Weights and memory are exact, activations an estimate.
"""

import argparse

from rfjax.commands.plan import latent_frames
from rfjax.config import load_model_config, preset_path
from rfjax.memory import parse_text
from rfjax.parallel.division import Sizes
from rfjax.sampling.budget import GB, VideoShape, divide, estimate

POLICIES = ("relax_forcing", "context_forcing", "attention_sink", "deep_forcing", "self_forcing:window_frames=21")
MESHES = (
    Sizes(),
    Sizes(sequence=2),
    Sizes(tensor=2),
    Sizes(sequence=4),
    Sizes(tensor=4),
    Sizes(sequence=4, fully_sharded=True),
    Sizes(sequence=2, tensor=4),
    Sizes(sequence=8, fully_sharded=True),
)


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["wan_1_3b", "wan_14b"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--policy", nargs="+", default=POLICIES)
    args = parser.parse_args()
    for name in args.model:
        config = load_model_config(preset_path("models", name))
        assert config.vae is not None
        frames = latent_frames(config.chunk_frames, config.vae.temporal_factor, args.seconds, None, fps=16)
        video = VideoShape(1, frames, config.latent_height, config.latent_width)
        budgets = [estimate(config, parse_text(policy), video, "bfloat16") for policy in args.policy]
        print(f"| {name} | weights | {' | '.join(args.policy)} |\n|---|---|{'---|' * len(args.policy)}")
        for mesh in MESHES:
            if config.transformer.num_heads % mesh.tensor:
                continue
            each = [divide(budget, mesh, config.latent_width) for budget in budgets]
            sizes = " | ".join(f"{budget.total / GB:.1f}" for budget in each)
            print(f"| {_name(mesh)} | {each[0].weights / GB:.1f} | {sizes} |")
        print()


def _name(mesh: Sizes) -> str:
    axes = [f"{axis}={size}" for axis, size in (("sequence", mesh.sequence), ("tensor", mesh.tensor)) if size > 1]
    return (",".join(axes) or "one device") + ", fully sharded" * mesh.fully_sharded


if __name__ == "__main__":
    main()
