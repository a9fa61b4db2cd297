"""Rows of tokens that a program makes, as micro-batches: with weights, and with values for a loss of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from litgpt.data.render.example import Example
from litgpt.data.stream.batch import Batch, collate_rows, to_batch
from litgpt.errors import UserError

Row = Mapping[str, Any] | Sequence[int]
"""Token ids; or a mapping of `ids`, optionally `weights`, and values of each token under other names."""


@dataclass(frozen=True)
class TokenRow:
    """A row of tokens, the weights of their losses, and other values of each token by name."""

    example: Example
    values: dict[str, np.ndarray] = field(default_factory=dict)


def parse_token_row(row: Row, number: int, *, max_tokens: int) -> TokenRow:
    """Check a row and convert it to arrays.

    Args:
        number: of the row, for messages.
        max_tokens: the maximum number of tokens before the last label.

    Raises:
        UserError: naming the row, if it is too short or too long, or its values do not fit the tokens.
    """
    given: Mapping[str, Any] = row if isinstance(row, Mapping) else {"ids": row}
    if "ids" not in given:
        raise UserError(f"row {number}: has no ids, but {', '.join(given) or 'nothing'}; give the token ids as ids")
    arrays = {name: np.asarray(values) for name, values in given.items()}
    ids = arrays.pop("ids")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 2 <= len(ids) <= max_tokens + 1:
        raise UserError(
            f"row {number}: ids have the shape {ids.shape} and the type {ids.dtype}; give 2 to {max_tokens + 1} whole "
            "numbers in a list"
        )
    for name, values in arrays.items():
        if values.shape != ids.shape or values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            raise UserError(f"row {number}: {name} is not one finite number for each of the {len(ids)} ids")
    weights = arrays.pop("weights", np.ones(len(ids))).astype(np.float32)
    if (weights < 0).any():
        raise UserError(f"row {number}: weights has {weights.min():g}; give 0 or more, or values under another name")
    return TokenRow(Example(ids, weights), {name: values.astype(np.float32) for name, values in arrays.items()})


def collate_token_rows(rows: Sequence[TokenRow]) -> Batch:
    """A micro-batch of rows, padded on the right.

    Raises:
        UserError: if some rows have values that others do not have.
    """
    examples = [row.example for row in rows]
    weighted = any(example.is_weighted for example in examples)
    batch = to_batch(collate_rows([[example] for example in examples], padding=True, weighted=weighted, channels=()))
    names = list(rows[0].values)
    if other := next((row for row in rows if row.values.keys() != rows[0].values.keys()), None):
        raise UserError(f"rows: one has the values {names}, another {list(other.values)}; give the same to all rows")
    batch.token_values = {name: torch.zeros(batch.labels.shape) for name in names} or None
    for index, row in enumerate(rows):
        for name, values in row.values.items():
            assert batch.token_values is not None
            batch.token_values[name][index, : len(values) - 1] = torch.from_numpy(values[1:])  # at their labels
    return batch
