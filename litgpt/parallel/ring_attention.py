"""Ring attention over the context axis, with torch's implementation (Liu et al. 2023).

Axes: B batch, H heads, K key-value heads, P tokens of this rank, S numbers of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor.experimental._context_parallel._attention import (
    _cp_options,
    _templated_ring_attention,
    _templated_ring_attention_backward,
    set_rotate_method,
)

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.uncompiled import uncompiled

ALTERNATIVE = "set parallel.context_method: all-gather"
TOKENS_DIM = 2


@dataclass(frozen=True)
class Kernel:
    """Attention on one type of device that also returns what is needed to merge partial outputs.

    Attributes:
        forward: returns output, logsumexp, and further values.
        backward: returns the gradients of queries, keys and values.
        extra: the arguments of `backward` for the further values of `forward`, in their order.
    """

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    extra: tuple[str, ...] = ()


KERNELS = {
    "cpu": Kernel(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ),
    "cuda": Kernel(  # not tested yet
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_backward,
        ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"),
    ),
}


@uncompiled
def ring_attention(q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, group: ProcessGroup, scale: float) -> Tensor:
    """Causal attention, (B, H, P, S), of rows in head-tail shards (`token_sharding.HeadTailSharding`)."""
    set_rotate_method("alltoall")  # torch's other method gathers keys and values
    output: Tensor = RingFunction.apply(q_BHPS, k_BKPS, v_BKPS, group, scale)
    return output


class RingFunction(torch.autograd.Function):
    """torch's ring attention, forward and backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, scale: float) -> Tensor:
        kernel = KERNELS[q.device.type]
        attend = partial(_attend_grouped, kernel.forward)
        output, logsumexp, *rest = _templated_ring_attention(
            **_ring_settings(q), group=group, op=attend, query=q, key=k, value=v, scale=scale
        )
        extra = dict(zip(kernel.extra, rest, strict=False))
        tensors = {name: value for name, value in extra.items() if isinstance(value, Tensor)}
        ctx.save_for_backward(q, k, v, output, logsumexp, *tensors.values())
        ctx.names, ctx.group = tuple(tensors), group
        ctx.extra = {"scale": scale, "dropout_p": 0.0} | {
            name: value for name, value in extra.items() if name not in tensors
        }
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, logsumexp, *tensors = ctx.saved_tensors
        kernel = KERNELS[q.device.type]
        grads = _templated_ring_attention_backward(
            **_ring_settings(q),
            group=ctx.group,
            op=partial(_grouped_grads, kernel.backward),
            grad_out=grad,
            grad_out_name="grad_out",
            query=q,
            key=k,
            value=v,
            out=output,
            logsumexp=logsumexp,
            **dict(zip(ctx.names, tensors, strict=True)),
            **ctx.extra,
        )
        return *grads[:3], None, None


def _ring_settings(q: Tensor) -> dict[str, Any]:
    """Settings of torch's ring; partial outputs are merged in float32, or in float64 if the inputs are that."""
    _cp_options.convert_to_f32 = q.dtype != torch.float64
    return {"seq_dim": TOKENS_DIM, "is_causal": True}


def _attend_grouped(attend: Callable[..., tuple[Any, ...]], q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    """Attention by a kernel that needs as many heads of keys as of queries."""
    copies = q.shape[1] // k.shape[1]
    return attend(q, *(x.repeat_interleave(copies, dim=1) for x in (k, v)), **settings)


def _grouped_grads(
    backward: Callable[..., tuple[Tensor, ...]], *, query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> tuple[Tensor, ...]:
    """The gradients of queries, and of keys and values summed over their copies."""
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    q_grad, *copy_grads = backward(query=query, key=key, value=value, **settings)
    return q_grad, *(grad.unflatten(1, (-1, copies)).sum(2) for grad in copy_grads)


def check_ring_support(config: Config, compute_dtype: torch.dtype, device: str) -> None:
    """Check that torch's ring attention supports a model and a dtype.

    Raises:
        UserError: naming what is not supported.
    """
    unsupported = {
        "caps scores": config.attention_logit_softcapping is not None,
        "has attention sinks": config.attention_sinks,
        "has latent attention": config.latent_attention is not None,
        "has a head_size that is not divisible by 8": device == "cuda" and bool((config.head_size or 0) % 8),
    }
    for reason, applies in unsupported.items():
        if applies:
            raise UserError(f"parallel.context_method: ring does not support this model, which {reason}; {ALTERNATIVE}")
    if device == "cuda" and compute_dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"parallel.context_method: ring computes in 16 bits on GPUs; set precision: bf16-true, or {ALTERNATIVE}"
        )
