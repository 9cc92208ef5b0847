"""What `rfjax compile` does: the first chunks of the job, with weights that are all zero.

They are the programs themselves that are called, on arrays of the shapes and places that the job will have, so what is
compiled is what the job asks for. Weights are not read.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console

from rfjax.commands.generation import encode, encode_switches, prepare, who
from rfjax.commands.meshes import mesh_of
from rfjax.commands.plan import Plan
from rfjax.commands.production import empty_places
from rfjax.commands.prompt_schedule import ScheduledPrompt
from rfjax.errors import UserError
from rfjax.io.checkpoints import TOKENIZER, parameter_trees
from rfjax.io.mirrors import destination
from rfjax.io.prompts import Request
from rfjax.models.model import Model
from rfjax.models.tokenizer import Tokenizer
from rfjax.parallel.division import network_shardings
from rfjax.sampling.batch import Occupant
from rfjax.sampling.budget import needs, out_of_memory_says
from rfjax.sampling.pipeline import keys_from_seed


def compile_programs(args: argparse.Namespace, requests: list[Request], schedule: list[ScheduledPrompt]) -> None:
    """Compile what `rfjax generate` with these flags will call.

    Raises:
        UserError: an input is wrong, the device's memory is not enough, or programs are not kept.
    """
    config: Any = jax.config  # these two are not in its annotations
    folder = config.jax_compilation_cache_dir
    if folder is None or not config.jax_enable_compilation_cache:
        raise UserError("compiled programs are not kept here; set JAX_COMPILATION_CACHE_DIR to a folder for them")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    processes = who(args)
    with destination(args.output, processes.index, writing=False) as place:
        plan, budget, limit = prepare(args, requests, schedule, console, place, processes)
    if not plan.missing:
        return
    before, since = _programs(folder), time.perf_counter()
    with out_of_memory_says(needs(budget, limit)):
        _first_chunks(plan, _blank(plan))
    made = len(_programs(folder) - before)
    console.print(f"{made} programs compiled in {time.perf_counter() - since:.0f} s, kept in {folder}")


def _blank(plan: Plan) -> Model:
    """Return the plan's model with zeros for weights, on its devices."""
    dtype, mesh = jnp.dtype(plan.settings["dtype"]), mesh_of(plan)
    shapes = parameter_trees(plan.config)
    shardings = network_shardings(plan.config, mesh, shapes, plan.mesh.fully_sharded)

    def zeros(leaf: Any, sharding: Any = None) -> Any:
        return jnp.zeros(leaf.shape, dtype, device=sharding)

    trees = {
        name: jax.tree.map(zeros, tree, *([shardings[name]] if name in shardings else []))
        for name, tree in shapes.items()
    }
    tokenizer = Tokenizer.load(plan.checkpoint / TOKENIZER, plan.config.transformer.text_len)
    return Model(plan.config, **trees, tokenizer=tokenizer, dtype=dtype, mesh=mesh)


def _first_chunks(plan: Plan, model: Model) -> None:
    """Call every program once: a first chunk and a later one, a video that begins beside others, changes of prompt."""
    switches = encode_switches(plan, model)
    batch = empty_places(plan, model, switches, plan.places, plan.settings["latent_frames"])
    key = keys_from_seed(0, [0])[0]
    one = Occupant(encode(model, [plan.missing[0].prompt]), key)
    batch.admit(dict.fromkeys(range(plan.places), one))
    for _ in range(_chunks(plan)):
        batch.step().fetch()
    if len({job.latent_frames for job in plan.missing}) > 1 and plan.places > 1:
        batch.admit({0: one})
        batch.step().fetch()
    elif len(plan.missing) > plan.places and plan.sampler == "chunk":
        batch.admit(dict.fromkeys(range(plan.places), one))


def _chunks(plan: Plan) -> int:
    """How many chunks it takes to call all programs of a video."""
    if plan.sampler == "rolling":
        return plan.chunks  # its windows have other sizes where a video begins and ends
    last = max(plan.schedule, default=0) // plan.config.chunk_frames
    return min(last + 2, plan.chunks)


def _programs(folder: str) -> set[str]:
    return {path.name for path in epath.Path(folder).glob("jit_*-cache")}
