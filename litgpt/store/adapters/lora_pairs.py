"""Pairs A, B of published layers, made of those of our layers and taken apart again.

A published layer that is several of ours (phi-3's `qkv_proj` is our q, k and v) has one pair: the parts' A stand one
below the other, and their B each in its own rows and columns of an otherwise empty B. The pair of first values that
some updates are counted from is one more part, with B turned to its negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, cat

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping

FIRST = "_first"


@dataclass(frozen=True)
class LoRAPart:
    """The pair of one of our matrices inside a published one: whose, whether of first values, and its rank."""

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

    def parameter_name(self, half: str) -> str:
        """What the half `a` or `b` is called."""
        return tuner_parameter_name(self.name, f"lora_{half}" + FIRST * self.first)


def tuner_parameter_name(ours: str, key: str) -> str:
    """The name of a parameter that a tuner adds beside one of ours."""
    return ours.removesuffix("weight") + key if ours.endswith(".weight") else f"{ours}_{key}"


def find_parts(step: TensorMapping, tensors: Mapping[str, Tensor]) -> list[LoRAPart]:
    """The parts of a published matrix that have a pair, in order."""
    candidates = [LoRAPart(ours, first, 0) for ours in step.names for first in (False, True)]
    found = [(part, tensors[part.parameter_name("a")]) for part in candidates if part.parameter_name("a") in tensors]
    return [replace(part, rank=a.shape[-2]) for part, a in found]


def join_pair(
    step: TensorMapping,
    parts: list[LoRAPart],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    config: Config,
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a published matrix, or stacks of them; the parts' ranks add up."""

    def half(part: LoRAPart, which: str) -> Tensor:
        tensor = tensors[part.parameter_name(which)]
        return tensor if step.expert is None else tensor[step.expert]

    a = cat([half(part, "a") for part in parts], dim=-2)
    *experts, rank, _ = a.shape
    rows = {ours: a.new_zeros(*experts, parameters[ours].shape[-2], rank) for ours in step.names}
    at = 0
    for part in parts:
        rows[part.name][..., at : at + part.rank] = -half(part, "b") if part.first else half(part, "b")
        at += part.rank
    return a, join_rows(step, list(rows.values()), config)


def join_rows(step: TensorMapping, rows: list[Tensor], config: Config) -> Tensor:
    """Rows of our matrices in the order of the published one's rows."""
    return rows[0] if step.kind == "rename" else replace(step, transposed=False).join(rows, config)


def split_rows_of(step: TensorMapping, rows: Tensor, config: Config) -> dict[str, Tensor]:
    """The rows of each of our matrices out of those of the published one."""
    parts = [rows] if step.kind == "rename" else replace(step, transposed=False).split(rows, config)
    return dict(zip(step.names, parts, strict=True))


def split(step: TensorMapping, parts: list[LoRAPart], a: Tensor, b: Tensor, config: Config) -> dict[str, Tensor]:
    """Our A and B, by name, out of those of a published matrix.

    Raises:
        UserError: if the parts' ranks are not those of A and B.
    """
    if not a.dim() == b.dim() > 1 or not a.shape[-2] == b.shape[-1] == sum(part.rank for part in parts):
        raise UserError(
            f"{step.hf_name}: A {list(a.shape)} and B {list(b.shape)} do not have the ranks in the metadata"
        )
    found: dict[str, Tensor] = {}
    rows, at = split_rows_of(step, b, config), 0
    for part in parts:
        here = slice(at, at + part.rank)
        columns = rows[part.name][..., here]
        found |= {
            part.parameter_name("a"): a[..., here, :],
            part.parameter_name("b"): -columns if part.first else columns,
        }
        at += part.rank
    return found


def share_pair(step: TensorMapping, a: Tensor, b: Tensor, config: Config) -> dict[str, Tensor]:
    """Our A and B, by name, out of a pair that knows of no parts: each of ours has the whole A and its rows of B."""
    found: dict[str, Tensor] = {}
    for ours, rows in split_rows_of(step, b, config).items():
        part = LoRAPart(ours, False, a.shape[-2])
        found |= {part.parameter_name("a"): a, part.parameter_name("b"): rows}
    return found
