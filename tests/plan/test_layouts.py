"""What a rank of a layout is planned to hold is what the tensors of two real ranks on gloo hold."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.mesh import Mesh
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.allocations import AllocationRecorder
from litgpt.plan.build_spec import build_spec
from litgpt.plan.memory import StepMemory, list_host_kinds, plan_step_memory, record_step
from litgpt.plan.routed_rows import RoutedRows
from litgpt.recipe.pretrain import Pretrain
from litgpt.train.build_state import build_train_state
from litgpt.train.objective import next_token
from tests.plan.real_ranks import (
    LAYOUTS,
    SKEWS,
    build_measured_recipe,
    build_recipe_of,
    loaded_experts,
    measure_heaps,
)
from tests.plan.test_memory import CPU, TOKENS, fill_batches
from tests.processes import join_ranks, start_ranks


def plan_rank(recipe: Pretrain, layout: str, rank: int) -> StepMemory:
    """The planned memory of a rank of two."""
    skew = SKEWS.get(layout, 1.0)
    routed = RoutedRows(skew if rank == 0 else 2 - skew)
    spec, dims = build_spec("pretrain", recipe), recipe.parallel.resolve_dims(2)
    settings: dict[str, Any] = {"length": TOKENS, "steps": 10, "routed": routed}
    with fake_mesh(dims, rank) as mesh:
        micro_batches = recipe.train.accumulation(dims.data_ranks)
        return plan_step_memory(recipe, spec, mesh, micro_batches=micro_batches, **settings)


def record_real_ranks() -> None:
    """Write the memory of this rank's real steps, by layout."""
    dist.init_process_group("gloo")
    parts = {}
    for layout in LAYOUTS:
        recipe = build_recipe_of(layout)
        mesh = Mesh(recipe.parallel.resolve_dims(2), "cpu")
        recorder = AllocationRecorder()
        # gloo does not tell that it has sent a tensor, as NCCL does, before it is asked to wait for that
        sends = patch.object(dist.Work, "is_completed", return_value=True)
        with accelerator_paths(), loaded_experts(layout), sends, recorder:
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
            planned = plan_rank(build_recipe_of(layout), layout, rank)
            for kind in ("parameters", "gradients", "optimizer", "activations", "logits"):
                assert planned.parts[kind] == pytest.approx(real[layout][kind], rel=0.03), (layout, rank, kind)
            host = real[layout].pop("host")
            assert planned.host == pytest.approx(host, rel=0.03), (layout, rank)
            assert planned.peak == pytest.approx(sum(real[layout].values()), rel=0.03), (layout, rank)


@pytest.mark.slow
def test_planned_peaks_are_what_the_threads_of_two_real_ranks_have_allocated(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("counts allocations by a library for glibc, which needs a C compiler")
    for rank, heaps in enumerate(measure_heaps(tmp_path, compiler)):
        for layout, allocated in heaps.items() if rank == 0 else [("pipeline", heaps["pipeline"])]:
            planned = plan_rank(build_measured_recipe(layout), layout, rank)
            assert planned.peak == pytest.approx(allocated, rel=0.1), (layout, rank)
