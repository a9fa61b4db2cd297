"""Attention whose keys and values go round the ranks of the context axis, by torch's ring (Liu et al. 2023).

Axes: B batch, H heads, K key-value heads, P tokens of this rank, S numbers of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel._attention import (
    _cp_options,
    _templated_ring_attention,
    _templated_ring_attention_backward,
    set_rotate_method,
)

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.parallel.collectives import Group

INSTEAD = "set context_method: all-gather"
TOKENS_DIM = 2


@dataclass(frozen=True)
class Kernel:
    """Attention of one kind of device that also tells what the merging of its results needs.

    Attributes:
        forward: (result, logarithm of the sum of exponentials, and more).
        backward: the slopes of queries, keys and values.
        more: what `backward` calls the things that `forward` gives besides.
    """

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    more: tuple[str, ...] = ()


KERNELS = {
    "cpu": Kernel(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ),
    "cuda": Kernel(  # has never been run
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_backward,
        ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"),
    ),
}


@torch.compiler.disable
def around(q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, group: Group, scale: float) -> Tensor:
    """(B, H, P, S), what queries of the pieces r and 2 c - 1 - r of c ranks' rows find in all before them."""
    set_rotate_method("alltoall")  # torch's other way gathers keys and values
    found: Tensor = _Ring.apply(q_BHPS, k_BKPS, v_BKPS, group, scale)
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> Tensor:
        kernel = KERNELS[q.device.type]
        attend = partial(_grouped, kernel.forward)
        found, logsumexp, *rest = _templated_ring_attention(
            **_exact(q), group=group, op=attend, query=q, key=k, value=v, scale=scale
        )
        more = dict(zip(kernel.more, rest, strict=False))
        tensors = {name: value for name, value in more.items() if isinstance(value, Tensor)}
        context.save_for_backward(q, k, v, found, logsumexp, *tensors.values())
        context.names, context.group = tuple(tensors), group
        context.more = {"scale": scale, "dropout_p": 0.0} | {
            name: value for name, value in more.items() if name not in tensors
        }
        return found

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, found, logsumexp, *tensors = context.saved_tensors
        kernel = KERNELS[q.device.type]
        slopes = _templated_ring_attention_backward(
            **_exact(q),
            group=context.group,
            op=partial(_grouped_slopes, kernel.backward),
            grad_out=slope,
            grad_out_name="grad_out",
            query=q,
            key=k,
            value=v,
            out=found,
            logsumexp=logsumexp,
            **dict(zip(context.names, tensors, strict=True)),
            **context.more,
        )
        return *slopes[:3], None, None


def _exact(q: Tensor) -> dict[str, Any]:
    """How torch's ring goes round, with results merged in float32, or in float64 if they are that."""
    _cp_options.convert_to_f32 = q.dtype != torch.float64
    return {"seq_dim": TOKENS_DIM, "is_causal": True}


def _grouped(attend: Callable[..., tuple[Any, ...]], q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    """Attention by a kernel that wants as many heads of keys as of queries."""
    copies = q.shape[1] // k.shape[1]
    return attend(q, *(part.repeat_interleave(copies, dim=1) for part in (k, v)), **settings)


def _grouped_slopes(
    slopes_of: Callable[..., tuple[Tensor, ...]], *, query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> tuple[Tensor, ...]:
    """The slopes of queries, and of keys and values with those of their copies added up."""
    copies = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(copies, dim=1) for part in (key, value))
    of_query, *of_copies = slopes_of(query=query, key=key, value=value, **settings)
    return of_query, *(part.unflatten(1, (-1, copies)).sum(2) for part in of_copies)


def refuse_shapes(config: Config, computed: torch.dtype, device: str) -> None:
    """Refuse models, and number formats, that torch's ring cannot attend with.

    Raises:
        UserError: naming what it is.
    """
    found = {
        "caps scores": config.attention_logit_softcapping is not None,
        "has attention sinks": config.attention_sinks,
        "has latent attention": config.latent_attention is not None,
        "has heads of a size that 8 does not divide": device == "cuda" and bool((config.head_size or 0) % 8),
    }
    for what, so in found.items():
        if so:
            raise UserError(f"parallel.context_method: ring has no kernel for this model, which {what}; {INSTEAD}")
    if device == "cuda" and computed not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"parallel.context_method: ring computes in 16 bits on GPUs; set precision: bf16-true, or {INSTEAD}"
        )
