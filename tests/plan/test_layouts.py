"""What a rank of a layout is planned to hold is what the tensors of two real ranks on gloo hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.mesh import Mesh
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.allocations import AllocationRecorder
from litgpt.plan.build_spec import build_spec
from litgpt.plan.memory import plan_step_memory, record_step
from litgpt.recipe.build import build_recipe
from litgpt.recipe.pretrain import Pretrain
from litgpt.train.build_state import build_train_state
from litgpt.train.objective import next_token
from tests.plan.test_memory import CPU, PRETRAIN, TOKENS, TRAIN, repeat_batch
from tests.processes import join_ranks, start_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero-1": {"zero": 1},
    "zero-2": {"zero": 2},
    "zero-3": {"zero": 3},
    "tensor": {"tensor": 2},
}


def build_recipe_of(layout: str) -> Pretrain:
    train = TRAIN | {"global_batch_size": 8}
    settings = {"precision": "bf16-mixed", "devices": 2, "parallel": LAYOUTS[layout], "train": train}
    return build_recipe(Pretrain, {"out_dir": "unused"} | PRETRAIN | settings)


def record_real_ranks() -> None:
    """Write the memory of this rank's real steps, by layout."""
    dist.init_process_group("gloo")
    parts = {}
    for layout in LAYOUTS:
        recipe = build_recipe_of(layout)
        mesh = Mesh(recipe.parallel.resolve_dims(2), "cpu")
        recorder = AllocationRecorder()
        with accelerator_paths(), recorder:
            state = build_train_state(recipe, build_spec("pretrain", recipe), mesh, CPU, resumed=False, steps=10)
            batches = repeat_batch(recipe, mesh.dims.data_ranks)
            memory = record_step(recorder, state, batches, next_token(recipe.loss), max_norm=1.0)
        parts[layout] = asdict(memory)["parts"]
        del state
    Path(f"parts-{dist.get_rank()}.json").write_text(json.dumps(parts))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_planned_parts_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert join_ranks(start_ranks(record_real_ranks, folder=tmp_path, ranks=2), timeout=200) == [0, 0]
    for rank in range(2):
        real = json.loads((tmp_path / f"parts-{rank}.json").read_text())
        for layout in LAYOUTS:
            recipe = build_recipe_of(layout)
            with fake_mesh(recipe.parallel.resolve_dims(2), rank) as mesh:
                planned = plan_step_memory(recipe, build_spec("pretrain", recipe), mesh, length=TOKENS, steps=10)
            for kind in ("parameters", "gradients", "optimizer", "activations", "logits"):
                assert planned.parts[kind] == pytest.approx(real[layout][kind], rel=0.03), (layout, rank, kind)
            assert planned.peak == pytest.approx(sum(real[layout].values()), rel=0.03), (layout, rank)
