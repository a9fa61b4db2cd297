"""Every recipe for many devices splits its model over them, and each holds as many elements as computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from tests.processes import join_ranks, start_ranks
from tests.recipes import scale_worker

SCRIPTS = Path(__file__).parents[1] / "recipe/launch_scripts"
SCALE = sorted((Path(__file__).parents[2] / "config_hub/scale").glob("*.yaml"))


def read(litgpt: Callable[..., Any], path: Path) -> tuple[Any, Config]:
    """Read a recipe and the config of its model."""
    outcome = litgpt("pretrain" if "model_name:" in path.read_text() else "finetune_full", "--config", path)
    assert outcome.code == 0, outcome.err
    recipe = outcome.recipe
    return recipe, Config.from_name(getattr(recipe, "model_name", None) or recipe.checkpoint_dir.name)


def qwen_14b(_rank: int) -> float:
    """Matrices and their biases over 4 x 2 ranks, norms over the 2 that share; 48 layers of width 5,120."""
    layer = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 5120 + 2 * 1024 + 3 * 5120 * 13824
    return (48 * layer + 2 * 152064 * 5120) / 8 + (2 * 48 + 1) * 5120 / 2


def qwen_30b(rank: int, *, stages: int, shard: int, expert_shard: int) -> float:
    """128 experts over 8 x expert_shard ranks, the rest over `shard`; embedding and head on the outer stages."""
    dense = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128 + 128 * 2048 + 2 * 2048
    blocks = 48 // stages * (dense / shard + 128 * 3 * 2048 * 768 / (8 * expert_shard))
    ends = [151936 * 2048, 151936 * 2048 + 2048]  # embedding; head and its norm
    ends_on_rank = ends if stages == 1 else [ends[rank // 8]]
    return blocks + sum(ends_on_rank) / shard


def llama_70b(_rank: int) -> float:
    """Matrices over 8 x 8 ranks, norms over 8; 80 layers of width 8,192."""
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    return (80 * layer + 2 * 128256 * 8192) / 64 + (2 * 80 + 1) * 8192 / 8


def tiny_llama(_rank: int) -> float:
    """Everything over the 8 ranks of a node; 22 layers of width 2,048."""
    layer = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048
    return (22 * layer + 2 * 32000 * 2048 + 2048) / 8


def deepseek_v3(rank: int) -> float:
    """256 experts over 8 ranks in 8 shards, all else over 64, but the corrections; the last one has the prediction."""
    query, key_value = 1536 * (7168 + 128 * 192), 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    attention = query + key_value + 128 * 128 * 7168 + (1536 + 512 + 2 * 7168)  # and the norms
    dense, shared, experts = 3 * 7168 * 18432, 3 * 7168 * 2048, 256 * 3 * 7168 * 2048
    routed = (attention + 256 * 7168 + shared + experts) / 64 + 256
    ends = 129280 * 7168 / 64  # embedding or head
    if rank < 64:
        return 3 * (attention + dense) / 64 + routed + ends
    prediction = routed + (2 * 7168 * 7168 + 3 * 7168) / 64
    return routed + prediction + 2 * ends + 7168 / 64 if rank >= 15 * 64 else 4 * routed


HELD: dict[str, Callable[[int], float]] = {
    "qwen2.5-14b-8-gpus": qwen_14b,
    "qwen3-30b-a3b-16-gpus": lambda rank: qwen_30b(rank, stages=1, shard=16, expert_shard=2),
    "qwen3-30b-a3b-16-gpus-balanced": lambda rank: qwen_30b(rank, stages=1, shard=16, expert_shard=2),
    "qwen3-30b-a3b-16-gpus-fp8": lambda rank: qwen_30b(rank, stages=1, shard=16, expert_shard=2),
    "qwen3-30b-a3b-16-gpus-pipeline": lambda rank: qwen_30b(rank, stages=2, shard=8, expert_shard=1),
    "llama-3.1-70b-64-gpus": llama_70b,
    "tinyllama-64-gpus": tiny_llama,
    "deepseek-v3-1024-gpus": deepseek_v3,
}


def check(litgpt: Callable[..., Any], folder: Path, path: Path, *, every: bool) -> None:
    recipe, config = read(litgpt, path)
    world = recipe.devices * recipe.num_nodes
    ranks = range(0, world, 1 if world <= 64 else 64) if every else sorted({0, world - 1})
    work = start_ranks(scale_worker.worker, folder, recipe, config, ranks, folder=folder)
    assert join_ranks(work, timeout=900) == [0], (folder / "rank-0.log").read_text()[-2000:]
    held = {int(rank): count for rank, count in json.loads((folder / "held.json").read_text()).items()}
    assert held == {rank: HELD[path.stem](rank) for rank in ranks}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem.endswith("1024-gpus") else path for path in SCALE],
    ids=lambda path: path.stem,
)
def test_the_first_and_the_last_rank_hold_what_they_should(litgpt: Any, tmp_path: Path, path: Path) -> None:
    check(litgpt, tmp_path, path, every=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_every_rank_holds_what_it_should(litgpt: Any, tmp_path: Path, path: Path) -> None:
    check(litgpt, tmp_path, path, every=True)


@pytest.mark.parametrize(("name", "nodes"), [("quick_start", 1), ("dense_14b", 1), ("moe_30b", 2)])
def test_launch_scripts_translate_to_recipes_that_build(
    litgpt: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, nodes: int
) -> None:
    assert main(["explain", str(SCRIPTS / f"{name}.sh")]) == 0
    yaml = next(part for part in capsys.readouterr().out.split("---\n") if "checkpoint_dir:" in part)
    (tmp_path / "recipe.yaml").write_text(yaml)
    outcome = litgpt("finetune_full", "--config", tmp_path / "recipe.yaml", "--num_nodes", nodes)
    assert outcome.code == 0, outcome.err
    recipe, config = outcome.recipe, Config.from_name(outcome.recipe.checkpoint_dir.name)
    ranks = [0, recipe.devices * nodes - 1]
    work = start_ranks(scale_worker.worker, tmp_path, recipe, config, ranks, folder=tmp_path)
    assert join_ranks(work, timeout=250) == [0], (tmp_path / "rank-0.log").read_text()[-2000:]
    whole = sum(p.numel() for p in GPT.on_meta(config).parameters())
    held = json.loads((tmp_path / "held.json").read_text())
    assert list(held.values()) == pytest.approx([whole / (recipe.devices * nodes)] * 2, rel=1e-3)
