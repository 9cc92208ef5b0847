"""The recipes in scripts/: shells read them, and their commands are rfjax's."""

import argparse
import dataclasses
import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rfjax.commands.generate import add_arguments
from rfjax.config import preset_path
from rfjax.parallel.processes import Processes
from rfjax.training.config import MeshConfig, load_train_config

SCRIPTS = Path(__file__).parent.parent / "scripts"


def parsed(command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(shlex.split(command))


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_bash_reads_it(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("name", ["generate_tpu_pod.sh", "generate_slurm.sh"])
def test_flags_are_those_of_generate(name):
    (job,) = re.findall(r'^job="(.*)"$', (SCRIPTS / name).read_text(), re.MULTILINE)
    assert "rfjax generate --processes auto $job" in (SCRIPTS / name).read_text()
    args = parsed(f"--processes auto {job}")
    assert (args.processes, args.checkpoint_every, args.prompt_file.suffix) == (None, 20, ".jsonl")


@pytest.mark.parametrize("flags", [[], ["--policy", "relax_forcing"], ["--prompt", "a fox in the snow"]])
def test_hosts_of_a_pod_get_the_flags_as_they_are(flags):
    (line,) = re.findall(r"^flags=.*$", (SCRIPTS / "generate_tpu_pod.sh").read_text(), re.MULTILINE)
    command = ["bash", "-uc", f"{line}; eval \"printf '%s\\n' x $flags\"", "script", *flags]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[1:-1] == flags


def test_pods_of_kubernetes_are_the_processes_of_the_job():
    service, job = yaml.safe_load_all((SCRIPTS / "generate_kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert (spec["completionMode"], pod["subdomain"]) == ("Indexed", service["metadata"]["name"])
    (command,) = pod["containers"][0]["args"]
    args = parsed(command.replace("$JOB_COMPLETION_INDEX", "3").removeprefix("exec rfjax generate"))
    address = f"{job['metadata']['name']}-0.{pod['subdomain']}:8476"
    assert args.processes == Processes(address, spec["completions"], 3)


def test_the_recipe_for_gpus_trains_as_published(tmp_path):
    """Run with a command that only tells how it is called."""
    fake = tmp_path / "bin" / "rfjax"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)

    def run(*words):
        path = {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
        command = [SCRIPTS / "train_self_forcing_8gpu.sh", *words]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)

    for name in ("ode", "wan_14b", "wan_1_3b"):
        missing = run()
        assert (missing.returncode, missing.stderr) == (
            2,
            f"checkpoints/{name}/config.json is missing; see docs/training.md\n",
        )
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").touch()
    words = run("--set", "steps=700").stdout.splitlines()
    assert words[:5] == ["train", "--config", "self_forcing", "--output", "runs/self_forcing"]
    settings = dict(text.split("=", 1) for flag, text in itertools.pairwise(words) if flag == "--set")
    published = load_train_config(preset_path("train", "self_forcing"))
    assert load_train_config(preset_path("train", "self_forcing"), settings) == dataclasses.replace(
        published, mesh=MeshConfig(fsdp=8), accumulate=8, steps=700
    )
