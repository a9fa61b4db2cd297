"""Watch the operations of a training step for what costs or fails on its device."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.weak import WeakTensorKeyDictionary

from litgpt.plan import fake_cuda
from litgpt.plan.fake_tensors import aten
from litgpt.plan.op_tensors import DEVICE_QUERY, iter_op_tensors
from litgpt.train.step_timers import StepTimers

PACKAGE = Path(__file__).parents[1]
LIBRARY_FOLDERS = (str(Path(torch.__file__).parents[1]), str(Path(contextlib.__file__).parent), "<")
READS = {aten.item.default, aten._local_scalar_dense.default, aten.equal.default}
SIZED_BY_HOST = {aten.index.Tensor, aten.nonzero_static.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
PRODUCTS = {
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten._grouped_mm.default),
    *(aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default),
    *(torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward),
}
FLOAT64_PER_TOKEN = 8
"""Values of float64 for each token of a micro-batch that are no leak: the losses and their sums."""


EXPECTED = {
    ("reduce.py", "all_reduce_sum"): "the counts of a step before it, and its loss after it, of all ranks",
    ("step.py", "compute_model_norm"): "the gradient norm, once a step",
    ("step.py", "StepGradients.local_sums"): "the loss of a step, after its gradient norm",
    ("router_training.py", "RouterTrainer.finish"): "the loads of experts, once a step",
    ("router_training.py", "RouterTrainer.update_corrections"): "the changes of the routers by them, once a step",
    ("cross_entropy.py", "ChunkedCrossEntropy.forward"): "the number of targets, once a micro-batch",
    ("expert.py", "AllToAllDispatcher.read_splits"): "the rows for each rank, which all-to-all needs on the host",
    ("expert.py", "AllGatherDispatcher.read_longest"): "the rows of each rank, which all-gather needs on the host",
    ("expert.py", "AllGatherDispatcher.read_local_rows"): "the rows for local experts, of those that were gathered",
    ("fp8.py", "split_by_expert"): "the rows of each expert, whose FP8 products are computed one by one",
    ("moe.py", "Router._compute_logits"): "routers compute in float32, because their scores are compared",
    ("quantization.py", "get_bnb_code"): "the code book of bitsandbytes, once in a process",
}
"""What steps are meant to do, by the file and the function that does it, and why; it is not a finding."""


@dataclass(frozen=True)
class Finding:
    """What is wrong in a step, or what makes it slow.

    Attributes:
        kind: one of "device", "dtype", "operation", "synchronization" and "race".
        message: what the program does.
        place: file and line of the program, and the operation's node if autograd calls it.
        function: that contains the line.
        phase: of the step.
    """

    kind: str
    message: str
    place: str
    function: str
    phase: str

    def __str__(self) -> str:
        where = f"{self.place} in {self.function}" + (f" ({self.phase})" if self.phase else "")
        return f"{self.kind}: {where}: {self.message}"


class StepObserver(TorchDispatchMode):
    """Collects findings of the operations on a device.

    Args:
        compute: type of matrix products; None for any.
        tokens: of a micro-batch.

    Attributes:
        findings: without repetitions, in order.
        phase: of the step, empty between phases.
        error: the last one that an operation has raised.
    """

    supports_higher_order_operators = True

    def __init__(self, compute: torch.dtype | None, tokens: int) -> None:
        super().__init__()
        self.compute, self.tokens = compute, tokens
        self.findings: dict[Finding, None] = {}
        self.phase = ""
        self.error: RuntimeError | None = None
        self._unfinished = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at its arguments and its results."""
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # its own operations on plain tensors come here
        if func is DEVICE_QUERY:
            return func(*args, **kwargs)
        given = list(iter_op_tensors((args, kwargs)))
        try:
            output = func(*args, **kwargs)
        except RuntimeError as error:
            self.error = error
            self.add(*describe_op_error(func, error))
            raise
        returned = list(iter_op_tensors(output))
        self._check_copies(func, args, kwargs, returned)
        self._check_reads(func, args, kwargs)
        if any(map(is_on_device, (*given, *returned))):
            self._check_types(func, given, returned)
            if not has_cuda_kernel(func):
                self.add("operation", f"{func} has no kernel for CUDA")
        return output

    def add(self, kind: str, message: str) -> None:
        """Add a finding at the place where the program is, unless that is expected there."""
        place, function = find_place()
        is_expected = kind in ("synchronization", "dtype") and (Path(place.split(":")[0]).name, function) in EXPECTED
        if not is_expected:
            self.findings[Finding(kind, message, place, function, self.phase)] = None

    def end_copies(self, *_: Any) -> None:
        """Forget the copies to the host that it waits for."""
        self._unfinished.clear()

    def _check_copies(self, func: Any, args: Any, kwargs: Any, returned: list[Tensor]) -> None:
        if func not in COPIES:
            self._check_unfinished(func, args, kwargs)
            return
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], returned[0])
        if source.device.type == target.device.type:
            return
        is_blocking = not (kwargs.get("non_blocking") or any(value is True for value in args[2:]))
        if is_blocking:
            ends = f"from {source.device} to {target.device}"
            self.add("synchronization", f"a blocking copy of {describe(source)} {ends}")
        elif is_on_device(source):
            self._unfinished[target] = True

    def _check_unfinished(self, func: Any, args: Any, kwargs: Any) -> None:
        for tensor in iter_op_tensors((args, kwargs)):
            if self._unfinished.pop(tensor, None):
                self.add("race", f"{func} reads {describe(tensor)}, a copy from the device that nothing waits for")

    def _check_reads(self, func: Any, args: Any, kwargs: Any) -> None:
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is None or not is_on_device(tensor):
            return
        is_masked = func is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        is_sized = func in SIZED_BY_HOST or kwargs.get("output_size") is not None
        if func in READS:
            self.add("synchronization", f"the host reads {describe(tensor)}")
        elif is_masked or (not is_sized and torch.Tag.dynamic_output_shape in getattr(func, "tags", ())):
            self.add("synchronization", f"the size of the result of {func} depends on values on the device")

    def _check_types(self, func: Any, given: list[Tensor], returned: list[Tensor]) -> None:
        limit = FLOAT64_PER_TOKEN * self.tokens
        for tensor in returned:
            if tensor.dtype == torch.float64 and self.compute != torch.float64 and tensor.numel() > limit:
                self.add("dtype", f"{func} returns {describe(tensor)}")
        if func in PRODUCTS and self.compute is not None and not is_called_by_autograd():
            for tensor in given:
                if tensor.is_floating_point() and tensor.itemsize > self.compute.itemsize and tensor.dim() > 1:
                    self.add("dtype", f"{func} multiplies {describe(tensor)} in a step of {name_of(self.compute)}")


class ObservedPhases(StepTimers):
    """Tells an observer in which phase a step is."""

    def __init__(self, observer: StepObserver, device: torch.device) -> None:
        super().__init__(device)
        self.observer = observer

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Name the phase in the block."""
        before, self.observer.phase = self.observer.phase, phase
        try:
            yield
        finally:
            self.observer.phase = before


def is_on_device(tensor: Tensor) -> bool:
    """Whether a tensor is on the device of the step."""
    return tensor.device.type == fake_cuda.DEVICE.type


def has_cuda_kernel(func: Any) -> bool:
    """Whether an operation of torch has a kernel for CUDA in this build; True in builds without CUDA."""
    if torch.version.cuda is None or func.namespace != "aten":
        return True
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CUDA")


def describe_op_error(func: Any, error: RuntimeError) -> tuple[str, str]:
    """The kind and the message of a finding for the error of an operation."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    kind = "device" if "same device" in text or "different devices" in text else "operation"
    return ("dtype" if "same dtype" in text or "dtype" in text.lower() else kind), f"{func}: {text}"


def describe(tensor: Tensor) -> str:
    """A tensor in a message."""
    return f"{name_of(tensor.dtype)} ({', '.join(map(str, tensor.shape))})"


def name_of(dtype: torch.dtype) -> str:
    """The name of a type, without that of torch."""
    return str(dtype).removeprefix("torch.")


def find_place() -> tuple[str, str]:
    """The file and the line of the innermost call that is neither of a library nor of the plan, and its function."""
    frame = sys._getframe(1)
    while frame is not None and not is_of_program(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "", ""
    file, node = Path(frame.f_code.co_filename), torch._C._current_autograd_node()
    shown = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE.parent) else file
    of_node = f" (backward of {node.name()})" if node is not None else ""
    return f"{shown}:{frame.f_lineno}{of_node}", frame.f_code.co_qualname


def is_called_by_autograd() -> bool:
    """Whether autograd calls an operation for a node of its own, and not for a function or a recomputation in Python,
    so that the types are those of the forward pass."""
    frame = sys._getframe(1)
    while frame is not None and not is_of_program(frame.f_code.co_filename):
        if frame.f_code.co_name == fake_cuda.ENGINE_CALL:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_of_program(path: str) -> bool:
    """Whether a file is neither of a library nor of the plan."""
    return not path.startswith((str(PACKAGE / "plan"), *LIBRARY_FOLDERS))
