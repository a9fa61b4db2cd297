"""Join the LoRA pairs A, B of our layers to those of published layers, and split them again.

A published layer that contains several of ours (phi-3's `qkv_proj` contains our q, k and v) has one pair: the A of the
parts are stacked in rows, and each B has its own rows and columns in a block-diagonal B. The pair of initial values
that some initializations subtract is another part, with B negated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, cat

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping

FIRST_SUFFIX, COPY_SUFFIX = "_first", "_trained"


@dataclass(frozen=True)
class LoRAPart:
    """The pair of one of our matrices that a published matrix contains.

    Attributes:
        name: the name of our matrix.
        first: whether it is the pair of initial values.
        rank: the rank of the pair.
    """

    name: str
    first: bool
    rank: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAPart":
        """The part that a file's metadata describes."""
        return cls(values["ours"], values["first"], values["rank"])

    def to_dict(self) -> dict[str, Any]:
        """The part as a file's metadata describes it."""
        return {"ours": self.name, "first": self.first, "rank": self.rank}

    @property
    def a(self) -> str:
        """The name of its A."""
        return get_added_name(self.name, "lora_a" + FIRST_SUFFIX * self.first)

    @property
    def b(self) -> str:
        """The name of its B."""
        return get_added_name(self.name, "lora_b" + FIRST_SUFFIX * self.first)


def get_added_name(name: str, key: str) -> str:
    """The name of a parameter that a tuner adds to a weight or bias."""
    return name.removesuffix("weight") + key if name.endswith(".weight") else f"{name}_{key}"


def strip_ending(name: str) -> str:
    """The name of the layer of a weight or a bias."""
    return name.removesuffix(".weight").removesuffix(".bias")


def find_parts(mapping: TensorMapping, tensors: Mapping[str, Tensor]) -> list[LoRAPart]:
    """The parts of a published matrix that have a pair, in order."""
    parts = [LoRAPart(name, first, 0) for name in mapping.names for first in (False, True)]
    return [replace(part, rank=tensors[part.a].shape[-2]) for part in parts if part.a in tensors]


def join_pair(
    mapping: TensorMapping,
    parts: list[LoRAPart],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    config: Config,
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a published matrix, or stacks of them; the parts' ranks add up."""

    def read(name: str) -> Tensor:
        return tensors[name] if mapping.expert is None else tensors[name][mapping.expert]

    a = cat([read(part.a) for part in parts], dim=-2)
    *experts, rank, _ = a.shape
    rows = {name: a.new_zeros(*experts, parameters[name].shape[-2], rank) for name in mapping.names}
    start = 0
    for part in parts:
        rows[part.name][..., start : start + part.rank] = -read(part.b) if part.first else read(part.b)
        start += part.rank
    return a, join_rows(mapping, list(rows.values()), config)


def join_rows(mapping: TensorMapping, rows: list[Tensor], config: Config) -> Tensor:
    """Join rows of our matrices in the order of the rows of the published matrix."""
    return rows[0] if mapping.kind == "rename" else replace(mapping, transposed=False).join(rows, config)


def split_rows_by_name(mapping: TensorMapping, rows: Tensor, config: Config) -> dict[str, Tensor]:
    """Split the rows of a published matrix into those of each of our matrices."""
    parts = [rows] if mapping.kind == "rename" else replace(mapping, transposed=False).split(rows, config)
    return dict(zip(mapping.names, parts, strict=True))


def split_pair(
    mapping: TensorMapping, parts: list[LoRAPart], a: Tensor, b: Tensor, config: Config
) -> dict[str, Tensor]:
    """Split A and B of a published matrix into our A and B by name.

    Raises:
        UserError: if the parts' ranks are not those of A and B.
    """
    if not a.dim() == b.dim() > 1 or not a.shape[-2] == b.shape[-1] == sum(part.rank for part in parts):
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        raise UserError(f"{mapping.hf_name}: {shapes} do not have the ranks in the file's metadata")
    tensors: dict[str, Tensor] = {}
    rows, start = split_rows_by_name(mapping, b, config), 0
    for part in parts:
        ranks = slice(start, start + part.rank)
        columns = rows[part.name][..., ranks]
        tensors[part.a], tensors[part.b] = a[..., ranks, :], -columns if part.first else columns
        start += part.rank
    return tensors


def split_foreign_pair(mapping: TensorMapping, a: Tensor, b: Tensor, config: Config) -> dict[str, Tensor]:
    """Split a pair that was trained elsewhere: each of our matrices gets the full A and its rows of B."""
    tensors: dict[str, Tensor] = {}
    for name, rows in split_rows_by_name(mapping, b, config).items():
        part = LoRAPart(name, False, a.shape[-2])
        tensors[part.a], tensors[part.b] = a, rows
    return tensors
