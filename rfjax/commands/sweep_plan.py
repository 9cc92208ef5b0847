"""What a run of `rfjax sweep` is to make: study, flags, checkpoint and output folder checked against each other."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rfjax.commands import generate
from rfjax.commands.plan import Plan, make_plan
from rfjax.errors import UserError
from rfjax.evaluation.frames import opencv
from rfjax.evaluation.study import (
    Study,
    Variant,
    check_same,
    expand_variants,
    find_study,
    load_study,
    resolved,
)
from rfjax.evaluation.tables import Format, check_format
from rfjax.io import outputs
from rfjax.io.prompts import Request, read_prompt_file
from rfjax.sampling.budget import Budget, VideoShape, estimate
from rfjax.sampling.jobs import Job, batches

STUDY = "study.yaml"


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A variant, and what `rfjax generate` would do for it."""

    variant: Variant
    plan: Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Videos made together: all jobs under all members, whose policies differ in numbers alone."""

    members: list[Member]
    """Filled up by repeating the last."""
    jobs: list[Job]
    """Filled up by repeating the last."""

    @property
    def videos(self) -> dict[Member, dict[int, Job]]:
        """The jobs that each member lacks, by their place among all videos of the step."""
        return {
            member: {
                row * len(self.jobs) + column: job
                for column, job in enumerate(dict.fromkeys(self.jobs))
                if job in member.plan.missing
            }
            for row, member in enumerate(dict.fromkeys(self.members))
        }

    @property
    def size(self) -> int:
        """Videos that go through the network, repeated ones included."""
        return len(self.members) * len(self.jobs)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A run of `rfjax sweep`."""

    title: str
    """Of the report."""
    resolved: dict[str, Any]
    """What goes into `study.yaml`."""
    members: list[Member]
    """In the order of the study, at least one."""
    compilations: int
    """Sets of members that share a compiled step."""
    steps: list[Step]
    """What is missing, in the order in which it is made."""
    budgets: dict[str, Budget]
    """What the largest step of each variant needs, by the variant's name."""
    output: Path
    kind: Format
    """Of the tables."""

    @property
    def plan(self) -> Plan:
        """That of the first variant, for what all variants share."""
        return self.members[0].plan

    @property
    def missing(self) -> int:
        """Videos to be made."""
        return sum(len(member.plan.missing) for member in self.members)


def make_sweep(args: argparse.Namespace) -> Sweep:
    """Check everything that can be checked before weights are read, and write nothing.

    Raises:
        UserError: anything wrong with the study, the flags, the checkpoint's sizes, the output folder, or a package
            that is not installed.
    """
    opencv()
    check_format(args.format)
    path = find_study(args.study)
    study = load_study(path)
    study = dataclasses.replace(study, prompts=tuple(_prompts(study, path)), prompt_file=None)
    variants = expand_variants(study, path)
    outputs.check_writable(args.output)
    members = [Member(variant, _plan(args, study, variant, path)) for variant in variants]
    values = resolved(study, variants, members[0].plan.settings)
    if not args.overwrite:
        check_same(args.output, args.output / STUDY, values)
    groups: dict[Any, list[Member]] = {}
    for member in members:
        groups.setdefault(jax.tree.structure(member.plan.policy), []).append(member)
    steps, budgets = [], {}
    for group in groups.values():
        own = _steps(group, args.batch_size, args.together)
        budget = _budget(group[0].plan, max((step.size for step in own), default=1))
        budgets |= {member.variant.name: budget for member in group}
        steps += own
    return Sweep(
        title=study.description or path.stem,
        resolved=values,
        members=members,
        compilations=len(groups),
        steps=steps,
        budgets=budgets,
        output=args.output,
        kind=args.format,
    )


def _prompts(study: Study, path: Path) -> list[str]:
    """Return the study's prompts, each once."""
    if study.prompt_file is not None:
        return list(dict.fromkeys(read_prompt_file(path.parent / study.prompt_file)))
    prompts = []
    for number, prompt in enumerate(study.prompts):
        try:
            prompts += [request.prompt for request in generate.read_requests([prompt], None)]
        except UserError as error:
            raise UserError(str(error).replace("--prompt", f"{path.name}: prompts[{number}]", 1)) from None
    return list(dict.fromkeys(prompts))


def _plan(args: argparse.Namespace, study: Study, variant: Variant, path: Path) -> Plan:
    """Plan one variant as `rfjax generate` would, with the study's settings for its flags."""
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    flags = {
        **vars(parser.parse_args([])),
        **{name: getattr(study, name) for name in ("seconds", "latent_frames", "height", "width", "fps", "seed")},
        **{name: getattr(args, name) for name in ("checkpoint", "dtype", "batch_size", "overwrite")},
        "num_samples": study.num_samples,
        "mesh": {"data": 1},
        "policy": variant.policy_name,
        "settings": list(variant.texts.items()),
        "output": args.output / variant.name,
    }
    try:
        return make_plan(argparse.Namespace(**flags), [Request(prompt) for prompt in study.prompts], [])
    except UserError as error:
        flag = re.match(r"--(height|width|seconds|latent-frames) is", str(error))
        if flag is None:
            raise
        raise UserError(f"{path.name}: {flag[1].replace('-', '_')}{str(error)[flag.end() - 3 :]}") from None


def _steps(group: Sequence[Member], batch_size: int, together: int) -> list[Step]:
    """Order what a group lacks: batch by batch, each under all members that lack any of it."""
    steps = []
    lacking = [job for job in group[0].plan.asked if any(job in member.plan.missing for member in group)]
    for jobs in batches(lacking, batch_size):
        members = [member for member in group if not set(jobs).isdisjoint(member.plan.missing)]
        steps += [Step(some, jobs) for some in batches(members, together)]
    return steps


def _budget(plan: Plan, videos: int) -> Budget:
    shape: VideoShape = dataclasses.replace(plan.video, batch=videos)
    return estimate(plan.config, plan.policy, shape, plan.settings["dtype"])
