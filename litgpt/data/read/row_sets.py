"""Sets of rows, converted to conversations, with a report of the rows that were left out."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.documents import Source
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sources import LocatedRow
from litgpt.errors import UserError

MAX_SHOWN = 10
"""Number of rows that a report quotes."""
ROWS_AHEAD = 4
"""Rows for each thread that are converted before they are needed."""
OnError = Literal["raise", "drop", "warn"]


@dataclass
class RowReport:
    """Counts the rows that were left out, by reason, and the columns and fields that nothing reads.

    Attributes:
        rows: number of rows read.
        reasons: number of rows left out for each reason.
        first: location and error of the first few.
        overlong: samples longer than the model's maximum length.
        untrained: samples left out because none of their tokens are trained.
        unread: number of rows with each column, or field of a message, that the samples do not depend on.
    """

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    overlong: int = 0
    untrained: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RowReport":
        """Restore a report from JSON values."""
        counters = {name: Counter(values.get(name, {})) for name in ("reasons", "unread")}
        return cls(**values | counters)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        counters = {"reasons": dict(self.reasons), "unread": dict(self.unread)}
        return {**asdict(self), **counters, "first": list(self.first)}

    @property
    def left_out(self) -> int:
        """Number of rows left out."""
        return self.reasons.total()

    def add(self, location: str, error: BadRow) -> None:
        """Count a row that is left out."""
        self.reasons[error.reason] += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(f"{location}: {error}")

    def merge(self, other: "RowReport") -> "RowReport":
        """Return the sum of two reports."""
        counts = {name: getattr(self, name) + getattr(other, name) for name in ("rows", "overlong", "untrained")}
        first = [*self.first, *other.first][:MAX_SHOWN]
        return RowReport(reasons=self.reasons + other.reasons, first=first, unread=self.unread + other.unread, **counts)

    def remove_read(self, names: Collection[str]) -> None:
        """Remove columns and fields that are read after all."""
        self.unread = Counter({name: count for name, count in self.unread.items() if name not in names})

    def describe_unread(self) -> str:
        """Name the columns and fields that nothing reads, with their counts, in one line; empty if there are none."""
        parts = [f"{name} ({count:,} rows)" for name, count in self.unread.most_common()]
        return f"not read: {', '.join(parts)}; rename a column to use it" if parts else ""

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        more = {"samples longer than the model reads": self.overlong, "samples without trained tokens": self.untrained}
        return "; ".join(
            [
                f"{self.left_out:,} of {self.rows:,} rows left out" + (f": {reasons}" if reasons else ""),
                *(f"{count:,} {what}" for what, count in more.items() if count),
            ]
        )


@dataclass(frozen=True)
class RowSet:
    """Rows and how they are converted to conversations.

    Attributes:
        name: shown in messages.
        sources: the files of the rows.
        read: iterates over the rows from the start.
        convert: converts a row to conversations, usually one; raises BadRow.
        settings: everything else that `convert` depends on, as JSON values; part of cache keys.
        channel: the channel of rows that name none.
        media_dir: the folder of the files that rows name; None if they name none.
        relate: adds to conversations, with their locations, what depends on those after them; by default nothing.
        threads: number of rows that are converted at a time, for a `convert` that waits for others; 0 for one.
    """

    name: str
    sources: list[Source]
    read: Callable[[], Iterable[LocatedRow]]
    convert: Callable[[Any], list[Conversation]]
    settings: list[Any]
    channel: str | None = None
    media_dir: Path | None = None
    relate: Callable[[Iterable[tuple[str, Any]]], Iterator[tuple[str, Any]]] = iter
    threads: int = 0

    def convert_located(self, row: Any) -> list[Conversation]:
        """Convert one item of `read`.

        Raises:
            BadRow: if the row is invalid.
        """
        if isinstance(row, BadRow):
            raise row
        return self.convert(row)

    def read_conversations(self, report: RowReport) -> Iterator[tuple[str, Conversation]]:
        """Iterate over the conversations with their locations; invalid rows are counted in `report`."""
        return self.relate(self._convert_rows(report))

    def _convert_rows(self, report: RowReport) -> Iterator[tuple[str, Conversation]]:
        rows = map(self._try_convert, self.read()) if self.threads == 0 else self._convert_in_threads()
        for location, conversations in rows:
            report.rows += 1
            if isinstance(conversations, BadRow):
                report.add(location, conversations)
                continue
            yield from ((location, conversation) for conversation in conversations)

    def _try_convert(self, located: LocatedRow) -> tuple[str, list[Conversation] | BadRow]:
        location, row = located
        try:
            return location, self.convert_located(row)
        except BadRow as error:
            return location, error

    def _convert_in_threads(self) -> Iterator[tuple[str, list[Conversation] | BadRow]]:
        """Convert the rows in their order, some ahead."""
        pending = deque[Future[tuple[str, list[Conversation] | BadRow]]]()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="rows")
        try:
            for located in self.read():
                pending.append(pool.submit(self._try_convert, located))
                if len(pending) == ROWS_AHEAD * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def bad_row_error(message: str) -> UserError:
    """Build the error for an invalid row that stops the run."""
    return UserError(f"{message}; fix it, or set data.on_error: drop")
