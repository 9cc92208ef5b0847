"""On which devices a run makes its videos: as `--mesh` says, else as few for each video as can hold it."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from rfjax.commands.plan import Plan
from rfjax.config import TransformerConfig
from rfjax.errors import UserError
from rfjax.parallel.division import ONE_DEVICE, Sizes, check_heads, check_tokens, division_mesh, fill
from rfjax.sampling import rolling
from rfjax.sampling.budget import Budget, divide, estimate
from rfjax.sampling.jobs import places_for


def on_mesh(plan: Plan, asked: Mapping[str, int] | None, batch_size: int, limit: int | None) -> Plan:
    """Return the plan on this process's devices.

    Args:
        plan: on one device.
        asked: sizes of `--mesh`; None chooses them: each video has as few devices as can hold it, and the groups of
            devices share the videos.
        batch_size: the most videos that a device or group makes together.
        limit: bytes that each device has, if known.

    Raises:
        UserError: there are not so many devices, tokens or heads do not divide, or the sampler runs on one device.
    """
    there = jax.local_device_count()
    if asked is None:
        ways = _ways(plan, there)
    else:
        ways = [fill(Sizes(asked.get("data", 0), asked.get("sequence", 1), asked.get("tensor", 1)), there)]
        _check(plan, ways[0])
        if ways[0].sequence > 1:
            ways.append(dataclasses.replace(ways[0], fully_sharded=True))
    needs: list[tuple[int, Plan]] = []
    for sizes in ways:
        placed = _on(plan, sizes, batch_size)
        needs.append((budget_of(placed).total, placed))
        if limit is None or needs[-1][0] <= limit:
            return placed
    return min(needs, key=lambda each: each[0])[1]


def budget_of(plan: Plan) -> Budget:
    """Return what a run needs on each of its devices."""
    budget = estimate(plan.config, plan.policy, plan.video, plan.settings["dtype"], plan.pass_chunks)
    if plan.sampler == "rolling":
        size = plan.video.latent_height, plan.video.latent_width
        attended = rolling.attended_frames(plan.config, plan.policy, size, plan.video.latent_frames)
        budget = dataclasses.replace(budget, attended_frames=attended)
    return divide(budget, plan.mesh, plan.video.latent_width)


def mesh_of(plan: Plan) -> Mesh | None:
    """Return the devices of a plan, or None where they are one."""
    return None if plan.mesh.devices == 1 else division_mesh(plan.mesh, jax.local_devices())


def _on(plan: Plan, sizes: Sizes, batch_size: int) -> Plan:
    count = len(plan.missing)
    mesh = dataclasses.replace(sizes, data=max(1, min(sizes.data, count)))
    return dataclasses.replace(plan, mesh=mesh, places=places_for(count, batch_size, mesh.data))


def _check(plan: Plan, mesh: Sizes) -> None:
    if mesh.devices > 1 and plan.sampler == "rolling":
        raise UserError(f"--mesh {mesh} does not go with --sampler rolling, which runs on one device; use chunk")
    check_heads(plan.config.transformer, mesh)
    check_tokens(plan.config.transformer, _frame_size(plan), mesh.sequence)


def _ways(plan: Plan, devices: int) -> list[Sizes]:
    """Return the meshes that divide model and devices, those with the fewest devices a video first."""
    if plan.sampler == "rolling":
        return [ONE_DEVICE]
    network = plan.config.transformer
    tokens = network.frame_tokens(*_frame_size(plan))
    groups = sorted(_groups(network, tokens, devices), key=lambda group: _preference(network, *group))
    whole = [Sizes(devices // (sequence * tensor), sequence, tensor) for sequence, tensor in groups]
    sharded = [dataclasses.replace(sizes, fully_sharded=True) for sizes in whole if sizes.sequence > 1]
    return sorted(whole + sharded, key=lambda sizes: (sizes.group, sizes.fully_sharded))


def _groups(network: TransformerConfig, tokens: int, devices: int) -> Iterator[tuple[int, int]]:
    for tensor in range(1, devices + 1):
        for sequence in range(1, devices // tensor + 1):
            heads = network.num_heads % tensor == network.ffn_dim % tensor == 0
            if devices % (sequence * tensor) == 0 and heads and tokens % sequence == 0:
                yield sequence, tensor


def _preference(network: TransformerConfig, sequence: int, tensor: int) -> tuple[bool, int]:
    """Order meshes of as many devices by what passes between these (docs/scaling.md).

    Where tokens are exchanged for heads, `sequence` sends less than `tensor`; where keys are gathered, more.
    """
    gathers = network.num_heads % (sequence * tensor) != 0
    return gathers, -tensor if gathers else tensor


def _frame_size(plan: Plan) -> tuple[int, int]:
    return plan.video.latent_height, plan.video.latent_width


def idle(plan: Plan) -> int:
    """Return how many devices have no video to make."""
    return jax.local_device_count() - plan.mesh.devices
