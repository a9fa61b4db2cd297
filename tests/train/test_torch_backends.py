"""Deterministic algorithms and the kernels of attention and of products are those asked for, inside a block only."""

import os
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import profile

from litgpt.errors import UserError
from litgpt.model.attention import attend
from litgpt.model.config import Config
from litgpt.model.cpu_attention import BY_PRODUCTS
from litgpt.train import torch_backends
from litgpt.train.torch_backends import (
    check_attention_kernel,
    is_exact_by_onednn,
    is_faster_by_onednn,
    is_slow_by_mkl,
    onednn_products,
    select_backends,
)
from tests.runs import SHAPE

LATENT = {
    **{"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 4},
    "norm_eps": 1e-6,
}


def test_deterministic_algorithms_are_used_inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with select_backends(deterministic=True, attention="auto"):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.empty(3).isnan().all()  # as torch fills memory in this mode
    assert not torch.are_deterministic_algorithms_enabled()
    with select_backends(deterministic=False, attention="auto"):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["auto", "flash", "math"])
@pytest.mark.parametrize("tokens", [8, BY_PRODUCTS.start])
def test_the_kernel_of_attention_is_the_chosen_one(tokens: int, attention: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = attend(q, k, v, mask=None, causal=True, scale=0.5)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    with select_backends(deterministic=False, attention=attention), profile() as operations:
        output = attend(*leaves, mask=None, causal=True, scale=0.5)
    names = {event.name for event in operations.function_events}
    is_flash = any("flash_attention_for_cpu" in name for name in names)
    is_by_products = "litgpt::causal_attention" in names and not is_flash
    assert is_by_products == (attention == "auto" and tokens in BY_PRODUCTS)
    assert is_flash == (attention != "math" and not is_by_products)
    torch.testing.assert_close(output.float(), expected, atol=0.02, rtol=0.02)


def test_a_kernel_that_the_device_or_the_model_has_not_is_refused() -> None:
    for attention, changes, message in (
        ("cudnn", {}, "attention: cudnn is not available on cpu .* in float32; use auto or flash or math"),
        ("efficient", {}, "use auto or flash or math"),
        ("flash", {"latent_attention": LATENT}, "attention: flash is not available .*; use auto or math"),
        ("math", {"attention_logit_softcapping": 50.0}, "attention: math has no effect with the model's attention_log"),
    ):
        config = Config(**{**SHAPE, **changes})
        with pytest.raises(UserError, match=message):
            check_attention_kernel(attention, config, torch.device("cpu"), torch.float32)
    grouped = Config(**{**SHAPE, "n_query_groups": 1})
    for attention in ("auto", "flash", "math"):
        check_attention_kernel(attention, grouped, torch.device("cpu"), torch.bfloat16)


def test_onednn_multiplies_in_its_block_only() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    with onednn_products():
        assert settings.fp32_precision == "bf16" and torch.get_float32_matmul_precision() == "medium"
    assert settings.fp32_precision == before and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(not is_exact_by_onednn(), reason="oneDNN is missing, or multiplies in bfloat16 on this CPU")
def test_products_by_onednn_are_as_exact_as_those_of_float32() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(300, 200), torch.randn(200, 100)
    exact = left.double() @ right.double()
    error = (left @ right - exact).abs().max()
    with onednn_products():
        assert (left @ right - exact).abs().max() < 4 * error


@pytest.mark.parametrize(("vendor", "exact"), [(True, True), (True, False), (False, True)])
def test_large_products_use_onednn_where_it_is_faster_and_exact(
    vendor: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backends, "is_slow_by_mkl", lambda: vendor)
    monkeypatch.setattr(torch_backends, "is_exact_by_onednn", lambda: exact)
    rows, matrix = torch.empty(512, 16), torch.empty(2**15, 16)
    assert is_faster_by_onednn(rows, matrix) == (vendor and exact)
    assert not is_faster_by_onednn(rows[:100], matrix)
    assert not is_faster_by_onednn(rows.bfloat16(), matrix.bfloat16())
    assert not is_faster_by_onednn(rows.to("meta"), matrix.to("meta"))
    with onednn_products():  # a choice of the user's
        assert not is_faster_by_onednn(rows, matrix)


def test_the_vendor_of_a_cpu_is_read(tmp_path: Path) -> None:
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        (tmp_path / vendor).write_text(f"processor : 0\nvendor_id : {vendor}\n")
    assert is_slow_by_mkl(tmp_path / "AuthenticAMD")
    assert not is_slow_by_mkl(tmp_path / "GenuineIntel") and not is_slow_by_mkl(tmp_path / "missing")
