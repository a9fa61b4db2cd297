"""The settings that name a run's data: what every data module answers, and the shape of the batches asked of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from litgpt.errors import UserError

DATA_MODULES = {
    name: f"litgpt.data.{name}"
    for name in (
        *("TextFiles", "PythonDocs", "LitData", "TinyStories", "TinyLlama", "MicroLlama", "OpenWebText"),
        *("JSON", "Alpaca", "Alpaca2k", "AlpacaGPT4", "Deita", "Dolly", "FLAN", "LIMA", "LongForm", "Conversations"),
    )
}
"""Short names that `data` accepts, and the class each stands for; a dotted path names a user's own class."""


def gather_alone(value: Any) -> list[Any]:
    """What every process has, where there is but one."""
    return [value]


@dataclass(frozen=True)
class BatchShape:
    """How a run cuts its data into batches, seen from one data rank.

    Args:
        micro_batch_size: samples per rank in one forward.
        global_batch_size: samples per optimizer step over all data ranks.
        max_seq_length: tokens per sample that the model reads; a sample holds one more, the last label.
        rank: this data rank, from 0.
        ranks: number of data ranks.
        seed: seed of the sample order; data modules that have a `seed` of their own use theirs.
        gather: what every process has, for streams whose ranks stand at different places; all must call it.

    Raises:
        UserError: if a size is below 1 or the micro batches of all ranks do not tile the global batch.
    """

    micro_batch_size: int
    global_batch_size: int
    max_seq_length: int
    rank: int = 0
    ranks: int = 1
    seed: int = 42
    gather: Callable[[Any], list[Any]] = field(default=gather_alone, compare=False)

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "global_batch_size", "max_seq_length"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}: {getattr(self, name)} is not positive; 1 would do")
        if not 0 <= self.rank < self.ranks:
            raise UserError(f"data rank {self.rank} of {self.ranks} ranks does not exist")
        if self.global_batch_size % self.samples_per_round:
            raise UserError(
                f"train.global_batch_size: {self.global_batch_size} is not a multiple of train.micro_batch_size "
                f"{self.micro_batch_size} x {self.ranks} data ranks; {self.samples_per_round} would do"
            )

    @property
    def samples_per_round(self) -> int:
        """Samples that all ranks together read in one micro batch each."""
        return self.micro_batch_size * self.ranks


class Stream(Protocol):
    """Micro batches of one rank, with a position that a checkpoint can hold.

    `position` counts samples over all ranks that were handed out by iterating: a batch counts from the moment it is
    yielded, so a state taken between two steps describes consumed batches, however far workers have read ahead.
    """

    position: int

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples in one pass over the data, over all ranks; None where the source cannot tell."""

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def __iter__(self) -> Iterator[Any]:
        """`litgpt.data.stream.batch.Batch`es from `position` on: endless for training; for validation one pass from the
        start, with equally many batches on every rank (rows that are missing have only ignored labels)."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch handed out; JSON values only."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; a UserError if that was another data set."""

    def close(self) -> None:
        """Stop the workers, if any."""


class DataModule(ABC):
    """What a run needs of its data, in the order of the calls: connect, prepare_data (rank 0 first), setup, streams."""

    @abstractmethod
    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Hand over what is known only once the model is: tokenizer, samples per micro batch, tokens per sample."""

    def prepare_data(self) -> None:  # noqa: B027 - a step that a module may not need
        """Download and tokenize; every rank calls it, rank 0 first, and the others find it done."""

    def setup(self, stage: str = "") -> None:  # noqa: B027
        """Open what `prepare_data` left on disk; on every rank."""

    def training_documents(self) -> Iterable[str]:
        """The training text, document by document, to train a tokenizer on.

        Raises:
            UserError: if this data is not text.
        """
        raise UserError(f"data: {type(self).__name__} does not hold text to train a tokenizer on; set tokenizer_dir")

    def question(self, which: Literal["first", "random"] | int, seed: int) -> list[int]:
        """Tokens that ask for one of the answers in the data, to show what a model has learned; empty if none do.

        Args:
            which: the first, one by the seed, or one by its number.
        """
        return []

    def report(self) -> dict[str, Any]:
        """The rows that were left out, and why; JSON values. Empty where none are told apart."""
        return {}

    def mark(self, folder: Path) -> None:  # noqa: B027
        """Leave in a finished model's folder what asks it as this data does, if the tokenizer's files do not say."""

    @abstractmethod
    def train_stream(self, shape: BatchShape) -> Stream:
        """Endless micro batches for this rank."""

    @abstractmethod
    def val_stream(self, shape: BatchShape) -> Stream | None:
        """One pass over the validation data for this rank; None if there is none."""
