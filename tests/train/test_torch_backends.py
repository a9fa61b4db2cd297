"""Deterministic algorithms and the kernel of attention are those of the recipe, inside a run only."""

import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.errors import UserError
from litgpt.model.attention import attend
from litgpt.model.config import Config
from litgpt.train.torch_backends import check_attention_kernel, select_backends
from tests.runs import SHAPE

LATENT = {
    **{"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 4},
    "norm_eps": 1e-6,
}


class ListOperations(TorchDispatchMode):
    """Lists the names of the operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


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
def test_the_kernel_of_attention_is_the_chosen_one(attention: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = attend(q, k, v, mask=None, causal=True, scale=0.5)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    with select_backends(deterministic=False, attention=attention), ListOperations() as operations:
        output = attend(*leaves, mask=None, causal=True, scale=0.5)
    is_flash = any("flash_attention_for_cpu" in name for name in operations.names)
    assert is_flash == (attention != "math")
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
