"""The interface of data modules and their streams, and the batch sizes of a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from litgpt.errors import UserError

DATA_MODULES = {
    name: f"litgpt.data.{name}"
    for name in (
        *("TextFiles", "PythonDocs", "LitData", "TinyStories", "TinyLlama", "MicroLlama", "OpenWebText"),
        *("JSON", "Alpaca", "Alpaca2k", "AlpacaGPT4", "Deita", "Dolly", "FLAN", "LIMA", "LongForm", "Conversations"),
        *("Preferences",),
    )
}
"""Dotted paths of the data modules by the short names that `data` accepts; any other class is given by its path."""


def gather_alone(value: Any) -> list[Any]:
    """Gather a value from all ranks of a single process."""
    return [value]


@dataclass(frozen=True)
class BatchShape:
    """The batch sizes of a run, and its data ranks.

    Args:
        micro_batch_size: number of samples per rank and forward pass.
        global_batch_size: number of samples per optimizer step, over all data ranks.
        max_seq_length: number of input tokens per sample; a sample has one more token, which is the last label.
        rank: index of this data rank.
        ranks: number of data ranks.
        seed: seed of the sample order, unless the data module has its own `seed`.
        gather: collective that returns the values of all ranks, for streams with a different position on each rank.

    Raises:
        UserError: if a size is less than 1, or global_batch_size is not divisible by micro_batch_size x ranks.
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
                raise UserError(f"train.{name}: {getattr(self, name)} is not positive; use 1 or more")
        if not 0 <= self.rank < self.ranks:
            raise UserError(f"data rank {self.rank} of {self.ranks} ranks does not exist")
        if self.global_batch_size % self.samples_per_round:
            raise UserError(
                f"train.global_batch_size: {self.global_batch_size} is not divisible by train.micro_batch_size "
                f"{self.micro_batch_size} x {self.ranks} data ranks; use {self.samples_per_round}"
            )

    @property
    def samples_per_round(self) -> int:
        """Number of samples in one micro-batch of every rank."""
        return self.micro_batch_size * self.ranks


class Stream(Protocol):
    """The micro-batches of one rank, with a position that is saved in checkpoints.

    `position` is the number of samples yielded over all ranks. A batch is counted when it is yielded, so that a state
    taken between two steps describes the consumed batches, however many batches the workers have prefetched.
    """

    position: int

    @property
    def samples_per_epoch(self) -> int | None:
        """Number of samples per epoch, over all ranks; None if the source does not know it."""

    @property
    def tokens_per_epoch(self) -> int | None:
        """Number of tokens per epoch, over all ranks; None if the source does not know it."""
        return None

    @property
    def epoch(self) -> float:
        """Number of epochs completed so far, as a fraction."""

    @property
    def channels(self) -> Sequence[str]:
        """Names of the channels that losses are reported in; empty for a single one."""
        return ()

    def __iter__(self) -> Iterator[Any]:
        """Yield `Batch` objects from `position`: endlessly for training; for validation one epoch from the start.

        Every rank yields the same number of validation batches; rows that fill the last batch have ignored labels only.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch that was yielded, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            UserError: if the state belongs to different data.
        """

    def report(self) -> dict[str, Any]:
        """Return the counts of skipped rows so far, as JSON values; empty if rows are not counted while streaming."""
        return {}

    def close(self) -> None:
        """Stop the worker processes, if any."""


class DataModule(ABC):
    """The data of a run.

    Its methods are called in order: check_files, connect, prepare_data (on rank 0 first), setup, streams.
    """

    answers_per_sample: ClassVar[int] = 1
    """Number of documents of a sample; each may have train.max_seq_length tokens."""

    @abstractmethod
    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Set the tokenizer, the micro-batch size in samples and the sample length in tokens."""

    def set_objective(self, objective: str) -> None:
        """Set the objective of the run, a row of the table in `train.run`.

        Raises:
            UserError: if the data does not have what it needs; by default the data is text.
        """
        if objective != "next_token":
            raise UserError(
                f"data: {type(self).__name__} has no preferences; set data: Preferences, or use litgpt finetune"
            )

    def check_files(self, *, has_tokenizer: bool) -> None:  # noqa: B027 - optional
        """Check, before anything is loaded, that the user's files exist and that text has a tokenizer.

        Raises:
            UserError: naming the key.
        """

    def prepare_data(self) -> None:  # noqa: B027
        """Download and tokenize the data. Called on rank 0 first, then on the other ranks."""

    def setup(self, stage: str = "") -> None:  # noqa: B027
        """Open the prepared data on every rank."""

    def training_documents(self) -> Iterable[str]:
        """Yield the documents of the training text, to train a tokenizer on.

        Raises:
            UserError: if the data is not text.
        """
        raise UserError(f"data: {type(self).__name__} has no text to train a tokenizer on; set tokenizer_dir")

    def encode_example_prompt(self, which: Literal["first", "random"] | int, seed: int) -> list[int]:  # noqa: ARG002
        """Return the token ids of the prompt of one training example, to generate an answer for; empty if none has one.

        Args:
            which: the first example, a random one, or an index.
            seed: seed of the random choice.
        """
        return []

    def list_outputs(self) -> dict[str, Path]:
        """Return the folders that `prepare_data` writes to, by the key that sets each; empty if it writes nothing."""
        return {}

    def report(self) -> dict[str, Any]:
        """Return the counts of skipped rows by reason, as JSON values; empty if the data has no rows."""
        return {}

    def prompt_files(self) -> dict[str, str] | None:
        """Return the files of the prompt format of the data, text by name, for the folders of the trained model.

        They replace all files of the tokenizer's folder that hold a prompt format; None keeps those.
        """
        return None

    @abstractmethod
    def train_stream(self, shape: BatchShape) -> Stream:
        """Return the endless training stream of this rank."""

    @abstractmethod
    def val_stream(self, shape: BatchShape) -> Stream | None:
        """Return the validation stream of this rank, which yields one epoch; None without validation data."""
