"""Delayed scaling: the scales of FP8 operands are computed from the largest absolute values of earlier steps.

The scale of an operand is FP8_MAX / amax, where amax is the largest value, or the most recent one, of the history of
its largest absolute values (the recipe "delayed scaling" of NVIDIA's Transformer Engine, without a margin; the formats
are those of Micikevicius et al. 2022). A step has one value: the maximum over its micro-batches and over all ranks. So
the scales do not depend on how a global batch is divided. An operand without a history has the scale of its own values.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litgpt.model.fp8 import MIN_AMAX, Product, build_float8_config, build_mm_config, import_float8
from litgpt.model.uncompiled import uncompiled

OPERANDS = ("input", "weight", "grad_output")
HISTORY_FILE = "fp8_amax_history.json"


class AmaxHistory:
    """The largest absolute values of the operands of all matrices, by step, equal on all ranks.

    Axes: H steps, the latest first; M matrices; the three operands.

    Args:
        names: of the matrices of the whole model.
        length: maximum number of steps.
        algorithm: max or most_recent.
        formats: e4m3 or hybrid.
        emulate: whether to multiply in float32.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        length: int,
        algorithm: str,
        formats: str,
        emulate: bool,
        device: torch.device,
    ) -> None:
        self.names, self.length, self.algorithm = list(names), length, algorithm
        config = build_float8_config("tensorwise", formats, emulate=emulate)
        casts = (config.cast_config_input, config.cast_config_weight, config.cast_config_grad_output)
        self.dtypes = [cast.target_dtype for cast in casts]
        self.mm_config = build_mm_config(config)
        roles = import_float8("float8.float8_training_tensor").GemmInputRole
        self.roles = [roles.INPUT, roles.WEIGHT, roles.GRAD_OUTPUT]
        self.limits_3 = torch.tensor([torch.finfo(dtype).max for dtype in self.dtypes], device=device)
        self.history_HM3 = torch.zeros(0, len(names), len(OPERANDS), device=device)
        self.step_M3 = torch.zeros(len(names), len(OPERANDS), device=device)
        self.scale_M3 = torch.zeros(len(names), len(OPERANDS), device=device)

    def build_product(self, name: str) -> Product:
        """The product of a matrix."""
        return RecordedProduct(self, self.names.index(name))

    def cast(self, values: Tensor, index: int, operand: int, *, record: bool) -> Any:
        """An operand in FP8 with its scale, as a tensor of torchao.

        Args:
            index: of the matrix.
            record: whether its largest absolute value is part of the step.
        """
        amax = values.detach().abs().amax().float()
        if record:
            self.step_M3[index, operand] = torch.maximum(self.step_M3[index, operand], amax)
        scale = self.scale_M3[index, operand]
        scale = torch.where(scale > 0, scale, self.limits_3[operand] / amax.clamp(min=MIN_AMAX))
        to_float8 = import_float8("float8.float8_training_tensor").hp_tensor_and_scale_to_float8
        return to_float8(values, scale, self.dtypes[operand], self.mm_config, self.roles[operand])

    def update(self, max_over_ranks: Callable[[Tensor], Tensor], *, skipped: bool) -> None:
        """End a step: its values enter the history, unless it is skipped, and the scales are computed.

        Args:
            max_over_ranks: the largest value of each element over all ranks.
        """
        step_M3 = max_over_ranks(self.step_M3)
        self.step_M3 = torch.zeros_like(self.step_M3)
        if not skipped:
            self.history_HM3 = torch.cat([step_M3[None], self.history_HM3])[: self.length]
            self._compute_scales()

    def _compute_scales(self) -> None:
        amax_M3 = self.history_HM3.amax(0) if self.algorithm == "max" else self.history_HM3[0]
        self.scale_M3 = torch.where(amax_M3 > 0, self.limits_3 / amax_M3.clamp(min=MIN_AMAX), 0.0)

    def to_text(self) -> str:
        """The history of each matrix as JSON; every number is exact."""
        return json.dumps(dict(zip(self.names, self.history_HM3.transpose(0, 1).tolist(), strict=True)))

    def load_text(self, text: str) -> None:
        """Restore what `to_text` returned, also of another length or of other matrices; those without start anew."""
        rows = json.loads(text)
        steps = min(self.length, max(map(len, rows.values()), default=0))
        history = torch.zeros(steps, *self.step_M3.shape)
        for index, name in enumerate(self.names):
            if name in rows:
                history[:, index] = torch.tensor(rows[name][:steps])
        self.history_HM3 = history.to(self.step_M3.device)
        if steps:
            self._compute_scales()


@dataclass(frozen=True)
class RecordedProduct:
    """The product of one matrix of a history, not a function of its own, for which layers would be compiled again."""

    history: AmaxHistory
    index: int

    @uncompiled  # it records values in backward too
    def __call__(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """(R, I), (O, I) -> (R, O)."""
        return DelayedProduct.apply(x_RI, weight_OI, self.history, self.index, torch.is_grad_enabled())


class DelayedProduct(torch.autograd.Function):
    """The product of a matrix with delayed scales. Operands are cast again in backward, which stores no copies."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor, history: AmaxHistory, index: int, record: bool) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.history, ctx.index = history, index
        x, weight = (
            history.cast(value, index, number, record=record) for number, value in enumerate((x_RI, weight_OI))
        )
        return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        saved, history, index = ctx.saved_tensors, ctx.history, ctx.index
        x, weight = (history.cast(value, index, number, record=False) for number, value in enumerate(saved))
        grad = history.cast(grad_RO.contiguous(), index, 2, record=True)
        return torch.mm(grad, weight), torch.mm(grad.t(), x), None, None, None
