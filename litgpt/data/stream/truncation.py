"""What happens to samples that are longer than the model's maximum length."""

from collections.abc import Sequence
from typing import Literal

OnOverlong = Literal["drop", "truncate_left", "truncate_right", "split", "raise"]


def find_cut_starts(size: int, length: int, on_overlong: OnOverlong) -> Sequence[int]:
    """First tokens of the parts, of at most `length` tokens, that a sample of `size` > `length` tokens is cut into."""
    starts: dict[str, Sequence[int]] = {
        "drop": [],
        "truncate_right": [0],
        "truncate_left": [size - length],
        "split": range(0, size, length),
    }
    return starts[on_overlong]
