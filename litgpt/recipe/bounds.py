"""Number types that carry their own limits, and the check that every group of settings makes of itself."""

from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le

from litgpt.errors import UserError

Count = Annotated[int, Ge(1), Le(10**9)]
Position = Annotated[int, Ge(0), Le(10**9)]
TokenCount = Annotated[int, Ge(1), Le(10**18)]
BatchSize = Annotated[int, Ge(1), Le(10**7)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # what NumPy and Fabric can be seeded with
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Rate = Annotated[float, Ge(0.0), Le(1e3)]
Positive = Annotated[float, Ge(1e-30), Le(1e12)]


@dataclass(frozen=True)
class Limits:
    """The smallest and the largest number a field takes."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:.10g} to {self.high:.10g}"


def find_limits(hint: Any) -> Limits | None:
    """The limits written in a type hint, or in the one member of a union that has some."""
    if get_origin(hint) is Annotated:
        low, high = get_args(hint)[1:]
        return Limits(low.ge, high.le)
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return next((found for member in members if (found := find_limits(member))), None)


def resolve_types(group: Any) -> dict[str, Any]:
    """The type of every field of a dataclass, limits included."""
    if any(isinstance(field.type, str) for field in fields(group)):
        return get_type_hints(group, include_extras=True)
    return {field.name: field.type for field in fields(group)}


def collect_limits(group: Any) -> dict[str, Limits]:
    """The limits of every field of a dataclass that has some."""
    found = {name: find_limits(hint) for name, hint in resolve_types(group).items()}
    return {name: limits for name, limits in found.items() if limits}


def check_numbers(group: Any, prefix: str = "") -> None:
    """Hold every number of a dataclass against the limits in its type.

    Raises:
        UserError: naming the first key (`prefix` and the field's name), its value and the limits; NaN is never inside.
    """
    for name, limits in collect_limits(type(group)).items():
        value = getattr(group, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not limits.low <= value <= limits.high:
            raise UserError(f"{prefix}{name}: {value} will not do; give a number {limits}")
