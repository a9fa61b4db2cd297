"""Decorators of functions that `torch.compile` does not look into, without importing Triton where nothing uses it.

torch's own decorators import `torch._dynamo`, and that Triton, whose library takes 80 MB of memory.
"""

import logging
import sys
from importlib import import_module
from pathlib import Path

import torch

ACCELERATORS = ("nvidia*", "kfd", "dri", "dxg")
"""The device files of accelerators on Linux: of NVIDIA, AMD and Intel, and of any of them in WSL."""
WITH_TRITON = ("torch._dynamo", "torch.utils.flop_counter")
"""The modules that a run imports which import Triton if it is installed."""


def has_accelerator_files(devices: Path = Path("/dev")) -> bool:
    """Whether this machine may have an accelerator: asking a driver would start it before processes are forked."""
    return sys.platform != "linux" or any(any(devices.glob(pattern)) for pattern in ACCELERATORS)


def import_compiler() -> None:
    """Import the compiler, without Triton on a machine without an accelerator; other modules may import it later."""
    if has_accelerator_files() or "triton" in sys.modules:
        return
    sys.modules["triton"] = None  # type: ignore[assignment]
    logger = logging.getLogger("torch.utils.flop_counter")
    logger.disabled = True  # it would warn that FLOPs of Triton's kernels are not counted
    try:
        for module in WITH_TRITON:
            import_module(module)
    finally:
        del sys.modules["triton"]
        logger.disabled = False


import_compiler()
uncompiled = torch.compiler.disable
"""Leaves a function out of the graph."""
called_while_compiling = torch.compiler.assume_constant_result
"""Calls a function when the graph is made, for a result that does not change."""
