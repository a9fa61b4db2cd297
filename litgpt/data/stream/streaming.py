"""Samples out of rows that are read as they are needed: data larger than memory, or not downloaded.

Every data rank reads a share of the rows of its own, in windows of some thousand; a window's samples are shuffled, or
packed and then shuffled. What comes next is a function of the seed, the rank, and where the rank's shares stand, so a
few numbers a rank are all that a checkpoint holds.
"""

import hashlib
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from litgpt.data.cache.examples import MAX_SHOWN, OnError, Renderer, RowReport, RowSet, bad_row_error
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.render.labels import Example
from litgpt.data.stream.batch import Batch
from litgpt.data.stream.batches import Arrays, check_position, to_batch
from litgpt.data.stream.collate import collate_rows
from litgpt.data.stream.packing import PackingStrategy, pack_samples
from litgpt.data.stream.row_shards import RowShard
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.data.stream.workers import PrefetchingStream
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape

Told = dict[str, dict[str, Any]]
"""Reports as JSON values, by the names of what they are of."""


@dataclass(frozen=True)
class SampleBuilder:
    """How samples are made of rows, and laid in micro batches.

    Attributes:
        renders: what makes samples of conversations.
        on_error: at a row that is no conversation: stop, or leave it out and count it, or also name the first few.
        on_overlong: what becomes of a sample of more than `length` tokens.
        length: the most tokens of a sample.
        packing: tokens of a row and how rows are filled; None for one sample a row.
        padding: lay the rows of a micro batch under one another, and not end to end in one.
        window: rows of the data that are shuffled, and packed, together.
        seed: fixes the order; another one on every rank.
    """

    renders: Renderer
    on_error: OnError
    on_overlong: str
    length: int
    packing: tuple[int, PackingStrategy] | None
    padding: bool
    window: int
    seed: int

    def fingerprint_parts(self) -> list[Any]:
        """All that decides what becomes of rows, on whichever rank."""
        rest = [self.on_overlong, self.length, self.packing, self.padding, self.window]
        return [self.renders.fingerprint_parts(), rest]


class DrawnConversation(NamedTuple):
    """A conversation, the number of its set, where it stands, and whether it is read for the first time."""

    number: int
    where: str
    said: Conversation
    new: bool


@dataclass(frozen=True)
class WeightedShard:
    """A share of rows and its part in the whole.

    Attributes:
        share: the rows.
        owners: of each part of the share, the number of the set that it belongs to.
        weight: how much of the samples come from it, relative to the others.
    """

    share: RowShard
    owners: Sequence[int]
    weight: float = 1.0


class StreamedRows(IterableDataset[Any]):
    """The micro batches of one rank, each with the state that goes on behind it.

    Args:
        sets: what the rows belong to: how they are converted, and what they are called.
        mixed: where the rows come from, and in which proportion.
        micro_batch_size: rows of samples in one.
        channels: the names of the numbers in `channels` of a batch; a row's own channel that is not among them counts
            as its set's.
    """

    def __init__(
        self,
        sets: Sequence[RowSet],
        mixed: Sequence[WeightedShard],
        making: SampleBuilder,
        *,
        micro_batch_size: int,
        channels: Sequence[str],
    ) -> None:
        self.sets, self.mixed, self.making = sets, mixed, making
        self.micro_batch_size, self.channels = micro_batch_size, channels
        self.reports = [RowReport() for _ in sets]
        self.taken = [0 for _ in mixed]
        self.windows = self.behind = 0

    def state(self) -> dict[str, Any]:
        """Where reading stands: JSON values."""
        return {
            "places": [one.share.place for one in self.mixed],
            "taken": list(self.taken),
            "windows": self.windows,
            "behind": self.behind,
            "reports": [told(report) for report in self.reports],
        }

    def go_to(self, state: dict[str, Any]) -> None:
        """Read on from a state."""
        for one, place in zip(self.mixed, state["places"], strict=True):
            one.share.go_to(place)
        self.taken, self.windows, self.behind = list(state["taken"]), state["windows"], state["behind"]
        self.reports = [RowReport(**one | {"reasons": Counter(one["reasons"])}) for one in state["reports"]]

    def __iter__(self) -> Iterator[tuple[Arrays, dict[str, Any], Told]]:
        try:
            yield from self._micro_batches()
        except UserError as error:  # a worker's errors would reach the run with a traceback in their text
            import numpy as np

            yield {"error": np.array(str(error))}, {}, {}

    def _micro_batches(self) -> Iterator[tuple[Arrays, dict[str, Any], Told]]:
        rows: deque[tuple[dict[str, Any], int, list[Example]]] = deque()
        while True:
            while len(rows) <= self.micro_batch_size:  # the one behind a micro batch says where to go on
                start, behind = self.state() | {"behind": 0}, self.behind
                window = self._window()
                rows.extend((start, place, row) for place, row in enumerate(window) if place >= behind)
                self.behind = 0
            taken = [rows.popleft()[2] for _ in range(self.micro_batch_size)]
            weighted = any(((one.weights != 0) & (one.weights != 1)).any() for row in taken for one in row)
            arrays = collate_rows(taken, padding=self.making.padding, weighted=weighted, channels=self.channels)
            start, behind, _ = rows[0]
            yield arrays, start | {"behind": behind}, self.told()

    def told(self) -> Told:
        """The reports so far."""
        return {rows.name: told(report) for rows, report in zip(self.sets, self.reports, strict=True)}

    def some(self, number: int, order: random.Random) -> list[tuple[int, list[Example]]]:
        """So many rows of the next window, drawn at random, with their numbers."""
        window = self._window()
        return [(index, window[index]) for index in order.sample(range(len(window)), min(number, len(window)))]

    def _window(self) -> list[list[Example]]:
        """The next window's rows of samples in their order, not empty."""
        examples: list[Example] = []
        seen = [one.share.place[0] for one in self.mixed]
        while not examples:
            if all(one.share.place[0] > before + 1 for one, before in zip(self.mixed, seen, strict=True) if one.weight):
                first = next((report.first[0] for report in self.reports if report.first), "every answer is empty")
                raise UserError(f"data: no row to train on in a whole pass; the first fault: {first}")
            examples = self._examples([one for _ in range(self.making.window) for one in self._drawn()])
        sizes = [len(example.ids) for example in examples]
        packing = self.making.packing
        members = pack_samples(sizes, *packing) if packing else [[number] for number in range(len(examples))]
        order = FeistelPermutation(len(members), self.making.seed, self.windows)
        self.windows += 1
        return [[examples[one] for one in members[order(place)]] for place in range(len(members))]

    def _drawn(self) -> list[DrawnConversation]:
        """The conversations in the row whose turn it is."""
        total, weights = sum(self.taken) + 1, [one.weight for one in self.mixed]
        chosen = max(range(len(weights)), key=lambda one: weights[one] / sum(weights) * total - self.taken[one])
        self.taken[chosen] += 1
        share = self.mixed[chosen].share
        part, (where, row) = next(share)
        number, new = self.mixed[chosen].owners[part], share.place[0] == 0
        self.reports[number].rows += new
        try:
            if isinstance(row, BadRow):
                raise row
            return [DrawnConversation(number, where, said, new) for said in self.sets[number].convert(row)]
        except BadRow as fault:
            self._fault(number, where, fault, new)
            return []

    def _fault(self, number: int, where: str, fault: BadRow, new: bool) -> None:
        """Stop at a row that is no conversation, or count it, once however often it is read."""
        if self.making.on_error == "raise":
            raise bad_row_error(f"{where}: {fault}")
        if not new:
            return
        report = self.reports[number]
        report.add(where, fault)
        if self.making.on_error == "warn" and report.left_out <= MAX_SHOWN:
            print(f"{report.first[-1]}; left out", file=sys.stderr)

    def _examples(self, drawn: list[DrawnConversation]) -> list[Example]:
        """The samples that conversations become, none longer than the model reads."""
        found: list[Example] = []
        made = self.making.renders.examples([one.said for one in drawn])
        for one, example in zip(drawn, made, strict=True):
            if isinstance(example, BadRow):
                self._fault(one.number, one.where, example, one.new)
                continue
            report = self.reports[one.number]
            report.overlong += one.new and len(example.ids) > self.making.length
            channel = example.channel if example.channel in self.channels else self.sets[one.number].channel
            pieces = self._cut(one.where, replace(example, channel=channel))
            trained = [piece for piece in pieces if piece.weights[1:].any()]
            report.untrained += one.new and not trained and bool(pieces)
            found += trained
        return found

    def _cut(self, where: str, example: Example) -> list[Example]:
        """A sample, or what becomes of one that is too long."""
        size, length, how = len(example.ids), self.making.length, self.making.on_overlong
        if size <= length:
            return [example]
        if how == "raise":
            raise UserError(
                f"{where}: {size} tokens are more than train.max_seq_length: {length}; raise that, or set "
                "data.on_overlong: truncate_right"
            )
        starts: dict[str, Sequence[int]] = {
            "drop": [],
            "truncate_right": [0],
            "truncate_left": [size - length],
            "split": range(0, size, length),
        }
        cuts = [slice(start, start + length) for start in starts[how]]
        return [replace(example, ids=example.ids[cut], weights=example.weights[cut]) for cut in cuts]


class StreamedBatches(PrefetchingStream):
    """Endless micro batches of rows that are read as they are needed; the length of an epoch is not known.

    Args:
        rows: this rank's.
        shape: this rank's share of the batches.
        workers: whether to read ahead, in one process.
        fingerprint: of everything that decides which samples come.
        also: reports of what was read ahead.
    """

    samples_per_epoch = None

    def __init__(self, rows: StreamedRows, shape: BatchShape, *, workers: int, fingerprint: str, also: Told) -> None:
        super().__init__()
        self.position = 0
        self.rows, self._shape = rows, shape
        self._workers = min(workers, 1) if sys.platform == "linux" else 0  # elsewhere workers are not forked
        self._fingerprint, self._also = fingerprint, also
        self._state, self._told = rows.state(), rows.told()

    @property
    def epoch(self) -> float:
        """Whole passes over the source of which there are fewest."""
        return min(place[0] for place in self._state["places"])

    @property
    def channels(self) -> list[str]:
        """The names of the numbers in `Batch.channels`."""
        return list(self.rows.channels)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self.rows.go_to(self._state)
        if self._workers:
            self.start(self.rows, self._workers)
        else:
            self.running = iter(self.rows)
        while self.running is not None:  # read through the attribute: `close` must drop the last reference
            arrays, state, reports = next(self.running)
            batch = to_batch(arrays)
            self._state, self._told = state, reports
            self.position += self._shape.samples_per_round
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, the fingerprint of the data, and where every rank stands; all ranks must call it."""
        mine = {str(self._shape.rank): self._state}
        ranks = {rank: state for one in self._shape.gather(mine) for rank, state in one.items()}
        return {"position": self.position, "fingerprint": self._fingerprint, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: if the state belongs to other data or settings, or to another number of ranks.
        """
        ranks = state.get("ranks")
        if isinstance(ranks, dict) and len(ranks) != self._shape.ranks:
            raise UserError(
                f"data.streaming: the checkpoint was read by {len(ranks)} data ranks, now there are "
                f"{self._shape.ranks}; go on with {len(ranks)}"
            )
        self.position = check_position(state, self._fingerprint)
        self._state = state["ranks"][str(self._shape.rank)]
        self.rows.go_to(self._state)
        self._told = self.rows.told()

    def report(self) -> Told:
        """The rows that all ranks read and left out so far; all ranks must call it."""
        ranks = {rank: one for part in self._shape.gather({self._shape.rank: self._told}) for rank, one in part.items()}
        found = dict(self._also)
        for one in ranks.values():
            for name, report in one.items():
                found[name] = merge_reports(found[name], report) if name in found else report
        return found


def told(report: RowReport) -> dict[str, Any]:
    """A report as JSON values."""
    return {**asdict(report), "reasons": dict(report.reasons), "first": list(report.first)}


def merge_reports(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one."""
    reasons = Counter(one["reasons"]) + Counter(other["reasons"])
    counts = {name: one[name] + other[name] for name in ("rows", "overlong", "untrained")}
    return {**counts, "reasons": dict(reasons), "first": [*one["first"], *other["first"]][:MAX_SHOWN]}


def fingerprint(*parts: Any) -> str:
    """A short hash of what a stream depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
