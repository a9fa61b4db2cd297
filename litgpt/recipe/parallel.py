"""How a run is laid out over devices."""

from dataclasses import dataclass
from typing import Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, check_numbers


@dataclass(frozen=True)
class ParallelArgs:
    """The degree of each axis; their product is devices x num_nodes."""

    data_replicate: Count = 1
    """Copies of the model, each on other data (DDP; with data_shard: HSDP)."""
    data_shard: Count | Literal["auto"] = "auto"
    """Devices that one copy's parameters are spread over (FSDP2); auto takes what is left."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Free gathered parameters between forward and backward: true is ZeRO-3, false is ZeRO-2."""

    def __post_init__(self) -> None:
        check_numbers(self, "parallel.")

    def degrees(self, world: int) -> tuple[int, int]:
        """The degrees of (data_replicate, data_shard) over `world` = devices x num_nodes processes.

        Raises:
            UserError: if their product is not `world`, naming what would do.
        """
        if self.data_shard == "auto":
            shard, rest = divmod(world, self.data_replicate)
            if rest:
                raise UserError(
                    f"parallel.data_replicate: {self.data_replicate} does not divide devices x num_nodes = {world}; "
                    f"set data_replicate: 1 or devices: {self.data_replicate}"
                )
            return self.data_replicate, shard
        product = self.data_replicate * self.data_shard
        if product != world:
            raise UserError(
                f"parallel: {self.data_replicate} x {self.data_shard} = {product} (data_replicate x data_shard), "
                f"but devices x num_nodes is {world}; set data_shard: auto or devices: {product}"
            )
        return self.data_replicate, self.data_shard
