"""Process-wide settings of torch for a run: deterministic algorithms, and the kernel of attention."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.effect import describe_no_effect

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""The kernels of scaled_dot_product_attention by the names in a recipe."""
CUBLAS_WORKSPACE = ":4096:8"
"""Eight buffers of 4 MiB, with which cuBLAS is deterministic (its documentation, "Results Reproducibility")."""


@contextmanager
def select_backends(*, deterministic: bool, attention: str) -> Iterator[None]:
    """Use deterministic algorithms, if asked to, and a kernel of attention, or `auto` for all of them, in the block."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.use_deterministic_algorithms(True)
    try:
        with nullcontext() if attention == "auto" else sdpa_kernel(SDPA_KERNELS[attention]):
            yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def check_attention_kernel(attention: str, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the device has a kernel of attention for heads of the model's sizes; call it where it is selected.

    Args:
        dtype: of queries, keys and values.

    Raises:
        UserError: if it has none, or if the model's attention is none of scaled_dot_product_attention.
    """
    if attention == "auto":
        return
    for name in ("attention_logit_softcapping", "attention_sinks"):
        if getattr(config, name):
            raise UserError(describe_no_effect("attention", attention, f"the model's {name}", "set attention: auto"))
    usable = [name for name in SDPA_KERNELS if has_kernel(name, config, device, dtype)]
    if attention not in usable:
        raise UserError(
            f"attention: {attention} is not available on {device.type} for heads of this model in "
            f"{str(dtype).removeprefix('torch.')}; use auto or {' or '.join(usable)}"
        )


def has_kernel(attention: str, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether causal attention of one head by this kernel runs on the device, with its gradients."""
    assert config.head_size is not None and config.n_query_groups is not None
    sizes = config.latent_attention
    head_size = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"] if sizes else config.head_size
    value_size = sizes["v_head_dim"] if sizes else head_size
    shapes = ((config.n_head, head_size), (config.n_query_groups, head_size), (config.n_query_groups, value_size))
    q, k, v = (
        torch.zeros(1, heads, 16, size, device=device, dtype=dtype, requires_grad=True) for heads, size in shapes
    )
    is_grouped = config.n_head != config.n_query_groups
    with warnings.catch_warnings(action="ignore"), sdpa_kernel(SDPA_KERNELS[attention]):  # why it is not available
        try:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped).sum().backward()
        except RuntimeError:
            return False
    return True
