"""Number types with limits, and the range check that every group of settings runs on itself."""

from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le

from litgpt.errors import UserError

Count = Annotated[int, Ge(1), Le(10**9)]
Position = Annotated[int, Ge(0), Le(10**9)]
TokenCount = Annotated[int, Ge(1), Le(10**18)]
BatchSize = Annotated[int, Ge(1), Le(10**7)]
ZeroStage = Annotated[int, Ge(1), Le(3)]
VocabularySize = Annotated[int, Ge(258), Le(4_000_000)]  # of a new tokenizer: 256 bytes and two special tokens at least
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # the range that NumPy and Fabric accept
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Rate = Annotated[float, Ge(0.0), Le(1e3)]
Positive = Annotated[float, Ge(1e-30), Le(1e12)]


@dataclass(frozen=True)
class Limits:
    """The smallest and the largest number that a field accepts, both inclusive."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:.10g} to {self.high:.10g}"


def find_limits(hint: Any) -> Limits | None:
    """Return the limits in a type hint, or in the first member of a union that has limits."""
    if get_origin(hint) is Annotated:
        low, high = get_args(hint)[1:]
        return Limits(low.ge, high.le)
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return next((limits for member in members if (limits := find_limits(member))), None)


def resolve_types(group: Any) -> dict[str, Any]:
    """Return the type hint of every field of a dataclass, with its limits."""
    if any(isinstance(field.type, str) for field in fields(group)):
        return get_type_hints(group, include_extras=True)
    return {field.name: field.type for field in fields(group)}


def check_numbers(group: Any, prefix: str = "") -> None:
    """Check every number of a dataclass against the limits in its type.

    Raises:
        UserError: for the first number out of range, naming its key (`prefix` and the field's name), its value and the
            limits. NaN is always out of range.
    """
    for name, hint in resolve_types(type(group)).items():
        value, limits = getattr(group, name), find_limits(hint)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if limits and is_number and not limits.low <= value <= limits.high:
            raise UserError(f"{prefix}{name}: {value} is not valid; use a number {limits}")
