"""Process-wide settings of torch: deterministic algorithms, and the kernels of attention and of products."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

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
LARGE_PRODUCT = 2**28
"""Multiplications in a product that is large enough to differ in speed."""


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


@contextmanager
def onednn_products() -> Iterator[None]:
    """Multiply float32 matrices on the CPU by oneDNN in the block; in bfloat16 on a CPU with AMX.

    The setting is the process's: other threads multiply so too, on a GPU in TF32. At its end nothing is set, so call it
    only if `is_matmul_precision_unset`.
    """
    # not oneDNN's own setting, with which torch.get_float32_matmul_precision would raise an error in the block
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for settings in list_matmul_settings():
            settings.fp32_precision = "none"


def is_matmul_precision_unset() -> bool:
    """Whether nothing in this process has chosen how float32 matrices are multiplied."""
    return all(settings.fp32_precision == "none" for settings in list_matmul_settings())


def list_matmul_settings() -> tuple[Any, ...]:
    """torch's settings of products of matrices, of each backend."""
    return torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]


def is_faster_by_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether a product of rows with a matrix is faster by oneDNN than by MKL, and as exact: large ones on some CPUs.

    oneDNN keeps memory for each shape that it has multiplied, so ask for shapes of which there are few.
    """
    is_large = len(left) * right.numel() >= LARGE_PRODUCT
    is_fp32 = left.device.type == "cpu" and left.dtype == torch.float32
    return is_large and is_fp32 and is_slow_by_mkl() and is_matmul_precision_unset() and is_exact_by_onednn()


@cache
def is_slow_by_mkl(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU is one of AMD, of whose instructions MKL does not use all."""
    return cpu.is_file() and "AuthenticAMD" in cpu.read_text(encoding="utf-8")


@cache
def is_exact_by_onednn() -> bool:
    """Whether torch has oneDNN, whose products keep the last bits of float32; those in bfloat16 do not."""
    values = torch.full((256, 256), 1 + 2**-20)
    with onednn_products():
        return torch.backends.mkldnn.is_available() and torch.equal(values @ torch.eye(256), values)


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
