"""The media of a micro-batch: decoded in the process that reads it, and kept no longer than the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from litgpt.data.media.errors import MissingExtraError
from litgpt.data.media.reader import AnyReader, read_media
from litgpt.data.read.media import Medium
from litgpt.data.read.row_sets import MAX_SHOWN
from litgpt.data.render.example import Example, PlacedMedium
from litgpt.data.render.sample_positions import build_sample_positions
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.model.feature_order import FeatureOrder, join_orders
from litgpt.model.media import Grid

ExampleRows = list[list[Example]]


class ReadMedium(NamedTuple):
    """A medium of a sample with the patches or frames that a tower reads, and the order of its features, if any."""

    placed: PlacedMedium
    values: torch.Tensor
    order: FeatureOrder | None


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

        Returns the rows; if they have images or videos, their `patches` (N, P) and `grids` (K, 3), and if features are
        not at their places in order, those of `FeatureOrder.to_arrays`; if they have sounds, their `frames` (N, mels)
        and `lengths` (K, 3), which are the numbers of frames, of 1 row and of 1 column.

        Those of samples of two answers, which share media, have also `uses` and `image_answers`, as in `Media`, or the
        same of sounds, `sound_uses` and `sound_answers`, and the frames of each, `sound_counts`.
        One that cannot be read is zeros, and no token of its sample is trained; `unreadable` is the number of these
        samples, if there are any.

        Raises:
            UserError: for such a medium under `on_error: raise`.
            MissingExtraError: if a package that reads them is not installed.
        """
        read, kept, before = list[ReadMedium](), [list(row) for row in rows], self.failed
        for row in kept:
            for number, example in enumerate(row):
                media = list_distinct(example)
                pairs = [(self.reader.find_part(each.medium.kind), each) for each in media]
                try:
                    values = list(read_media(self.reader, [(each.medium, each.grids) for each in media]))
                    orders = [part.read_order(each.medium, each.grids, each.tokens) for part, each in pairs]
                except MissingExtraError:
                    raise
                except UserError as error:
                    self._handle_error(error)
                    values = [part.build_blank(each.grids) for part, each in pairs]
                    orders = [part.build_blank_order(each.grids, each.tokens) for part, each in pairs]
                    row[number] = replace(example, weights=np.zeros_like(example.weights))
                read += map(ReadMedium, media, values, orders)
        if not read:
            return rows, {}
        examples = [example for row in kept for example in row]
        uses = self._number_uses(examples, read) if any(example.split for example in examples) else {}
        failed = {"unreadable": np.array(self.failed - before)} if self.failed > before else {}
        return kept, self._collect(read) | uses | failed

    def _collect(self, read: Sequence[ReadMedium]) -> dict[str, np.ndarray]:
        """The arrays of media and their values, those that one tower encodes together."""
        arrays: dict[str, np.ndarray] = {}
        for part in self.reader.parts:
            of_part = [each for each in read if each.placed.medium.kind in part.kinds]
            if not of_part:
                continue
            values_name, sizes_name = part.array_names
            arrays[values_name] = torch.cat([each.values for each in of_part]).numpy()
            arrays[sizes_name] = np.array([grid for each in of_part for grid in each.placed.grids], np.int64)
        order = join_orders([each.order for each in read])
        return arrays if order is None else arrays | order.to_arrays()

    def _number_uses(self, examples: Sequence[Example], read: Sequence[ReadMedium]) -> dict[str, np.ndarray]:
        """The arrays of which medium is at which place of samples of two answers, for each tower that has some."""
        arrays: dict[str, np.ndarray] = {}
        for part in self.reader.parts:
            if any(each.placed.medium.kind in part.kinds for each in read):
                uses, answers = number_uses(examples, part.kinds)
                arrays |= dict(zip(part.use_names, (uses, answers), strict=True))
        counts = [len(each.values) for each in read if each.placed.medium.kind == "audio"]
        return arrays | ({"sound_counts": np.array(counts, np.int64)} if counts else {})

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
                ids = example.ids.tolist()
                part = slice(starts[line], starts[line] + len(ids))
                positions[line, :, part] = build_sample_positions(shape, ids, example.media).numpy()
                starts[line] = part.stop
        return {"positions": positions}


def list_distinct(example: Example) -> list[PlacedMedium]:
    """The media of a sample; of two answers, those that both have only once."""
    distinct = {(each.medium, each.grids): each for each in example.media}
    return list(distinct.values()) if example.split else list(example.media)


def number_uses(examples: Sequence[Example], kinds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`uses` and `answers` as in `Media`, (U,) each, of the media of some kinds in samples of two answers."""
    uses, answers, count = list[int](), list[int](), 0
    for number, example in enumerate(examples):
        grids = dict[tuple[Medium, tuple[Grid, ...]], range]()
        for each in list_distinct(example):
            if each.medium.kind not in kinds:
                continue
            grids[each.medium, each.grids] = range(count, count + len(each.grids))
            count += len(each.grids)
        for answer, document in enumerate(example.documents, start=2 * number):
            for each in document.media:
                if each.medium.kind not in kinds:
                    continue
                uses += grids[each.medium, each.grids]
                answers += [answer] * len(each.grids)
    return np.array(uses, np.int64), np.array(answers, np.int64)
