"""Data modules and streams for any dataloader, such as those of LitGPT users: of tokens, or of tokens and labels."""

import itertools
import signal
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.errors import UserError
from litgpt.recipe import data as recipe
from litgpt.recipe.data import BatchShape, Stream


class DataModule(recipe.DataModule):
    """Base class of custom data modules: implement `train_dataloader` and, for validation, `val_dataloader`.

    Each yields integer tensors of shape (B, max_seq_length + 1), where B is the `batch_size` given to `connect`; or,
    for finetuning, dictionaries of `input_ids` and `labels` as of `get_sft_collate_fn`: both (B, T) and not shifted,
    with negative labels for tokens that are excluded from the loss. A loader over a map-style dataset is sharded over
    the ranks here; an iterable dataset must do that itself.
    """

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Set the tokenizer, the micro-batch size in samples and the sample length in tokens."""
        self.tokenizer, self.batch_size, self.max_seq_length = tokenizer, batch_size, max_seq_length

    @abstractmethod
    def train_dataloader(self) -> Any:
        """Return a loader of the training batches of one epoch."""

    def val_dataloader(self) -> Any:
        """Return a loader of the validation batches; None for no validation."""
        return None

    def train_stream(self, shape: BatchShape) -> Stream:
        """Stream the micro batches of this rank, epoch after epoch of `train_dataloader`."""
        return LoaderStream(self.train_dataloader, shape)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """Stream one pass over `val_dataloader` for this rank; None without one."""
        loader = self.val_dataloader()
        if isinstance(loader, list | tuple):
            loader = loader[0] if loader else None
        return None if loader is None else LoaderStream(lambda: loader, shape, repeat=False)


class LoaderStream(Stream):
    """The batches of a dataloader, epoch after epoch, with a position that can be saved.

    A loader with `state_dict` (litdata's, torchdata's) resumes from its own state; any other by skipping the consumed
    batches of the epoch. A map-style dataset is sharded over the ranks in an order given by (seed, epoch): rank r of R
    takes samples r, r + R, ...; training drops the last samples of an epoch that cannot be divided evenly.

    Args:
        open_loader: opens the loader.
        shape: this rank's part of the batches.
        repeat: endlessly, for training; or one pass, for validation, in which rank r takes batches r, r + R, ...
    """

    def __init__(self, open_loader: Callable[[], Any], shape: BatchShape, *, repeat: bool = True) -> None:
        self.position = 0
        self._shape, self._repeat = shape, repeat
        self._passes, self._batches = 0, 0  # completed epochs, and batches of this rank in the current one
        self._loader = open_loader()
        if repeat and _is_map_style(self._loader):
            self._loader = _distribute(self._loader, shape)
        self._restored: dict[str, Any] | None = None

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples of full batches over all ranks, if the loader has a length."""
        try:
            batches = len(self._loader)
        except TypeError:
            return None
        ranks = 1 if not self._repeat and _is_map_style(self._loader) else self._shape.ranks
        return batches * ranks * self._shape.micro_batch_size

    @property
    def epoch(self) -> float:
        """Passes over the data; only completed ones if the loader has no length."""
        samples = self.samples_per_epoch
        consumed = self._batches * self._shape.samples_per_round
        return self._passes + (min(1.0, consumed / samples) if samples else 0.0)

    def __iter__(self) -> Iterator[Batch]:
        if not self._repeat:
            yield from self._iterate_once()
            return
        while True:
            skipped = self._batches
            for raw in self._resume_epoch():
                batch = self._to_batch(raw)
                self._batches += 1
                self.position += batch.ids.shape[0] * self._shape.ranks
                yield batch
            if self._batches == skipped == 0:
                raise UserError("data: the dataloader yields no batch; add data, or yield smaller batches")
            self._passes, self._batches = self._passes + 1, 0

    def _resume_epoch(self) -> Iterator[Any]:
        """Iterate over the batches of the current epoch that are not consumed yet."""
        if isinstance(sampler := getattr(self._loader, "sampler", None), DistributedSampler):
            sampler.set_epoch(self._passes)
        state, self._restored = self._restored, None
        if state is not None and hasattr(self._loader, "load_state_dict"):
            self._loader.load_state_dict(state)
            return iter(self._loader)
        return itertools.islice(self._loader, self._batches, None)

    def _iterate_once(self) -> Iterator[Batch]:
        self.position = 0
        readers = self._shape.ranks if _is_map_style(self._loader) else 1
        batches = map(self._to_batch, self._loader)
        while group := list(itertools.islice(batches, readers)):
            index = self._shape.rank % readers
            batch = group[index] if index < len(group) else group[0].without_targets()
            self.position += sum(other.ids.shape[0] for other in group) * (self._shape.ranks // readers)
            yield batch

    def _to_batch(self, raw: Any) -> Batch:
        if isinstance(raw, Mapping):
            ids, labels = (self._cut_rows(raw.get(name), f"{name}: ") for name in ("input_ids", "labels"))
            if ids.shape != labels.shape:
                shapes = f"input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)}"
                raise UserError(f"data: {shapes} differ in shape; yield a label for every token")
        else:
            ids = labels = self._cut_rows(raw)
        labels = labels[:, 1:]
        return Batch(ids=ids[:, :-1].contiguous(), labels=torch.where(labels < 0, IGNORE, labels))

    def _cut_rows(self, raw: Any, name: str = "") -> Tensor:
        is_valid = isinstance(raw, Tensor) and raw.ndim == 2 and not raw.is_floating_point() and raw.shape[1] >= 2
        if not is_valid:
            kind = f"{raw.dtype} of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
            raise UserError(
                f"data: the dataloader yields {name}{kind}; yield (B, T+1) integer tensors, or input_ids and labels"
            )
        return raw[:, : self._shape.max_seq_length + 1].to(torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Position, epoch, batch of the epoch, number of ranks, and the loader's own state if it has one."""
        state = {"position": self.position, "passes": self._passes, "batches": self._batches}
        state |= {"ranks": self._shape.ranks, "micro_batch_size": self._shape.micro_batch_size}
        if hasattr(self._loader, "state_dict") and hasattr(self._loader, "load_state_dict"):
            state["loader"] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was saved.

        Raises:
            UserError: if it was saved with another number of ranks or another micro batch size.
        """
        for name, now in (("ranks", self._shape.ranks), ("micro_batch_size", self._shape.micro_batch_size)):
            if state.get(name) != now:
                raise UserError(
                    f"data: the state of this dataloader was saved with {name} {state.get(name)}, not {now}; resume "
                    f"with {state.get(name)} (TextFiles and local LitData can be resumed with any)"
                )
        self.position, self._passes, self._batches = state["position"], state["passes"], state["batches"]
        self._restored = state.get("loader")
        if self._restored and isinstance(counts := self._restored.get("num_samples_yielded"), dict):
            # litdata's keys are the numbers of its workers, which JSON converts to text
            self._restored = self._restored | {"num_samples_yielded": {int(key): counts[key] for key in counts}}

    def close(self) -> None:
        """Release the loader and its workers."""
        self._loader = ()


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _distribute(loader: DataLoader, shape: BatchShape) -> DataLoader:
    """Replace the sampler by one whose order depends on seed, epoch and rank only."""
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    if not isinstance(loader.sampler, RandomSampler | SequentialSampler):
        if shape.ranks > 1:
            kind = type(loader.sampler).__name__
            raise UserError(f"data: {kind} cannot be sharded over {shape.ranks} ranks; use a DistributedSampler")
        return loader
    shuffle = isinstance(loader.sampler, RandomSampler)
    sampler: DistributedSampler = DistributedSampler(
        loader.dataset, shape.ranks, shape.rank, shuffle=shuffle, seed=shape.seed, drop_last=shape.ranks > 1
    )
    names = (
        *("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last"),
        *("prefetch_factor", "persistent_workers"),
    )
    return DataLoader(
        loader.dataset,
        sampler=sampler,
        worker_init_fn=partial(start_worker, loader.worker_init_fn),
        generator=torch.Generator(),
        **{name: getattr(loader, name) for name in names},
    )


def start_worker(init_fn: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a worker: signals that reach the whole process group are handled by the parent alone."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if init_fn is not None:
        init_fn(worker)
