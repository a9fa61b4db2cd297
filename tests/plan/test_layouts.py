"""What a rank of a layout is planned to hold is what the tensors of two real ranks on gloo hold."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.model.moe import Router
from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.mesh import Mesh
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.allocations import AllocationRecorder
from litgpt.plan.build_spec import build_spec
from litgpt.plan.memory import list_host_kinds, plan_step_memory, record_step
from litgpt.plan.routed_rows import RoutedRows
from litgpt.recipe.build import build_recipe
from litgpt.recipe.pretrain import Pretrain
from litgpt.train.build_state import build_train_state
from litgpt.train.objective import next_token
from tests.plan.test_memory import CPU, EXPERTS, PRETRAIN, TOKENS, TRAIN, fill_batches
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


def build_recipe_of(layout: str) -> Pretrain:
    train = TRAIN | {"global_batch_size": 8}
    settings = {"precision": "bf16-mixed", "devices": 2, "train": train}
    return build_recipe(Pretrain, {"out_dir": "unused"} | PRETRAIN | settings | LAYOUTS[layout])


def select_by_load(skew: float) -> Any:
    """A replacement of `Router._select_experts`: the first half of the experts gets `skew` times the mean."""

    def select(router: Router, scores_NE: Tensor) -> Tensor:
        tokens, experts = scores_NE.shape
        half, per_token = experts // 2, router.config.n_expert_per_token
        on_first = round(tokens * skew / 2)  # tokens with all of their experts in the first half
        starts = torch.where(torch.arange(tokens) < on_first, 0, half)[:, None]
        return starts + torch.arange(per_token).expand(tokens, per_token)

    return select


def record_real_ranks() -> None:
    """Write the memory of this rank's real steps, by layout."""
    dist.init_process_group("gloo")
    parts = {}
    for layout in LAYOUTS:
        recipe = build_recipe_of(layout)
        mesh = Mesh(recipe.parallel.resolve_dims(2), "cpu")
        recorder = AllocationRecorder()
        select = select_by_load(SKEWS.get(layout, 1.0))
        # gloo does not tell that it has sent a tensor, as NCCL does, before it is asked to wait for that
        sends = patch.object(dist.Work, "is_completed", return_value=True)
        with accelerator_paths(), patch.object(Router, "_select_experts", select), sends, recorder:
            state = build_train_state(recipe, build_spec("pretrain", recipe), mesh, CPU, resumed=False, steps=10)
            spec = build_spec("pretrain", recipe)
            batches, host_kinds = fill_batches(recipe, spec, mesh.dims.data_ranks), list_host_kinds(recipe, spec)
            objective = next_token(recipe.loss)
            memory = record_step(recorder, state, batches, objective, max_norm=1.0, host_kinds=host_kinds)
        parts[layout] = memory.parts | {"host": memory.host}
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
        for layout in LAYOUTS if rank == 0 else ("pipeline", *SKEWS):  # in others the ranks are alike
            recipe = build_recipe_of(layout)
            routed = RoutedRows(SKEWS.get(layout, 1.0)) if rank == 0 else RoutedRows(2 - SKEWS.get(layout, 1.0))
            spec, dims = build_spec("pretrain", recipe), recipe.parallel.resolve_dims(2)
            micro_batches = recipe.train.accumulation(dims.data_ranks)
            with fake_mesh(dims, rank) as mesh:
                planned = plan_step_memory(
                    recipe, spec, mesh, length=TOKENS, steps=10, micro_batches=micro_batches, routed=routed
                )
            for kind in ("parameters", "gradients", "optimizer", "activations", "logits"):
                assert planned.parts[kind] == pytest.approx(real[layout][kind], rel=0.03), (layout, rank, kind)
            host = real[layout].pop("host")
            assert planned.host == pytest.approx(host, rel=0.03), (layout, rank)
            assert planned.peak == pytest.approx(sum(real[layout].values()), rel=0.03), (layout, rank)
