"""The three networks as the converter sees them."""

import dataclasses
from collections.abc import Iterable, Mapping

from checkpoints_convert import names
from checkpoints_convert.names import Rule


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a checkpoint and the layouts that its files come in."""

    name: str
    """Folder in a converted checkpoint."""
    title: str
    """For messages, with its article."""
    section: str
    """Its mapping in a configuration."""
    layouts: Mapping[str, tuple[Rule, ...]]
    """Table of each layout; the first is upstream's, in which `--to-torch` writes."""
    upstream_file: str
    """Name that `--to-torch` gives it."""

    @property
    def option(self) -> str:
        """Command-line option that takes its checkpoint."""
        return "--" + self.name.replace("_", "-")


NETWORKS = {
    network.name: network
    for network in (
        Network(
            "transformer",
            "a Wan transformer",
            "transformer",
            {"upstream": names.TRANSFORMER_UPSTREAM, "diffusers": names.TRANSFORMER_DIFFUSERS},
            "diffusion_pytorch_model.safetensors",
        ),
        Network(
            "vae",
            "a Wan VAE",
            "vae",
            {"upstream": names.VAE_UPSTREAM, "diffusers": names.VAE_DIFFUSERS},
            "Wan2.1_VAE.safetensors",
        ),
        Network(
            "text_encoder",
            "a UMT5 text encoder",
            "umt5",
            {"upstream": names.TEXT_ENCODER_UPSTREAM, "transformers": names.TEXT_ENCODER_TRANSFORMERS},
            "models_t5_umt5-xxl-enc.safetensors",
        ),
    )
}


def identify(tensors: Iterable[str]) -> tuple[Network, str] | None:
    """Return the network and layout whose table knows most of these bare names; None if none knows a third of them."""
    flat = list(names.flat_up_blocks(tensors).values())
    counts = {
        (network.name, layout): sum(any(rule.find(name) for rule in rules) for name in flat)
        for network in NETWORKS.values()
        for layout, rules in network.layouts.items()
    }
    (name, layout), count = max(counts.items(), key=lambda item: item[1])
    return (NETWORKS[name], layout) if 3 * count >= len(flat) else None
