"""The number formats of a run: what weights are kept in, computed in and summed in."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Number formats of a run.

    Attributes:
        storage: of weights, gradients and optimizer moments.
        compute: of matrix products; None for the storage format. A model that is not sharded computes under autocast,
            a sharded one in weights that FSDP2 casts as it gathers them.
        reduce: of sums of gradients over ranks; None for the format of the gradients.
        scaled: whether the loss is scaled so that small fp16 gradients do not vanish (Micikevicius et al. 2018).
    """

    storage: torch.dtype
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    scaled: bool = False

    def autocast(self, device: torch.device, *, sharded: bool) -> AbstractContextManager[object]:
        """The context in which a forward pass runs."""
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


def default_precision() -> str:
    """What a run uses that does not say: bf16-mixed, or 16-mixed on accelerators without bfloat16."""
    return "16-mixed" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16-mixed"
