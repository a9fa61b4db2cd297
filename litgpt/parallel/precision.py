"""The data types of a run: of parameters, of computation and of gradient reduction."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Precision:
    """Data types of a run.

    Attributes:
        storage: of parameters, gradients and optimizer states.
        compute: of matrix products; None for `storage`. A model that is not sharded computes under autocast, a sharded
            one with parameters that FSDP2 casts when it gathers them.
        reduce: of gradients while they are summed over ranks; None for the type of the gradients.
        scaled: whether the loss is scaled to keep small fp16 gradients from underflowing (Micikevicius et al. 2018).
    """

    storage: torch.dtype
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    scaled: bool = False

    def autocast(self, device: torch.device, *, sharded: bool) -> AbstractContextManager[object]:
        """The context for a forward pass."""
        if self.compute is None or sharded:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


PRECISIONS = {
    "32-true": Precision(torch.float32),
    "64-true": Precision(torch.float64),
    "bf16-true": Precision(torch.bfloat16, reduce=torch.float32),
    "bf16-mixed": Precision(torch.float32, compute=torch.bfloat16, reduce=torch.float32),
    "16-mixed": Precision(torch.float32, compute=torch.float16, reduce=torch.float32, scaled=True),
}


REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_precision(name: str | None, reduce_dtype: str | None) -> Precision:
    """The data types of a run.

    Args:
        name: of `PRECISIONS`; None for the default.
        reduce_dtype: of `REDUCE_DTYPES`; None for that of the precision.
    """
    precision = PRECISIONS[name or default_precision()]
    return precision if reduce_dtype is None else replace(precision, reduce=REDUCE_DTYPES[reduce_dtype])


def default_precision() -> str:
    """The default of `precision`: bf16-mixed, or 16-mixed on accelerators without bfloat16."""
    return "16-mixed" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16-mixed"
