"""Compute with fake tensors of a CUDA device on a machine without one.

torch computes the shapes and the types of fake tensors of any device, but autograd asks the driver for the streams of
their device. Here C++ is told that they are on the meta device, which has no streams, while Python sees the CUDA
device. What C++ selects by the device is then selected in Python: the casts of autocast, and the kernel of attention.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from litgpt.model.cpu_attention import HALF_TYPES
from litgpt.plan.fake_tensors import aten
from litgpt.plan.op_tensors import DEVICE_QUERY

DEVICE = torch.device("cuda", 0)
META = torch.device("meta")
ENGINE_CALL = "run_backward_in_mode"
"""The function that calls the engine of autograd."""


class HostEvent:
    """An event of a stream that nothing runs on."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _stream: Any = None) -> None:
        """Mark the work so far."""

    def wait(self, _stream: Any = None) -> None:
        """Let a stream wait."""

    def synchronize(self) -> None:
        """Let the host wait."""


class HostStream(HostEvent):
    """A stream that nothing runs on."""

    def wait_event(self, event: HostEvent) -> None:
        """Let this stream wait for an event."""

    def wait_stream(self, stream: "HostStream") -> None:
        """Let this stream wait for another one."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Mark the work so far."""
        return event or HostEvent()


CUDA_CALLS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "Stream": HostStream,
    "Event": HostEvent,
    "stream": lambda _: nullcontext(),
    "current_stream": HostStream,
    "current_device": lambda: DEVICE.index,
    "set_device": lambda _: None,
    "synchronize": lambda _=None: None,
    "is_bf16_supported": lambda *_: True,
    "get_device_capability": lambda _=None: (9, 0),
}
"""What `torch.cuda` is asked for in a step, of an H100."""

AUTOCAST_DOWN = frozenset(
    (
        *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum"),
        *("scaled_dot_product_attention", "conv1d", "conv2d", "conv3d"),
    )
)
AUTOCAST_UP = frozenset(
    (
        *("softmax", "log_softmax", "softplus", "layer_norm", "group_norm", "cross_entropy", "nll_loss", "norm"),
        *("exp", "log", "log1p", "expm1", "rsqrt", "reciprocal", "pow", "__pow__", "sum", "prod", "cumsum", "cumprod"),
        *("cosine_similarity", "binary_cross_entropy_with_logits", "mse_loss"),
    )
)
"""Functions that autocast of CUDA computes in its type, and in float32 (documentation of `torch.amp`, op reference)."""


class CudaFunctions(TorchFunctionMode):
    """Casts as autocast of CUDA does, and calls the flash or the memory-efficient kernel of attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda") and (name in AUTOCAST_DOWN or name in AUTOCAST_UP):
            dtype = torch.get_autocast_dtype("cuda") if name in AUTOCAST_DOWN else torch.float32
            args, kwargs = tree_map(lambda value: cast(value, dtype), (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return attend_on_cuda(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def cuda_functions() -> Iterator[None]:
    """The context in which functions of torch do what they do with tensors on a CUDA device."""
    functions, run_backward = CudaFunctions(), torch.autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        with functions:  # which is not active within the functions that it calls, such as Tensor.backward
            return run_backward(*args, **kwargs)

    with patch.object(torch.autograd, "_engine_run_backward", run_backward_in_mode), functions:
        yield


class DeviceFactories(TorchFunctionMode):
    """Makes tensors of the device fake while a model without memory is built, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        is_of_device = device is not None and torch.device(device).type == DEVICE.type
        with self.fake if is_of_device else nullcontext():
            return func(*args, **kwargs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor on the device in another type, but not of float64; other values as they are."""
    is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast and value.device.type == "cuda" else value


def attend_on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention, (B, H, T, S), with the kernel that CUDA selects for its arguments."""
    settings: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    is_flash = attn_mask is None and q.dtype in HALF_TYPES and q.shape[-1] == v.shape[-1] <= 256
    if q.device.type != "cuda" or q.dtype == torch.float64 or (not is_flash and enable_gqa):
        attention = functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask, enable_gqa=enable_gqa, **settings)
    if is_flash:
        return aten._scaled_dot_product_flash_attention(q, k, v, **settings)[0]
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, **settings)[0]


def answer_device(args: Any) -> torch.device:
    """The device of a fake tensor that C++ sees."""
    (tensor,) = args
    return META if tensor.fake_mode.in_kernel_invocation or tensor.fake_device.type == "cuda" else tensor.fake_device


@contextmanager
def fake_cuda() -> Iterator[None]:
    """The context in which fake tensors on a CUDA device can be computed with; fake tensors are active within."""
    dispatch = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def dispatch_device(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return answer_device(args) if func is DEVICE_QUERY else dispatch(cls, func, types, args, kwargs or {})

    dispatch_in_mode = FakeTensorMode.__torch_dispatch__

    def dispatch_options(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == META:  # of options that C++ has read from a tensor
            kwargs = {**kwargs, "device": DEVICE}
        return dispatch_in_mode(mode, func, types, args, kwargs)

    with ExitStack() as stack:
        for name, value in CUDA_CALLS.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(FakeTensor, "__torch_dispatch__", classmethod(dispatch_device)))
        stack.enter_context(patch.object(FakeTensorMode, "__torch_dispatch__", dispatch_options))
        stack.enter_context(patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {DEVICE_QUERY: answer_device}))
        stack.enter_context(patch.object(FakeTensor, "is_meta", False, create=True))
        yield
