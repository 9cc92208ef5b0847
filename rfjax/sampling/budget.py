"""How much memory of the device a run needs, known before anything is allocated."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rfjax.config import ModelConfig
from rfjax.errors import UserError
from rfjax.memory import MemoryPolicy, footprint
from rfjax.models.attention import SCORE_BYTES
from rfjax.models.functional import BLOCKS, abstract_params
from rfjax.models.text_encoder import UMT5Encoder
from rfjax.models.transformer import WanTransformer
from rfjax.models.vae import WanVAE, decode_init
from rfjax.parallel.division import Sizes
from rfjax.sampling.state import memory_shape

GB = 1e9


@dataclasses.dataclass(frozen=True)
class VideoShape:
    """Sizes of a batch of videos."""

    batch: int
    latent_frames: int
    latent_height: int
    latent_width: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run needs on the device, in bytes."""

    parameters: int
    """Numbers in all networks (a count, not bytes)."""
    attended_frames: int
    """Latent frames that a chunk attends to once the memory is full, its own included."""
    weights: int
    layer: int
    """Weights of one layer of the transformer, among them."""
    memory: int
    """The policy's stored frames and the view of one chunk."""
    denoising: int
    """The transformer's activations, an estimate."""
    decoding: int
    """The decoder's activations and caches, an estimate."""

    @property
    def working(self) -> int:
        """Activations and caches."""
        return self.denoising + self.decoding

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.memory + self.working


def estimate(config: ModelConfig, policy: MemoryPolicy, video: VideoShape, dtype: str, pass_chunks: int = 1) -> Budget:
    """Add up what a run allocates: weights and memory exactly, activations from the largest layers.

    Args:
        config: sizes of the networks.
        policy: of the memory.
        video: sizes of the batch.
        dtype: of weights and computation.
        pass_chunks: chunks that go through the transformer together.

    Raises:
        UserError: the policy's settings do not fit the video.
    """
    itemsize = jnp.dtype(dtype).itemsize
    shape = memory_shape(config, video.batch, (video.latent_height, video.latent_width))
    memory = footprint(policy, shape, video.latent_frames, jnp.dtype(dtype))
    networks = [(WanTransformer, config.transformer), (WanVAE, config.vae), (UMT5Encoder, config.umt5)]
    parameters = sum(_numbers(abstract_params(network, sizes)) for network, sizes in networks if sizes is not None)
    layers = abstract_params(WanTransformer, config.transformer)[BLOCKS]
    return Budget(
        parameters=parameters,
        attended_frames=memory.attended_frames,
        weights=parameters * itemsize,
        layer=_numbers(layers) // config.transformer.num_layers * itemsize,
        memory=memory.state_bytes + memory.view_bytes,
        denoising=_denoising_bytes(config, video, memory.attended_frames, itemsize, pass_chunks),
        decoding=_decoding_bytes(config, video, dtype),
    )


def divide(budget: Budget, mesh: Sizes, latent_width: int) -> Budget:
    """Return about what each device needs where several divide a video.

    Weights are cut over `tensor`, and where they are fully sharded over `sequence` too; two layers are then gathered.
    Decoding is divided where the columns of a latent frame are.
    """
    weights = budget.weights // mesh.tensor
    if mesh.fully_sharded:
        weights = weights // mesh.sequence + 2 * budget.layer // mesh.tensor
    return dataclasses.replace(
        budget,
        weights=weights,
        memory=budget.memory // mesh.group,
        denoising=budget.denoising // mesh.group,
        decoding=budget.decoding // (1 if latent_width % mesh.group else mesh.group),
    )


def _numbers(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _denoising_bytes(
    config: ModelConfig, video: VideoShape, attended_frames: int, itemsize: int, pass_chunks: int
) -> int:
    """One layer's activations, the packed keys and values, and the chunk's keys and values of all layers."""
    network = config.transformer
    frame = video.batch * network.frame_tokens(video.latent_height, video.latent_width) * network.dim
    chunk = config.chunk_frames * frame
    own = pass_chunks * chunk
    layer = own * (6 * itemsize + 3 * 4) + 2 * own * network.ffn_dim // network.dim * itemsize
    packed = 2 * 2 * (attended_frames * frame + own - chunk) * itemsize
    committed = 2 * network.num_layers * chunk * itemsize
    text = 2 * network.num_layers * video.batch * network.text_len * network.dim * itemsize
    return layer + packed + committed + text + 3 * SCORE_BYTES


def _decoding_bytes(config: ModelConfig, video: VideoShape, dtype: str) -> int:
    """The decoder's caches, and its largest layers: those at full resolution.

    Bytes a position and channel are fitted to the compiled program at 480x832 (4.2 GB in bfloat16, 5.5 in float32).
    """
    if config.vae is None:
        return 0
    vae = config.vae
    cache = jax.eval_shape(
        lambda: decode_init(vae, jnp.dtype(dtype), video.batch, video.latent_height, video.latent_width)
    )
    itemsize = jnp.dtype(dtype).itemsize
    positions = video.batch * vae.temporal_factor * video.latent_height * video.latent_width * vae.spatial_factor**2
    return _numbers(cache) * itemsize + positions * vae.dim * vae.dim_mult[0] * (20 + 4 * itemsize)


def device_limit(device: Any) -> int | None:
    """Bytes that this process may use of a `jax.Device`; on a CPU its share of what is free; None if unknown."""
    if device.platform == "cpu":
        free = host_limit(Path("/"))
        return None if free is None else free // jax.local_device_count()
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit")


def host_limit(root: Path) -> int | None:
    """Bytes of memory that are free and that a container or batch job leaves this process; None if unknown.

    Args:
        root: folder of `proc` and `sys`, where Linux tells both.
    """
    limits = [int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    groups = root / "sys/fs/cgroup"
    own = [line.removeprefix("0::/") for line in _lines(root / "proc/self/cgroup") if line.startswith("0::/")]
    for group in (groups, *(groups / path for name in own for path in (Path(name), *Path(name).parents))):
        limits += [int(line) for line in _lines(group / "memory.max") if line.isdigit()]
    return min(limits, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def check_fits(budget: Budget, limit: int | None) -> None:
    """Refuse what the device cannot hold.

    Raises:
        UserError: with how much is needed, for what, and how much there is.
    """
    if limit is not None and budget.total > limit:
        raise UserError(needs(budget, limit))


def needs(budget: Budget, limit: int | None) -> str:
    """Say how much a run needs, for what, how much there is, and what would need less."""
    there = "" if limit is None else f" and there are {limit / GB:.1f} GB"
    return (
        f"this run needs about {budget.total / GB:.1f} GB of device memory (weights {budget.weights / GB:.1f}, the "
        f"policy's memory {budget.memory / GB:.1f}, activations {budget.working / GB:.1f}){there}; "
        "try --dtype bfloat16, a smaller --batch-size, --height and --width, or a policy that keeps fewer frames"
    )


@contextlib.contextmanager
def out_of_memory_says(advice: str) -> Iterator[None]:
    """Explain where the device runs out of memory in spite of `check_fits`: others may use it, an estimate may be low.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device ran out of memory: {advice}") from None
