"""Run the code that accelerators run on fake tensors of the CPU, which backward passes need without an accelerator."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch.nn import functional

from litgpt.model import attention, layers, moe
from litgpt.parallel import fp8
from litgpt.plan.fused_attention import attend_fused
from litgpt.plan.fused_norm import rms_norm
from litgpt.train import build_state, cross_entropy

CPU_PATHS = (
    (cross_entropy, "CACHED_ELEMENTS", sys.maxsize),  # all rows of a chunk of logits at a time
    (attention, "is_faster_on_cpu", lambda *_: False),
    (cross_entropy, "is_faster_by_onednn", lambda *_: False),
    (fp8, "is_emulated", lambda *_: False),
    (layers, "is_trained_on_cpu", lambda _: False),
    (functional, "rms_norm", rms_norm),
    (functional, "scaled_dot_product_attention", attend_fused),
    (moe, "share_product", lambda *_: False),
    (build_state, "uses_cpu_paths", lambda _: False),
)
"""What the code does on a CPU only: its module, its name, and the value that it has on an accelerator."""


@contextmanager
def accelerator_paths() -> Iterator[None]:
    """The context in which tensors on the CPU are computed with as those on an accelerator."""
    with ExitStack() as stack:
        for module, name, value in CPU_PATHS:
            stack.enter_context(patch.object(module, name, value))
        yield
