"""The media of a micro-batch: decoded in the process that reads it, and kept no longer than the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from litgpt.data.media.errors import MissingExtraError
from litgpt.data.media.positions import build_media_positions
from litgpt.data.media.reader import AnyReader
from litgpt.data.read.media import Medium
from litgpt.data.read.row_sets import MAX_SHOWN
from litgpt.data.render.example import Example, PlacedMedium
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.model.feature_order import FeatureOrder, join_orders
from litgpt.model.media import Grid

ExampleRows = list[list[Example]]


@dataclass
class MediaLoader:
    """Loads the media of micro-batches.

    Attributes:
        on_error: for one that cannot be read any more: raise, or else leave its sample untrained, and print the first
            few.
        failed: number of those that could not be read by this process.
    """

    reader: AnyReader
    on_error: Literal["raise", "drop", "warn"]
    failed: int = field(default=0, init=False)

    def load(self, rows: ExampleRows) -> tuple[ExampleRows, dict[str, np.ndarray]]:
        """Decode the media of some rows.

        Returns the rows, and if they have media, `patches` (N, P) or `frames` (N, mels), and `grids` (K, 3); and if
        features are not at their places in order, those of `FeatureOrder.to_arrays`.

        Those of samples of two answers, which share images, have also `uses` and `image_answers`, as in `Media`.
        One that cannot be read is zeros, and no token of its sample is trained; `unreadable` is the number of these
        samples, if there are any.

        Raises:
            UserError: for such a medium under `on_error: raise`.
            MissingExtraError: if a package that reads them is not installed.
        """
        values, orders = list[torch.Tensor](), list[FeatureOrder | None]()
        kept, before = [list(row) for row in rows], self.failed
        for row in kept:
            for number, example in enumerate(row):
                media = list_distinct(example)
                try:
                    read = [self.reader.read(each.medium, each.grids) for each in media]
                    read_orders = [self.reader.read_order(each.medium, each.grids, each.tokens) for each in media]
                except MissingExtraError:
                    raise
                except UserError as error:
                    self._handle_error(error)
                    read = [self.reader.build_blank(each.grids) for each in media]
                    read_orders = [self.reader.build_blank_order(each.grids, each.tokens) for each in media]
                    row[number] = replace(example, weights=np.zeros_like(example.weights))
                values, orders = [*values, *read], [*orders, *read_orders]
        examples = [example for row in kept for example in row]
        read_media = [each for example in examples for each in list_distinct(example)]
        if not read_media:
            return rows, {}
        arrays = number_uses(examples) if any(example.split for example in examples) else {}
        arrays[self.reader.array_name] = torch.cat(values).numpy()
        arrays["grids"] = np.array([grid for each in read_media for grid in each.grids], np.int64)
        if (order := join_orders(orders)) is not None:
            arrays |= order.to_arrays()
        if self.failed > before:
            arrays["unreadable"] = np.array(self.failed - before)
        return kept, arrays

    def _handle_error(self, error: UserError) -> None:
        if self.on_error == "raise":
            raise UserError(f"data: {error}; or set data.on_error: drop") from None
        self.failed += 1
        if self.failed <= MAX_SHOWN:
            print_message(f"data: {error}; its sample is not trained")

    def build_positions(
        self, rows: ExampleRows, arrays: dict[str, np.ndarray], *, padding: bool
    ) -> dict[str, np.ndarray]:
        """The `positions` (B, 3, T) of collated rows, if the tokens of the model have three; else nothing."""
        shape = self.reader.sections_shape
        if shape is None:
            return {}
        positions = np.zeros((len(arrays["ids"]), 3, arrays["ids"].shape[1]), np.int64)
        starts = [0] * len(positions)
        for number, row in enumerate(rows):
            line = number if padding else 0
            for example in row:
                grids = [grid for each in example.media for grid in each.grids]
                seconds = [step for each in example.media for step in each.step_seconds]
                ids = example.ids.tolist()
                part = slice(starts[line], starts[line] + len(ids))
                positions[line, :, part] = build_media_positions(shape, ids, grids, seconds=seconds).numpy()
                starts[line] = part.stop
        return {"positions": positions}


def list_distinct(example: Example) -> list[PlacedMedium]:
    """The media of a sample; of two answers, those that both have only once."""
    distinct = {(each.medium, each.grids): each for each in example.media}
    return list(distinct.values()) if example.split else list(example.media)


def number_uses(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """`uses` and `image_answers` of samples of two answers: `uses` and `answers` as in `Media`, (U,) each."""
    uses, answers, count = list[int](), list[int](), 0
    for number, example in enumerate(examples):
        grids = dict[tuple[Medium, tuple[Grid, ...]], range]()
        for each in list_distinct(example):
            grids[each.medium, each.grids] = range(count, count + len(each.grids))
            count += len(each.grids)
        for answer, document in enumerate(example.documents, start=2 * number):
            for each in document.media:
                uses += grids[each.medium, each.grids]
                answers += [answer] * len(each.grids)
    return {"uses": np.array(uses, np.int64), "image_answers": np.array(answers, np.int64)}
