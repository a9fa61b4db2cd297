"""Samples of rows that are read on demand: data larger than memory, or not downloaded.

Every data rank reads its own shard of the rows, in windows of some thousand; the samples of a window are shuffled, or
packed and then shuffled. The next sample is a function of the seed, the rank, and the positions of the rank's shards,
so a checkpoint holds only a few numbers per rank.
"""

import random
import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sets import MAX_SHOWN, OnError, RowReport, RowSet, bad_row_error
from litgpt.data.render.example import Example, Renderer
from litgpt.data.stream.batch import Batch, BatchArrays, collate_rows, to_batch
from litgpt.data.stream.fingerprint import check_position
from litgpt.data.stream.packing import OnOverlong, PackingStrategy, cut_slices, pack_samples
from litgpt.data.stream.row_shards import RowShard
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.data.stream.workers import WorkerStream
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.data import BatchShape, Stream

Reports = dict[str, dict[str, Any]]
"""Row reports as JSON values, by the name of the row set."""


@dataclass(frozen=True)
class SampleBuilder:
    """How rows become samples and micro batches.

    Attributes:
        renderer: renders conversations to samples.
        on_error: for invalid rows: raise; drop and count them; or warn, which also prints the first few.
        on_overlong: how to treat a sample of more than `length` tokens.
        length: maximum tokens of a sample.
        packing: tokens of a row and the packing strategy; None for one sample per row.
        padding: stack the rows of a micro batch, padded, instead of concatenating them.
        window: rows of the data that are shuffled, and packed, together.
        seed: seed of the order; differs between ranks.
    """

    renderer: Renderer
    on_error: OnError
    on_overlong: OnOverlong
    length: int
    packing: tuple[int, PackingStrategy] | None
    padding: bool
    window: int
    seed: int

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the rows and the rank."""
        rest = [self.on_overlong, self.length, self.packing, self.padding, self.window]
        return [self.renderer.fingerprint_parts(), rest]

    def truncate(self, location: str, example: Example) -> list[Example]:
        """Cut a sample that is too long.

        Raises:
            UserError: under `on_overlong: raise`.
        """
        size = example.longest
        if size <= self.length:
            return [example]
        if self.on_overlong == "raise":
            raise UserError(
                f"{location}: {size} tokens are more than train.max_seq_length: {self.length}; increase it, or set "
                "data.on_overlong: truncate_right"
            )
        return [example.take(part) for part in cut_slices(size, self.length, self.on_overlong)]


class DrawnConversation(NamedTuple):
    """A conversation, the number of its row set, its location, and whether it is read for the first time."""

    set_number: int
    location: str
    conversation: Conversation
    is_new: bool


class StreamedRows(IterableDataset[Any]):
    """The micro batches of one rank, each with the state from which the next one is read.

    Args:
        row_sets: the row sets: how rows are converted, and names for messages.
        shards: where the rows come from, and in which proportion.
        micro_batch_size: rows per micro batch.
        channels: the names of the numbers in `channels` of a batch; a row whose channel is not among them counts
            for the channel of its row set.
        value_name: name of the numbers that belong to the answers; None for samples that are single documents.
        columns_read: columns and fields that rows list as unread, although the run reads them.
    """

    def __init__(
        self,
        row_sets: Sequence[RowSet],
        shards: Sequence[RowShard],
        builder: SampleBuilder,
        *,
        micro_batch_size: int,
        channels: Sequence[str],
        value_name: str | None = None,
        columns_read: Collection[str] = (),
    ) -> None:
        self.value_name, self.columns_read = value_name, columns_read
        self.row_sets, self.shards, self.builder = row_sets, shards, builder
        self.micro_batch_size, self.channels = micro_batch_size, channels
        self.reports = [RowReport() for _ in row_sets]
        self.drawn_counts = [0 for _ in shards]
        self.window_count = self.rows_consumed = 0

    def state(self) -> dict[str, Any]:
        """The current position as JSON values."""
        return {
            "places": [shard.position for shard in self.shards],
            "taken": list(self.drawn_counts),
            "windows": self.window_count,
            "behind": self.rows_consumed,
            "reports": [report.to_dict() for report in self.reports],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        for shard, position in zip(self.shards, state["places"], strict=True):
            shard.seek(position)
        self.drawn_counts = list(state["taken"])
        self.window_count, self.rows_consumed = state["windows"], state["behind"]
        self.reports = [RowReport.from_dict(report) for report in state["reports"]]

    def __iter__(self) -> Iterator[tuple[BatchArrays, dict[str, Any], Reports]]:
        batches = self._micro_batches()
        while True:
            # no `yield` inside of `try`, since Python may close the generator at exit, when UserError is None
            try:
                batch = next(batches)
            except UserError as error:  # raised in a worker, its message would arrive with a traceback
                yield {"error": np.array(str(error))}, {}, {}
                return
            yield batch

    def _micro_batches(self) -> Iterator[tuple[BatchArrays, dict[str, Any], Reports]]:
        queue: deque[tuple[dict[str, Any], int, list[Example]]] = deque()
        while True:
            while len(queue) <= self.micro_batch_size:  # the row after a micro batch tells where to continue
                window_state, consumed = self.state() | {"behind": 0}, self.rows_consumed
                window = self._build_window()
                queue.extend((window_state, index, row) for index, row in enumerate(window) if index >= consumed)
                self.rows_consumed = 0
            rows = [queue.popleft()[2] for _ in range(self.micro_batch_size)]
            weighted = any(example.is_weighted for row in rows for example in row)
            arrays = collate_rows(
                rows,
                padding=self.builder.padding,
                weighted=weighted,
                channels=self.channels,
                values=self.value_name,
            )
            window_state, consumed, _ = queue[0]
            yield arrays, window_state | {"behind": consumed}, self.list_reports()

    def list_reports(self) -> Reports:
        """The row reports so far."""
        return {rows.name: report.to_dict() for rows, report in zip(self.row_sets, self.reports, strict=True)}

    def draw_rows(self, number: int, rng: random.Random) -> list[tuple[int, list[Example]]]:
        """Draw some rows of the next window at random, with their indices."""
        window = self._build_window()
        return [(index, window[index]) for index in rng.sample(range(len(window)), min(number, len(window)))]

    def _build_window(self) -> list[list[Example]]:
        """Read the next window that is not empty: rows of samples in their final order."""
        examples: list[Example] = []
        first_pass = [shard.position[0] for shard in self.shards]
        while not examples:
            passes = [shard.position[0] for shard in self.shards]
            weights = [shard.weight for shard in self.shards]
            if all(now > then + 1 for now, then, weight in zip(passes, first_pass, weights, strict=True) if weight):
                first = next((report.first[0] for report in self.reports if report.first), "every answer is empty")
                raise UserError(f"data: no row to train on in a whole pass; the first error: {first}")
            examples = self._build_examples([drawn for _ in range(self.builder.window) for drawn in self._draw()])
        sizes, packing = [len(example.ids) for example in examples], self.builder.packing
        rows = pack_samples(sizes, *packing) if packing else [[number] for number in range(len(examples))]
        order = FeistelPermutation(len(rows), self.builder.seed, self.window_count)
        self.window_count += 1
        return [[examples[number] for number in rows[order(index)]] for index in range(len(rows))]

    def _draw(self) -> list[DrawnConversation]:
        """Read the conversations of the next row."""
        total, weights = sum(self.drawn_counts) + 1, [shard.weight for shard in self.shards]
        chosen = max(range(len(weights)), key=lambda i: weights[i] / sum(weights) * total - self.drawn_counts[i])
        self.drawn_counts[chosen] += 1
        set_number, (location, row) = next(self.shards[chosen])
        is_new = self.shards[chosen].position[0] == 0
        self.reports[set_number].rows += is_new
        try:
            conversations = self.row_sets[set_number].convert_located(row)
        except BadRow as error:
            self._handle_error(set_number, location, error, is_new)
            return []
        return [DrawnConversation(set_number, location, conversation, is_new) for conversation in conversations]

    def _handle_error(self, set_number: int, location: str, error: BadRow, is_new: bool) -> None:
        """Stop at an invalid row, or count it once, however often it is read."""
        if self.builder.on_error == "raise":
            raise bad_row_error(f"{location}: {error}")
        if not is_new:
            return
        report = self.reports[set_number]
        report.add(location, error)
        if self.builder.on_error == "warn" and report.left_out <= MAX_SHOWN:
            print_message(f"{report.first[-1]}; left out")

    def _count_unread(self, set_number: int, conversation: Conversation) -> None:
        """Count the columns and fields that nothing reads; the first rank prints each name once."""
        report = self.reports[set_number]
        unread = {*conversation.unread, *self.builder.renderer.list_unread(conversation)}.difference(self.columns_read)
        if self.shards[0].rank == 0 and (fresh := sorted(unread - set(report.unread))):
            print_message(f"{self.row_sets[set_number].name}: not read: {', '.join(fresh)}")
        report.unread.update(unread)

    def _build_examples(self, drawn: list[DrawnConversation]) -> list[Example]:
        """Render conversations to samples, none longer than the model's maximum length."""
        samples: list[Example] = []
        located = [(str(number), conversation) for number, (_, _, conversation, _) in enumerate(drawn)]
        conversations = [conversation for _, conversation in self.row_sets[0].relate(located)]
        examples = self.builder.renderer.build_examples(conversations)
        for (set_number, location, _, is_new), conversation, example in zip(
            drawn, conversations, examples, strict=True
        ):
            if isinstance(example, BadRow):
                self._handle_error(set_number, location, example, is_new)
                continue
            report = self.reports[set_number]
            if is_new:
                self._count_unread(set_number, conversation)
            report.overlong += is_new and example.longest > self.builder.length
            channel = example.channel if example.channel in self.channels else self.row_sets[set_number].channel
            parts = self.builder.truncate(location, replace(example, channel=channel))
            trained = [part for part in parts if part.has_targets]
            report.untrained += is_new and not trained and bool(parts)
            samples += trained
        return samples


class StreamedBatches(WorkerStream, Stream):
    """Endless micro batches of rows that are read on demand; the length of an epoch is unknown.

    Args:
        rows: this rank's rows.
        shape: this rank's part of the batches.
        workers: whether to prefetch, in one process.
        fingerprint: of everything that decides which samples come.
        cached_reports: reports of the rows that were tokenized ahead.
    """

    samples_per_epoch = None

    def __init__(
        self, rows: StreamedRows, shape: BatchShape, *, workers: int, fingerprint: str, cached_reports: Reports
    ) -> None:
        super().__init__()
        self.position = 0
        self.samples, self._shape = rows, shape
        self._workers = min(workers, 1) if sys.platform == "linux" else 0  # workers are forked on Linux only
        self._fingerprint, self._cached_reports = fingerprint, cached_reports
        self._state, self._reports = rows.state(), rows.list_reports()

    @property
    def epoch(self) -> float:
        """Whole passes over the source with the fewest."""
        return min(position[0] for position in self._state["places"])

    @property
    def channels(self) -> Sequence[str]:
        """The names of the numbers in `Batch.channels`."""
        return list(self.samples.channels)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self.samples.load_state(self._state)
        self.start(self.samples, self._workers)
        while self.prefetched is not None:  # via the attribute: `close` must drop the last reference
            arrays, state, reports = next(self.prefetched)
            batch = to_batch(arrays)
            self._state, self._reports = state, reports
            self.position += self._shape.samples_per_round
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, the fingerprint of the data, and the state of every rank; a collective call."""
        states_of_ranks = self._shape.gather({str(self._shape.rank): self._state})
        ranks = {rank: state for states in states_of_ranks for rank, state in states.items()}
        return {"position": self.position, "fingerprint": self._fingerprint, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was saved.

        Raises:
            UserError: if the state belongs to other data or settings, or to another number of ranks.
        """
        ranks = state.get("ranks")
        if isinstance(ranks, dict) and len(ranks) != self._shape.ranks:
            raise UserError(
                f"data.streaming: the checkpoint was saved by {len(ranks)} data ranks, now there are "
                f"{self._shape.ranks}; resume with {len(ranks)}"
            )
        self.position = check_position(state, self._fingerprint)
        self._state = state["ranks"][str(self._shape.rank)]
        self.samples.load_state(self._state)
        self._reports = self.samples.list_reports()

    def report(self) -> Reports:
        """The rows that all ranks read and left out so far; a collective call."""
        states_of_ranks = self._shape.gather({self._shape.rank: self._reports})
        ranks = {rank: reports for item in states_of_ranks for rank, reports in item.items()}
        merged = dict(self._cached_reports)
        for reports in ranks.values():
            for name, report in reports.items():
                if name in merged:
                    report = RowReport.from_dict(merged[name]).merge(RowReport.from_dict(report)).to_dict()
                merged[name] = report
        return merged
