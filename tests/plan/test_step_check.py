"""Every recipe of the hub takes its step on fake tensors of a GPU, and what is planted in a step is found there."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.model import attention
from litgpt.model.attention import Attention
from litgpt.plan.build_spec import build_spec
from litgpt.plan.ranks import resolve_run
from litgpt.plan.step_check import check_run_steps
from litgpt.plan.step_findings import Finding
from litgpt.recipe.build import build_recipe, collect_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.train import objective
from tests.plan.test_memory import EXPERTS, FINETUNE, SHAPE, TRAIN, Case, build_case

HUB = Path(__file__).parents[2] / "config_hub"
RECIPES = sorted(HUB.rglob("*.yaml"))
MIXED = Case(
    "pretrain",
    {
        **{"model_name": "tiny", "model_config": SHAPE | {"n_layer": 1}, "precision": "bf16-mixed", "devices": 1},
        "train": TRAIN | {"global_batch_size": 2},
    },
)
SMALL: dict[str, Case] = {
    "recompute": Case("pretrain", MIXED.settings | {"recompute": {"granularity": "full"}}),
    "plain": Case("pretrain", MIXED.settings | {"loss": {"impl": "plain"}}),
    "experts": Case("pretrain", MIXED.settings | {"model_config": EXPERTS}),
    "sharded": Case("pretrain", MIXED.settings | {"devices": 4, "parallel": {"tensor": 2}, "train": TRAIN}),
    "sharded-experts": Case(  # whose routers find the loads of the first micro-batch in the second one
        "pretrain",
        MIXED.settings
        | {"model_config": EXPERTS, "devices": 2, "train": TRAIN | {"global_batch_size": 8}}
        | {"moe": {"router_load_balancing_type": "global_aux_loss", "aux_loss_coeff": 0.01}},
    ),
    "qlora": Case("finetune_lora", FINETUNE | {"precision": "bf16-true", "devices": 1, "quantize": "bnb.nf4"}),
}


def check(case: Case) -> list[Finding]:
    return list(check_run_steps(*build_case(case), ranks=[0]))


def test_a_step_runs_on_a_gpu() -> None:
    assert check(MIXED) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_steps_run_on_a_gpu_and_wait_for_it_only_where_they_have_to(name: str) -> None:
    assert check(SMALL[name]) == []


EXTENDED = {  # the models that those of recipes are made of; without their towers, on rows of text
    "codes-full": Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
    "qwen2-audio-7b-lora": Path("Qwen/Qwen2.5-7B-Instruct"),
    "qwen2.5-omni-7b-lora": Path("Qwen/Qwen2.5-7B-Instruct"),
    "smolvlm-dpo": Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
    "smolvlm-lora": Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
    "qwen2.5-vl-3b-video-lora": Path("Qwen/Qwen2.5-3B-Instruct"),
    "qwen2.5-vl-7b-full-8-gpus": Path("Qwen/Qwen2.5-7B-Instruct"),
}


def find_command(path: Path) -> str:
    """The command that a recipe is for."""
    if "\nmodel_name:" in path.read_text():
        return "pretrain"
    is_aligned = path.parent.name == "align" or path.stem.endswith("dpo")
    return "align" if is_aligned else "finetune_full" if "full" in path.stem else "finetune"


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_of_the_hub_runs_on_a_gpu(path: Path) -> None:
    command = find_command(path)
    cls = COMMANDS[command].import_recipe()
    recipe = build_recipe(cls, collect_settings(cls, [str(path)], []))
    recipe = replace(recipe, devices=1) if recipe.devices == "auto" else recipe
    if path.stem in EXTENDED:
        recipe = replace(recipe, checkpoint_dir=EXTENDED[path.stem])
    spec = build_spec(command, recipe)
    _, dims = resolve_run(recipe, spec)
    if dims.pipeline == 1:
        layers = 2 if recipe.fp8.recipe is None else 4  # the rest are like these, but the first and the last with FP8
        spec = replace(spec, config=replace(spec.config, n_layer=layers))
    found = check_run_steps(recipe, spec, ranks=[dims.world_size - 1])
    may_wait = command == "align"  # its losses select labels and pairs on the device
    assert [finding for finding in found if not (may_wait and finding.kind == "synchronization")] == []


def find_line(function: Any, text: str) -> str:
    """The place of a line of a function in this file."""
    lines, first = inspect.getsourcelines(function)
    number = next(number for number, line in enumerate(lines, first) if text in line)
    return f"{Path(__file__).relative_to(HUB.parent)}:{number}"


def attend_with_cpu_tensor(layer: Attention, x: Tensor, inputs: Any, cache: Any = None) -> Tensor:
    return FORWARD(layer, x + torch.ones(x.shape[-1]), inputs, cache)


def attend_in_float64(layer: Attention, x: Tensor, inputs: Any, cache: Any = None) -> Tensor:
    return FORWARD(layer, x.double(), inputs, cache)


def attend_in_float32(layer: Attention, x: Tensor, inputs: Any, cache: Any = None) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return FORWARD(layer, x.float(), inputs, cache)


def attend_with_cpu_kernel(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


FORWARD = Attention.forward


@pytest.mark.parametrize(
    ("planted", "text", "kind", "message"),
    [
        (attend_with_cpu_tensor, "torch.ones", "device", "Expected all tensors to be on the same device"),
        (attend_in_float64, "x.double()", "dtype", "_to_copy.default returns float64 (2, 128, 64)"),
    ],
)
def test_planted_tensors_are_found(
    monkeypatch: pytest.MonkeyPatch, planted: Any, text: str, kind: str, message: str
) -> None:
    monkeypatch.setattr(Attention, "forward", planted)
    first = check(MIXED)[0]
    assert (first.kind, first.place, first.phase) == (kind, find_line(planted, text), "forward")
    assert message in first.message


def test_a_product_in_float32_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "forward", attend_in_float32)
    found = check(MIXED)
    assert {finding.kind for finding in found} == {"dtype"}
    assert found[0].place.startswith("litgpt/model/attention.py:") and found[0].function.startswith("Attention.")
    assert "multiplies float32 (256, 64) in a step of bfloat16" in found[0].message


def read_loss(*args: Any, **kwargs: Any) -> Tensor:
    loss = CROSS_ENTROPY(*args, **kwargs)
    assert loss.item() > 0
    return loss


def copy_loss(*args: Any, **kwargs: Any) -> Tensor:
    loss = CROSS_ENTROPY(*args, **kwargs)
    copy = loss.detach().to("cpu", non_blocking=True)
    return loss + 0.0 * float(copy + 1)


CROSS_ENTROPY = objective.chunked_cross_entropy


@pytest.mark.parametrize(
    ("planted", "text", "kind", "message"),
    [
        (read_loss, "loss.item()", "synchronization", "the host reads float32 ()"),
        (copy_loss, "copy + 1", "race", "a copy from the device that nothing waits for"),
    ],
)
def test_planted_reads_of_the_loss_are_found(
    monkeypatch: pytest.MonkeyPatch, planted: Any, text: str, kind: str, message: str
) -> None:
    monkeypatch.setattr(objective, "chunked_cross_entropy", planted)
    (finding,) = check(MIXED)
    assert (finding.kind, finding.place, finding.function) == (kind, find_line(planted, text), planted.__name__)
    assert message in finding.message


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no kernels for CUDA")
def test_an_operation_without_a_kernel_for_cuda_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend", attend_with_cpu_kernel)
    finding = check(MIXED)[0]  # the next one is its backward
    assert (finding.kind, finding.place) == ("operation", find_line(attend_with_cpu_kernel, "attention_for_cpu"))
    assert "_scaled_dot_product_flash_attention_for_cpu.default has no kernel for CUDA" in finding.message
