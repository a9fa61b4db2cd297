"""AdamW whose moments and master weights take four bytes or fewer; its arithmetic is in float32."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.parallel.exchange import get_local_tensor
from litgpt.parallel.host_copies import HostCopies
from litgpt.parallel.state_layout import shard_scales, zeros_in_layout
from litgpt.recipe.optimizer import PrecisionAwareAdamW
from litgpt.store.safetensors_files import get_shard
from litgpt.train.master_weights import MASTERS, NO_MASTER, REMAINDER, MasterFormat
from litgpt.train.state_formats import FLOAT32, StateFormat, Stored, StoredTensor, get_format
from litgpt.train.stochastic_rounding import Noise

MIN_BLOCK = 8  # values; shorter blocks would spend more on scales than they save
UPDATE_SIZE = 1 << 22  # values that are updated at a time, which bounds the memory of float32 copies


class Formats(NamedTuple):
    """The formats of the states of a parameter, whose keys are the names of the fields."""

    exp_avg: StateFormat
    exp_avg_sq: StateFormat
    main_param: MasterFormat

    def list_tensors(self, width: int) -> dict[str, dict[str, StoredTensor]]:
        """The tensors of every state by suffix.

        Args:
            width: number of values in the last dim.
        """
        return {
            key: state_format.list_tensors(gcd(width, state_format.block))
            for key, state_format in self._asdict().items()
        }


class PrecisionAwareOptimizer(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with states in any format.

    Args:
        groups: parameter groups.
        names: the name of every parameter, which its random numbers depend on.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: PrecisionAwareAdamW, names: Mapping[nn.Parameter, str]
    ) -> None:
        super().__init__(groups, {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps})
        self.formats = Formats(
            get_format(settings.exp_avg_dtype),
            get_format(settings.exp_avg_sq_dtype),
            MASTERS[settings.main_params_dtype],
        )
        self.seeds = {parameter: crc32(name.encode()) for parameter, name in names.items()}
        self.on_host = choose_host_parameters(list(names), settings.offload_fraction)

    @torch.no_grad()
    def step(self, _closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, those with states in host memory there."""
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        on_host = [(p, group) for p, group in work if p in self.on_host]
        copies = HostCopies([(get_local_tensor(p), get_local_tensor(p.grad)) for p, _ in on_host])
        for parameter, group in work:
            if parameter not in self.on_host:
                self._update(parameter, get_local_tensor(parameter), get_local_tensor(parameter.grad), group)
        for (weight, gradient), (parameter, group) in zip(copies, on_host, strict=True):
            self._update(parameter, weight, gradient, group)

    def choose_formats(self, parameter: Tensor) -> Formats:
        """The formats of a parameter: vectors, and matrices whose rows would have short blocks, have no scales."""

        def choose(wanted: Any, without_scales: Any) -> Any:
            is_scaled = wanted.block > 1 and (parameter.dim() < 2 or gcd(parameter.shape[-1], wanted.block) < MIN_BLOCK)
            return without_scales if is_scaled else wanted

        exp_avg, exp_avg_sq, main_param = self.formats
        if parameter.dtype != torch.bfloat16:
            main_param = NO_MASTER
        return Formats(choose(exp_avg, FLOAT32), choose(exp_avg_sq, FLOAT32), choose(main_param, REMAINDER))

    def build_state(
        self, parameter: nn.Parameter, saved_shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a parameter's states by name, zero and in its layout.

        Args:
            saved_shapes: of the tensors that will be read into them. Another layout may have saved scales of blocks
                of another size, which are kept if they are smaller. If they are larger, the tensor of scales is built
                in full, and `shard_scales` splits it.
        """
        local = get_local_tensor(parameter)
        device = torch.device("cpu") if parameter in self.on_host else local.device
        built = {}
        for key, tensors in self.choose_formats(parameter).list_tensors(local.shape[-1]).items():
            for suffix, (dtype, values, is_scale) in tensors.items():
                if local.shape[-1] % values:
                    raise UserError(
                        f"optimizer.{key}_dtype: 4bit needs rows of an even length, which parallel splits into "
                        f"{local.shape[-1]} values; use 8bit"
                    )
                shape = (saved_shapes or {}).get(key + suffix, ())
                blocks = shape[-1] if is_scale and shape else parameter.shape[-1] // values
                if blocks < parameter.shape[-1] // values:
                    built[key + suffix] = torch.zeros(shape, dtype=dtype, device=device)
                else:
                    values = parameter.shape[-1] // blocks
                    built[key + suffix] = zeros_in_layout(parameter, dtype, device, values=values)
        return built

    def _update(self, parameter: nn.Parameter, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a weight and its states, some rows at a time."""
        state, formats = self.state[parameter], self.choose_formats(parameter)
        is_new = not state
        if is_new:
            state.update(self.build_state(parameter), step=0)
        state["step"] += 1
        shard, seed = get_shard(parameter), self.seeds[parameter] + state["step"]
        tensors = formats.list_tensors(weight.shape[-1])
        for key, suffixes in tensors.items():
            for suffix, (_, values, is_scale) in suffixes.items():
                if is_scale:
                    state[key + suffix] = shard_scales(state[key + suffix], parameter, values)
        for rows in iter_row_slices(weight):
            stored = {
                key: {suffix: get_local_tensor(state[key + suffix])[rows] for suffix in suffixes}
                for key, suffixes in tensors.items()
            }
            offset = (shard.offset[0] + rows.start, *shard.offset[1:])
            noise = Noise(tuple(weight[rows].shape), offset, shard.shape, seed, weight.device)
            if is_new:
                formats.main_param.start(weight[rows], stored["main_param"], noise)
            update_rows(weight[rows], gradient[rows].float(), formats, stored, noise, group, state["step"])


def update_rows(
    weight: Tensor,
    gradient: Tensor,
    formats: Formats,
    stored: dict[str, Stored],
    noise: Noise,
    group: dict[str, Any],
    step: int,
) -> None:
    """Update a weight and its states, with the operations of torch.optim.AdamW in their order.

    Args:
        gradient: float32.
        stored: the tensors of the states by key.
        step: number of the step, from 1.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    exp_avg = formats.exp_avg.read(stored["exp_avg"], signed=True)
    exp_avg_sq = formats.exp_avg_sq.read(stored["exp_avg_sq"], signed=False)
    master = formats.main_param.read(weight, stored["main_param"])
    master.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    master.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    formats.exp_avg.write(stored["exp_avg"], exp_avg, noise, signed=True)
    formats.exp_avg_sq.write(stored["exp_avg_sq"], exp_avg_sq, noise, signed=False)
    formats.main_param.write(weight, stored["main_param"], master, noise)


def iter_row_slices(tensor: Tensor) -> Iterator[slice]:
    """Split the first dim of a tensor into slices of about `UPDATE_SIZE` values."""
    rows = max(1, UPDATE_SIZE * len(tensor) // max(1, tensor.numel()))
    return (slice(start, start + rows) for start in range(0, len(tensor) if tensor.numel() else 0, rows))


def choose_host_parameters(parameters: Sequence[nn.Parameter], fraction: float) -> set[nn.Parameter]:
    """Choose parameters, the largest first, with at most this fraction of all values on this rank."""
    sizes = {parameter: get_local_tensor(parameter).numel() for parameter in parameters}
    rest, chosen = fraction * sum(sizes.values()), set()
    for parameter in sorted(parameters, key=lambda parameter: -sizes[parameter]):
        if sizes[parameter] <= rest:
            chosen.add(parameter)
            rest -= sizes[parameter]
    return chosen
