"""The images of a micro-batch: decoded in the process that reads it, and kept no longer than the batch."""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from litgpt.data.media.positions import build_media_positions
from litgpt.data.media.reader import MediaReader
from litgpt.data.read.row_sets import MAX_SHOWN
from litgpt.data.render.example import Example
from litgpt.errors import UserError
from litgpt.messages import print_message

ExampleRows = list[list[Example]]


@dataclass
class MediaLoader:
    """Loads the images of micro-batches.

    Attributes:
        on_error: for an image that cannot be read any more: raise, or else leave its sample untrained, and print the
            first few.
        failed: number of images that could not be read by this process.
    """

    reader: MediaReader
    on_error: Literal["raise", "drop", "warn"]
    failed: int = field(default=0, init=False)

    def load(self, rows: ExampleRows) -> tuple[ExampleRows, dict[str, np.ndarray]]:
        """Decode the images of some rows; returns the rows, and `patches` (N, P) and `grids` (K, 3), if there are any.

        An image that cannot be read is zeros, and no token of its sample is trained; `unreadable` is the number of
        these samples, if there are any.

        Raises:
            UserError: for such an image under `on_error: raise`.
        """
        patches, kept, before = list[torch.Tensor](), [list(row) for row in rows], self.failed
        for row in kept:
            for number, example in enumerate(row):
                try:
                    patches += [self.reader.read(each.medium, each.grids) for each in example.media]
                except UserError as error:  # before any of them is added
                    self._handle_error(error)
                    sizes = [steps * height * width for each in example.media for steps, height, width in each.grids]
                    patches += [torch.zeros(sum(sizes), self.reader.shape.patch_numbers)]
                    row[number] = replace(example, weights=np.zeros_like(example.weights))
        grids = [grid for row in kept for example in row for each in example.media for grid in each.grids]
        if not grids:
            return rows, {}
        failed = {"unreadable": np.array(self.failed - before)} if self.failed > before else {}
        return kept, {"patches": torch.cat(patches).numpy(), "grids": np.array(grids, np.int64), **failed}

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
        if not self.reader.has_sections:
            return {}
        positions = np.zeros((len(arrays["ids"]), 3, arrays["ids"].shape[1]), np.int64)
        starts = [0] * len(positions)
        for number, row in enumerate(rows):
            line = number if padding else 0
            for example in row:
                grids = [grid for each in example.media for grid in each.grids]
                ids = example.ids.tolist()
                part = slice(starts[line], starts[line] + len(ids))
                positions[line, :, part] = build_media_positions(self.reader.shape, ids, grids).numpy()
                starts[line] = part.stop
        return {"positions": positions}
