"""Endless, exactly resumable micro batches: sample number i is a function of (seed, i) and of nothing else."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from litgpt.data.stream.batch import Batch, BatchArrays, to_batch
from litgpt.data.stream.fingerprint import check_position
from litgpt.data.stream.windows import SampleDataset
from litgpt.data.stream.workers import WorkerStream, count_cpus
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.data import BatchShape, Stream


class MicroBatchDataset(Dataset[BatchArrays]):
    """The micro batch of one rank at any position."""

    def __init__(self, samples: SampleDataset, shape: BatchShape) -> None:
        self.samples, self.shape = samples, shape

    def __getitem__(self, position: int) -> BatchArrays:
        first = position + self.shape.rank * self.shape.micro_batch_size
        try:
            return self.samples.micro_batch(first, self.shape.micro_batch_size)
        except UserError as error:  # raised in a worker, its message would arrive with a traceback
            return {"error": np.array(str(error))}


class SampleStream(Stream):
    """A stream over a dataset of known size; its position counts samples."""

    samples: SampleDataset
    position: int

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data, over all ranks."""
        return self.samples.count

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over the data, over all ranks."""
        return self.samples.token_count

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.position / self.samples.count

    @property
    def channels(self) -> Sequence[str]:
        """The names of the numbers in `Batch.channels`."""
        return list(self.samples.channels)


class TrainStream(WorkerStream, SampleStream):
    """Endless micro batches; `position` counts the samples yielded over all ranks.

    The micro batch of rank r at position p holds samples p + r*B .. p + (r+1)*B - 1, then p grows by B * ranks. A
    global batch is therefore the same set of samples for every number of ranks and every micro batch size, and a run
    may be resumed with other ones.

    Args:
        samples: the dataset.
        shape: this rank's part of the batches.
        workers: processes that prefetch, at most one per core; 0 reads in this process. The batches do not depend on
            it.

    Attributes:
        unreadable: number of samples yielded that are not trained, because a medium of each could not be read.
    """

    def __init__(self, samples: SampleDataset, shape: BatchShape, *, workers: int = 0) -> None:
        super().__init__()
        self.position, self.unreadable = 0, 0
        self.samples, self._shape, self._workers = samples, shape, min(workers, count_cpus())

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        positions = itertools.count(self.position, self._shape.samples_per_round)
        self.start(MicroBatchDataset(self.samples, self._shape), self._workers, positions)
        while self.prefetched is not None:  # via the attribute: `close` must drop the last reference
            arrays = next(self.prefetched)
            self.position += self._shape.samples_per_round
            self.unreadable += int(arrays.get("unreadable", 0))
            yield to_batch(arrays)

    def close(self) -> None:
        """Stop the workers, and print how many samples had media that could not be read."""
        super().close()
        count, self.unreadable = self.unreadable, 0
        if count:
            cause = "an image, video or sound of each could not be read"
            print_message(f"data: {count:,} samples were not trained, because {cause}")

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch yielded and the fingerprint of the data; under 100 bytes of JSON."""
        return {"position": self.position, "fingerprint": self.samples.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was saved.

        Raises:
            UserError: if the state belongs to other data, another tokenizer, sequence length or seed.
        """
        self.position = check_position(state, self.samples.fingerprint)


class ValStream(SampleStream):
    """One pass over validation samples per iteration, in a fixed order, with equally many batches on every rank.

    It reads in this process: the text is memory-mapped, and starting workers for every validation would take longer
    than reading. Samples past the end have all labels ignored.
    """

    def __init__(self, samples: SampleDataset, shape: BatchShape) -> None:
        self.position = 0
        self.samples, self._shape = samples, shape

    def __len__(self) -> int:
        """Batches per pass, on every rank."""
        return -(-self.samples.count // self._shape.samples_per_round)

    def __iter__(self) -> Iterator[Batch]:
        batches, step = MicroBatchDataset(self.samples, self._shape), self._shape.samples_per_round
        for start in range(0, len(self) * step, step):
            remaining = self.samples.count - start - self._shape.rank * self._shape.micro_batch_size
            batch = to_batch(batches[start], trained=max(0, remaining))
            self.position = start + step
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: every pass begins at the start."""
        return {}
