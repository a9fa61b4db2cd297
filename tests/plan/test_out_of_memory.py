"""A run without enough memory ends in one line, which names what needs it and the setting that saves most."""

import json
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.cli import main
from litgpt.errors import UserError
from litgpt.parallel.memory_errors import is_out_of_memory
from litgpt.plan import out_of_memory
from litgpt.plan.out_of_memory import describe_request, explain_out_of_memory, explain_plan
from litgpt.recipe.build import build_recipe
from litgpt.recipe.pretrain import Pretrain
from litgpt.train.loop import Loop
from tests.processes import join_ranks, start_ranks
from tests.runs import write_recipe, write_text

RECIPE = build_recipe(Pretrain, {"model_name": "tiny", "out_dir": "out"})
PLAN: dict[str, Any] = {
    "worst": {
        "rank": 3,
        "peak_gib": 90.0,
        "parts": {"parameters": 5.0, "optimizer": 10.0, "activations": 60.0, "logits": 8.0, "allowance": 7.0},
    },
    "savings": [{"key": "recompute.granularity", "value": "full", "memory": 40.0, "saved": 50.0}],
}


def ask_for_too_much() -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def test_the_allocator_of_the_cpu_has_its_own_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        ask_for_too_much()
    assert is_out_of_memory(caught.value)
    assert describe_request(str(caught.value)) == "out of memory, when 1073741824.00 GiB more were needed"
    message = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"
    assert is_out_of_memory(torch.OutOfMemoryError(message)) and is_out_of_memory(MemoryError())
    assert describe_request(message) == "out of memory, when 20.00 MiB more were needed"
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_run_has_freed_its_memory_when_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    references = []

    def train() -> None:
        weights = torch.zeros(8)
        weights.grad = torch.ones(8)
        references.append(weakref.ref(weights))
        ask_for_too_much()

    def count_kept(command: str, recipe: Any) -> str:
        assert (command, recipe) == ("pretrain", RECIPE)
        return f"{sum(reference() is not None for reference in references)} kept"

    monkeypatch.setattr(out_of_memory, "plan_in_process", count_kept)
    message = r"^out of memory, .*; 0 kept; earlier checkpoints"
    with pytest.raises(UserError, match=message), explain_out_of_memory("pretrain", RECIPE):
        train()


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), explain_out_of_memory("pretrain", RECIPE):
        1 / 0  # noqa: B018


def test_the_largest_items_and_the_best_setting_are_named() -> None:
    assert explain_plan(PLAN) == (
        "rank 3 is planned to need 90.00 GiB, most of it for activations 60.00, optimizer states 10.00, logits 8.00 "
        "GiB; set recompute.granularity: full, with which it is 40.00 GiB"
    )
    assert explain_plan(PLAN | {"savings": []}).endswith("use more devices, or a smaller train.max_seq_length")


def test_a_recipe_that_is_not_planned_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "EXPLANATION_SECONDS", 0.01)
    reason = out_of_memory.plan_in_process("pretrain", RECIPE)
    assert reason == "no plan was made (TimeoutExpired); see litgpt plan pretrain"


def train_with_little_memory() -> int:
    """Resume the run in this folder, with 600 MiB more than it has before its first step."""
    advance = Loop.advance

    def limit_and_advance(loop: Loop, batches: Any) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), resource.RLIM_INFINITY))
        advance(loop, batches)

    Loop.advance = limit_and_advance  # type: ignore[method-assign]
    return main(["pretrain", "--config", "recipe.yaml", "--resume", "true"])


def hash_files(folder: Path) -> dict[str, int]:
    return {str(path): hash(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_real_run_without_memory(tmp_path: Path) -> None:
    write_text(tmp_path, documents=8)
    shape = {"model_config__n_embd": 256, "model_config__intermediate_size": 1024, "model_config__n_layer": 4}
    write_recipe(tmp_path, **shape, train__max_steps=1)
    assert join_ranks(start_ranks(main, ["pretrain", "--config", "recipe.yaml"], folder=tmp_path)) == [0]
    checkpoint = tmp_path / "out" / "step-00000001"
    before = hash_files(checkpoint)
    batch = {"train__global_batch_size": 2048, "train__micro_batch_size": 1024, "train__max_steps": 2}
    write_recipe(tmp_path, **shape, **batch)
    assert join_ranks(start_ranks(train_with_little_memory, folder=tmp_path)) == [1]
    last = (tmp_path / "rank-0.log").read_text().splitlines()[-1]
    assert last.startswith("litgpt: error: out of memory, when 0.")
    assert "rank 0 is planned to need " in last and "most of it for activations " in last
    assert last.endswith("earlier checkpoints are intact") and "; set recompute.granularity: full, with which" in last
    assert before and hash_files(checkpoint) == before
    end = json.loads((tmp_path / "out" / "run.json").read_text())["starts"][-1]["end"]
    assert "DefaultCPUAllocator: can't allocate memory" in end["reason"]
