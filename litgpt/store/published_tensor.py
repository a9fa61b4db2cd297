"""Load a tensor of a model's files to the parameters that it contains: memory-mapped, or copied block by block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import TensorMapping
from litgpt.store.safetensors_files import TensorShard, intersect_blocks
from litgpt.store.weight_files import WeightSource

BLOCK_BYTES = 32 << 20  # read from a file at once; the memory that loading needs in addition to the model

CORRECT_CONFIG = "correct model_config.yaml or config.json of that folder"


def list_parameters(config: Config) -> dict[str, Tensor]:
    """All parameters of a model on the meta device: bfloat16, or float32 where the config requires it."""
    return dict(GPT.on_meta(config, torch.bfloat16).named_parameters())


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of a source, and the parameters (or with `mapping.expert`, slices of parameters) that it contains.

    Attributes:
        parameters: all parameters of the model by name, on the meta device.
    """

    source: WeightSource
    mapping: TensorMapping
    config: Config
    parameters: Mapping[str, Tensor]

    @property
    def hf_name(self) -> str:
        """Its name in the files."""
        return self.mapping.hf_name

    @property
    def meta(self) -> Tensor:
        """Its shape and type, on the meta device."""
        return self.source.read_meta(self.hf_name)

    def read(self) -> dict[str, Tensor]:
        """Read our tensors (or one expert's slice of each): views of the file where the layout allows it."""
        return self._split(self.source.read(self.hf_name))

    def release(self) -> None:
        """Free the memory of what was read of the tensor."""
        self.source.release(self.hf_name)

    def _split(self, tensor: Tensor) -> dict[str, Tensor]:
        try:
            return dict(zip(self.mapping.names, self.mapping.split(tensor, self.config), strict=True))
        except UserError as error:
            raise UserError(f"{self.source.path}: {error}") from None

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter of the model, or of an expert's slice of it."""
        shape = tuple(self.parameters[name].shape)
        return shape if self.mapping.expert is None else shape[1:]

    def check(self) -> None:
        """Compare type and shape with the model's; reads no values.

        Raises:
            UserError: naming the published tensor.
        """
        path, hf_name, meta = self.source.path, self.hf_name, self.meta
        if not meta.is_floating_point():
            raise UserError(f"{path}: {hf_name} is of type {meta.dtype}; weights are floating-point numbers")
        if meta.dtype.itemsize == 1:
            raise UserError(f"{path}: {hf_name} is of type {meta.dtype} without scales; use weights in 16 or 32 bits")
        for name, part in self._split(meta).items():
            actual, expected = tuple(part.shape), self._shape(name)
            if actual != expected:
                sizes = f"{hf_name} is {list(actual)}, the model's {name} {list(expected)}"
                raise UserError(f"{path}: {sizes}; {CORRECT_CONFIG}")

    def map_into(self, parameters: Mapping[str, Tensor]) -> bool:
        """Make a parameter a view of the file; returns False if its type, layout or device does not allow that."""
        if not self.source.is_mapped or self.mapping.kind != "rename" or self.mapping.expert is not None:
            return False
        ((name, view),) = self.read().items()
        parameter = parameters.get(name)
        if parameter is None or isinstance(parameter, DTensor):
            return False
        fits = parameter.device.type == "cpu" and parameter.dtype == view.dtype
        if not fits or not view.is_contiguous() or view.data_ptr() % view.element_size():
            return False
        parameter.data = view
        return True

    def copy_to(self, shards: Mapping[str, TensorShard]) -> None:
        """Copy values to this rank's shards of our tensors, a block of rows at a time; reads no other values.

        The values are cast to the type of the shards and moved to their device.
        """
        local_names = (name for name in self.mapping.names if name in shards)  # others are on other stages
        targets = {name: overlap for name in local_names if (overlap := self._intersect(name, shards[name]))}
        if not targets:
            return
        tensor = self.source.read(self.hf_name)
        if self.mapping.kind == "grouped":  # splitting the rows would copy all of them, so only their numbers are split
            numbers = self._split(torch.arange(tensor.shape[0])[:, None])
            for name, (target, index) in targets.items():
                rows = numbers[name][index[0], 0]
                self._copy(target, rows, tensor, lambda block: tensor[block][:, *index[1:]])  # noqa: B023 - used at once
        else:
            parts = self._split(tensor)
            for name, (target, index) in targets.items():
                self._copy(target, parts[name][index], tensor, lambda block: block)

    def _copy(self, target: Tensor, rows: Tensor, tensor: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        for target_block, block in zip(split_rows(target, tensor), split_rows(rows, tensor), strict=True):
            target_block.copy_(read(block))
            self.release()

    def _intersect(self, name: str, shard: TensorShard) -> tuple[Tensor, tuple[slice, ...]] | None:
        """The values of a shard that this tensor contains, and their index in our tensor; None without any."""
        local, offset, shape = shard.local.detach(), shard.offset, self._shape(name)
        if self.mapping.expert is not None:
            expert = self.mapping.expert - offset[0]
            if not 0 <= expert < local.shape[0]:
                return None
            local, offset = local[expert], offset[1:]
        overlap = intersect_blocks((0,) * len(shape), shape, offset, tuple(local.shape))
        return (local[overlap[1]], overlap[0]) if overlap else None


def split_rows(tensor: Tensor, like: Tensor) -> list[Tensor]:
    """Split a tensor into blocks of rows, with as many rows as have `BLOCK_BYTES` in `like`."""
    if not tensor.dim():
        return [tensor]
    row_bytes = max(1, like.nbytes // max(1, like.shape[0]))
    return list(tensor.split(max(1, BLOCK_BYTES // row_bytes)))
