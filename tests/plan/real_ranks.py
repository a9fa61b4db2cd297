"""Steps of two real ranks on gloo, and the most memory that all threads of a rank have allocated in them.

The profiler of torch does not tell: it misses what the threads of gloo free, and adds it up from step to step.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.model.moe import Router
from litgpt.parallel.mesh import Mesh
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.build_spec import build_spec
from litgpt.recipe.build import build_recipe
from litgpt.recipe.pretrain import Pretrain
from litgpt.train.build_state import build_train_state
from litgpt.train.objective import next_token
from litgpt.train.step import train_step
from tests.plan.test_memory import CPU, EXPERTS, PRETRAIN, TRAIN, fill_batches
from tests.processes import join_ranks, start_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero-1": {"parallel": {"zero": 1}},
    "zero-2": {"parallel": {"zero": 2}},
    "zero-3": {"parallel": {"zero": 3}},
    "tensor": {"parallel": {"tensor": 2}},
    "replicate": {"parallel": {"data_replicate": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "offload": {"parallel": {"cpu_offload": True}},
    "expert-skewed": {"parallel": {"expert": 2}, "model_config": EXPERTS},
    "expert-gathered": {"parallel": {"expert": 2, "expert_dispatch": "all-gather"}, "model_config": EXPERTS},
    "expert-tensor": {"parallel": {"expert_tensor": 2}, "model_config": EXPERTS},
}
SKEWS = {"expert-skewed": 1.5}
ALLOCATED = ("zero-1", "zero-2", "zero-3", "tensor", "pipeline")
"""The layouts whose allocated memory is measured."""


def build_recipe_of(layout: str, precision: str = "bf16-mixed") -> Pretrain:
    train = TRAIN | {"global_batch_size": 8}
    settings = {"precision": precision, "devices": 2, "train": train}
    return build_recipe(Pretrain, {"out_dir": "unused"} | PRETRAIN | settings | LAYOUTS[layout])


def build_measured_recipe(layout: str) -> Pretrain:
    """As `build_recipe_of`; products of small matrices in bfloat16 on a CPU take as much as a shard of the logits."""
    return build_recipe_of(layout, "32-true" if layout == "tensor" else "bf16-mixed")


@contextmanager
def loaded_experts(layout: str) -> Iterator[None]:
    """The context in which the first half of the experts gets a multiple of the mean."""
    skew = SKEWS.get(layout, 1.0)

    def select(router: Router, scores_NE: Tensor) -> Tensor:
        tokens, experts = scores_NE.shape
        half, per_token = experts // 2, router.config.n_expert_per_token
        on_first = round(tokens * skew / 2)  # tokens with all of their experts in the first half
        starts = torch.where(torch.arange(tokens) < on_first, 0, half)[:, None]
        return starts + torch.arange(per_token).expand(tokens, per_token)

    with patch.object(Router, "_select_experts", select):
        yield


def measure_heap(layout: str) -> int:
    """The most bytes that this rank has allocated in a step of a layout, after one of a micro-batch."""
    heap = ctypes.CDLL(os.environ["LD_PRELOAD"])
    heap.begin_count.restype = heap.get_peak.restype = ctypes.c_long
    recipe = build_measured_recipe(layout)
    spec, mesh = build_spec("pretrain", recipe), Mesh(recipe.parallel.resolve_dims(2), "cpu")
    gc.collect()
    before = heap.begin_count()
    with accelerator_paths(), loaded_experts(layout):
        state = build_train_state(recipe, spec, mesh, CPU, resumed=False, steps=10)
        batches = fill_batches(recipe, spec, mesh.dims.data_ranks)
        for some in (batches[:1], batches):
            heap.begin_count()
            train_step(state, some, next_token(recipe.loss), max_norm=1.0)
    return heap.get_peak() - before


def write_heaps() -> None:
    """Write what this rank has allocated, by layout."""
    dist.init_process_group("gloo")
    for layout in ALLOCATED:  # modules are imported, and caches filled
        measure_heap(layout)
    heaps = {layout: measure_heap(layout) for layout in ALLOCATED}
    Path(f"heaps-{dist.get_rank()}.json").write_text(json.dumps(heaps))
    dist.barrier()
    dist.destroy_process_group()


def measure_heaps(folder: Path, compiler: str) -> list[dict[str, int]]:
    """What each of two ranks allocates at most, by layout."""
    library = folder / "heap.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("heap.c")], check=True)
    words = [sys.executable, "-m", __name__, str(folder)]
    root = Path(__file__).parents[2]
    finished = subprocess.run(words, cwd=root, env={**os.environ, "LD_PRELOAD": str(library)}, check=False, timeout=250)
    logs = "".join((folder / f"rank-{rank}.log").read_text() for rank in range(2))
    assert finished.returncode == 0, logs
    return [json.loads((folder / f"heaps-{rank}.json").read_text()) for rank in range(2)]


if __name__ == "__main__":
    sys.exit(max(join_ranks(start_ranks(write_heaps, folder=Path(sys.argv[1]), ranks=2), timeout=200)))
