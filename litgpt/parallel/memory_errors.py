"""The errors of an allocation for which there is no memory."""

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory of the device, or of the host."""
    is_of_cpu = isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    return is_of_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))
