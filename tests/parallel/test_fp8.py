"""The layers whose products are in FP8: by size, name and position; what cannot work has one line."""

import sys
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.torchao import import_torchao
from litgpt.parallel.fp8 import apply_fp8, describe_fp8, select_fp8_layers
from litgpt.recipe.fp8 import FP8Args
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.train.early_checks import check_fp8
from tests.store.models import small

ONE = ParallelDims()
CONFIG = small(
    "Qwen3-30B-A3B",
    n_layer=3,
    moe_layers=[0, 1, 1],
    n_embd=128,
    n_head=4,
    head_size=32,
    n_query_groups=2,
    intermediate_size=160,
    n_expert=4,
    n_expert_per_token=2,
    moe_intermediate_size=32,
    shared_expert_size=64,
    shared_expert_gate=True,
)
MODEL = GPT.on_meta(CONFIG)
ATTENTION = {"attention.q": (128, 128), "attention.k": (64, 128), "attention.v": (64, 128), "attention.out": (128, 128)}
DENSE = {"mlp.gate": (160, 128), "mlp.up": (160, 128), "mlp.down": (128, 160)}
SHARED = {"mlp.shared.gate": (64, 128), "mlp.shared.up": (64, 128), "mlp.shared.down": (128, 64)}
LAYERS = [ATTENTION | DENSE, *2 * [ATTENTION | {"mlp.experts": (32, 128)} | SHARED]]
ALL = {f"blocks.{number}.{name}": sizes for number, layer in enumerate(LAYERS) for name, sizes in layer.items()}


def select(dims: ParallelDims = ONE, **settings: Any) -> tuple[set[str], dict[str, tuple[int, int]]]:
    layers = select_fp8_layers(MODEL, FP8Args(**{"recipe": "rowwise", **settings}), dims)
    return set(layers.fitting), layers.misfits


def test_all_matrices_of_blocks_are_selected() -> None:
    assert select() == (ALL.keys(), {})


@pytest.mark.parametrize(("recipe", "unit"), [("mxfp8", 32), ("blockwise", 128)])
def test_layers_whose_sizes_do_not_fit_are_left_out(recipe: str, unit: int) -> None:
    fitting = {name for name, sizes in ALL.items() if not any(size % unit for size in sizes)}
    assert select(recipe=recipe) == (fitting, {name: sizes for name, sizes in ALL.items() if name not in fitting})


def test_sizes_are_those_of_a_rank() -> None:
    dims = ParallelDims(tensor=4, data_shard=2, expert=2, expert_tensor=4)
    fitting, misfits = select(dims, recipe="mxfp8")
    assert misfits["blocks.1.mlp.experts"] == (8, 128)
    assert misfits["blocks.0.mlp.gate"] == (40, 128) and misfits["blocks.0.mlp.down"] == (128, 40)
    assert {"blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.out"} <= fitting  # 1 group of 32


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"exclude": ["attention"]}, lambda name: ".attention." in name),
        ({"exclude": ["mlp.down", "experts"]}, lambda name: name.endswith(("mlp.down", "experts"))),
        ({"exclude": ["blocks.1"]}, lambda name: name.startswith("blocks.1.")),
        ({"num_layers_at_start_in_bf16": 1}, lambda name: name.startswith("blocks.0.")),
        ({"num_layers_at_end_in_bf16": 2}, lambda name: name[7] in "12"),
    ],
)
def test_layers_are_left_out_by_name_and_position(settings: dict[str, Any], left: Any) -> None:
    assert select(**settings) == ({name for name in ALL if not left(name)}, {})


def test_a_run_says_what_is_emulated_and_what_stays() -> None:
    lines = describe_fp8(MODEL, FP8Args(recipe="blockwise", exclude=["experts"]), ONE, torch.device("cpu"))
    assert lines == [
        "fp8.recipe: blockwise is emulated, which is slower than bf16: this device has no hardware for it",
        "fp8.recipe: blockwise leaves 15 of 21 layers in bf16, whose sizes are not multiples of 128, such as "
        "blocks.0.attention.k (64 x 128)",
    ]
    gathered = FP8Args(recipe="tensorwise", param_gather=True)
    assert (
        "fp8.param_gather: true has no effect with 1 shard"
        in describe_fp8(MODEL, gathered, ONE, torch.device("cpu"))[-1]
    )
    assert describe_fp8(MODEL, FP8Args(), ONE, torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "e4m3"}, "fp8.format: e4m3 has no effect with fp8.recipe: null; set fp8.recipe: tensorwise"),
        ({"recipe": "mxfp8", "format": "hybrid"}, "fp8.format: hybrid .* fp8.recipe: mxfp8; set fp8.format: e4m3"),
        ({"recipe": "rowwise", "amax_history_len": 4}, "no effect with fp8.recipe: rowwise; set fp8.recipe: delayed"),
        ({"recipe": "rowwise", "param_gather": True}, "fp8.param_gather: true .*; set fp8.recipe: tensorwise"),
        ({"recipe": "rowwise", "exclude": ["mlp.dawn"]}, r"fp8.exclude: mlp.dawn matches no layer; .*mlp.down"),
        (
            {"recipe": "blockwise", "exclude": ["attention"]},
            "no layer: .* multiples of 128; set fp8.recipe: tensorwise",
        ),
        ({"recipe": "rowwise", "num_layers_at_end_in_bf16": 3}, "has no layer: .* set fp8.recipe: null"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_fp8(GPT.on_meta(CONFIG), FP8Args(**settings), ONE, torch.device("cpu"))


@pytest.mark.parametrize(
    ("precision", "parallel", "message"),
    [
        ("32-true", {}, "precision: 32-true is not supported with fp8.recipe: tensorwise; set precision: bf16-mixed"),
        ("16-mixed", {}, "precision: 16-mixed is not supported"),
        (
            None,
            {"tensor": 2},
            "fp8.param_gather: true is not supported with parallel.tensor: 2; set parallel.tensor: 1",
        ),
        ("bf16-true", {"cpu_offload": True}, "parallel.cpu_offload: true; set parallel.cpu_offload: false"),
    ],
)
def test_runs_that_cannot_work_are_refused(precision: str | None, parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FP8Args(recipe="tensorwise", param_gather=True).check_run(precision, ParallelArgs(**parallel))
    FP8Args(recipe="tensorwise").check_run("bf16-true", ParallelArgs(tensor=2))


def test_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8.config", None)
    import_torchao.cache_clear()
    with pytest.raises(UserError, match=r"fp8.recipe: products in FP8 need torchao .*; run pip .* fp8.recipe: null"):
        apply_fp8(GPT.on_meta(CONFIG), FP8Args(recipe="rowwise"), ONE, torch.device("cpu"))


def test_adapters_are_refused() -> None:
    with pytest.raises(UserError, match=r"fp8.recipe: rowwise is not supported with adapters .*; set fp8.recipe: null"):
        check_fp8(FP8Args(recipe="rowwise"), adapted=True)
    check_fp8(FP8Args(), adapted=True)
    check_fp8(FP8Args(recipe="rowwise"), adapted=False)
