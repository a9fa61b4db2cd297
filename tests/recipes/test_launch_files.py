"""The launch files start litgpt on each node as their recipe needs it; `.ci/launch_files` checks their schemas."""

import os
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tutorials/launch"
RANK = "5"


def read_job_set() -> tuple[str, dict[str, str]]:
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"] and spec["completions"] == spec["parallelism"] == 8
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    return container["args"][0], {"JOB_COMPLETION_INDEX": RANK}


def read_skypilot() -> tuple[str, dict[str, str]]:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    gpus = task["resources"]["accelerators"].split(":")[1]
    addresses = "litgpt-workers-0-0.litgpt\n10.0.0.2\n"
    variables = {"SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": gpus}
    return task["run"], variables | {"SKYPILOT_NODE_RANK": RANK, "SKYPILOT_NODE_IPS": addresses}


def read_dstack() -> tuple[str, dict[str, str]]:
    task = yaml.safe_load((LAUNCH / "dstack.yaml").read_text())
    variables = {"DSTACK_NODES_NUM": str(task["nodes"]), "DSTACK_GPUS_PER_NODE": task["resources"]["gpu"][-1]}
    address = {"DSTACK_MASTER_NODE_IP": "litgpt-workers-0-0.litgpt"}
    return "\n".join(task["commands"]), variables | {"DSTACK_NODE_RANK": RANK} | address


def read_slurm() -> tuple[str, dict[str, str]]:
    text = (LAUNCH / "slurm.sh").read_text()
    assert all(f"#SBATCH --{key}=8\n" in text for key in ("nodes", "ntasks-per-node", "gpus-per-node"))
    return text, {}


def run_script(script: str, variables: dict[str, str], folder: Path) -> list[str]:
    """Run a script with programs that print their arguments in the place of the launchers; returns those."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    for name in ("torchrun", "srun", "pip"):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\n[ {name} = pip ] || printf "%s\\n" {name} "$@"\n')
        program.chmod(0o755)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", **variables}
    script = f'cd() {{ [ "$1" = /workspace ]; }}\n{script}'
    run = subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("read", [read_job_set, read_skypilot, read_dstack, read_slurm])
def test_a_launch_file_starts_the_processes_of_its_recipe(litgpt: Any, tmp_path: Path, read: Any) -> None:
    words = run_script(*read(), tmp_path)
    place = words.index("pretrain")
    recipe = litgpt(*words[place:]).recipe
    assert recipe.devices * recipe.num_nodes == 64 and recipe.resume == "auto"
    if words[0] == "torchrun":
        flags = (
            "--nnodes 8 --nproc-per-node 8 --node-rank 5 --master-addr litgpt-workers-0-0.litgpt --master-port 29500"
        )
        assert words[1:place] == [*flags.split(), "-m", "litgpt"]
    else:
        assert words[:place] == ["srun", "--kill-on-bad-exit=1", "litgpt"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_a_docker_file_is_short_and_copies_what_the_package_is_built_from(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert len(text.splitlines()) < 40
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in shlex.split(line)[1:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert set(copied) == needed | {*wheel["packages"], *wheel["force-include"]}
    extras = text.partition("'/src[")[2].partition("]")[0].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    required = [f"'{requirement}'" for requirement in project["project"]["dependencies"] if "torch" in requirement]
    assert all(requirement in text for requirement in required)
