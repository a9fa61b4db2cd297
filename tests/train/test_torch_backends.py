"""Deterministic algorithms and the kernel of attention are those of the recipe, inside a run only."""

import os

import pytest
import torch
from torch.autograd.profiler import profile

from litgpt.errors import UserError
from litgpt.model.attention import attend
from litgpt.model.config import Config
from litgpt.model.cpu_attention import BY_PRODUCTS
from litgpt.train.torch_backends import check_attention_kernel, select_backends
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
