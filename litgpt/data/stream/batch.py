"""One micro batch: tokens, labels, and document boundaries; and how samples are collated to one."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt.data.render.example import Example
from litgpt.errors import UserError
from litgpt.model.feature_order import take_order
from litgpt.model.media import Media, Sounds, build_empty_media

IGNORE = -100
"""The label of a token that is not a target: excluded from the loss and not counted."""
ANSWER_TITLES = {"margin": ("chosen", "rejected"), "desirable": ("rated answer", "mismatched answer")}
"""What the two answers of a sample are, by the name of their number."""
BatchArrays = dict[str, np.ndarray]
"""A micro batch as worker processes return it; `to_batch` converts it to a Batch."""


@dataclass
class Batch:
    """One micro batch of one rank.

    Args:
        ids: (B, T) int64 input tokens.
        labels: (B, T) int64, the token after each, already shifted; `IGNORE` where there is no target.
        documents: (B, T) int32 number of the document within the row that each token belongs to, if attention is
            confined to documents; otherwise None. -1 is padding.
        positions: (B, T) int64 position of each token in its document; None means 0 .. T-1. (B, 3, T), of time, row and
            column, in a batch with images of a model with `rope_sections`.
        weights: (B, T) float32 factor of each label's loss, 0 where it is ignored; None means 1.
        channels: (B, T) int32 number of the channel that each label's loss is reported in; None means one channel.
        answers: (B, T) int32 number of the answer in the micro batch that each token belongs to, if answers are scored
            as a whole; otherwise None. -1 is padding. Answers 2 i and 2 i + 1 belong to sample i.
        answer_values: values of each answer, (A,) each, by name.
        token_values: (B, T) float32 values of each label by name, for a loss of the user's own; 0 for padding.
        later_tokens: (K, B, T) the `ids`, `labels` and `weights` of later tokens, by name, for K prediction layers;
            None without them.
        media: the images or sounds at the places of their token in `ids`, row by row; None without any.
    """

    ids: Tensor
    labels: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None
    weights: Tensor | None = None
    channels: Tensor | None = None
    answers: Tensor | None = None
    answer_values: dict[str, Tensor] | None = None
    token_values: dict[str, Tensor] | None = None
    later_tokens: dict[str, Tensor] | None = None
    media: Media | None = None

    @property
    def targets(self) -> int:
        """Number of labels that are targets."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return self.ids.numel() if self.documents is None else int((self.documents >= 0).sum())

    def select_answers(self, selected: Tensor) -> "Batch":
        """Select some answers, (A,) bool, as documents in one row."""
        assert self.answers is not None
        tokens = (self.answers >= 0) & selected[self.answers.clamp(min=0).long()]
        numbers = (selected.cumsum(0) - 1).int()[self.answers[tokens].long()][None]
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        rows = {name: getattr(self, name) for name in ("ids", "labels", "weights", "channels")}
        values = {name: value[selected] for name, value in (self.answer_values or {}).items()}
        media = None if self.media is None else self.media.select_answers(selected.nonzero()[:, 0].tolist())
        in_place = positions.transpose(-1, -2) if positions.dim() == 3 else positions
        taken: dict[str, Any] = {name: None if row is None else row[tokens][None] for name, row in rows.items()}
        return Batch(
            **taken,
            positions=in_place[tokens].transpose(0, -1)[None],
            documents=numbers,
            answers=numbers,
            answer_values=values,
            media=media,
        )

    def without_targets(self) -> "Batch":
        """The batch with all labels ignored."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to a device."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(tensor) for name, tensor in value.items()}
            return None if value is None else value.to(device, non_blocking=True)

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


def to_batch(arrays: BatchArrays, *, trained: int | None = None) -> Batch:
    """Convert arrays to a Batch; `tokens` (B, T+1) are split into ids and labels (B, T).

    Args:
        trained: number of samples whose labels count, from the first; the labels of the others are ignored.

    Raises:
        UserError: the error that reading the samples raised in a worker.
    """
    arrays = dict(arrays)
    if "error" in arrays:
        raise UserError(str(arrays["error"]))
    sample_ends = arrays.pop("sample_ends", None)
    tokens = arrays.pop("tokens", None)
    media = pop_media(arrays)
    arrays.pop("unreadable", None)  # a count for the stream
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if tokens is not None:
        rows = torch.from_numpy(tokens.astype(np.int64))
        tensors |= {"ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
    values = {name: tensors.pop(name) for name in ANSWER_TITLES if name in tensors}
    batch = Batch(**tensors, media=media, answer_values=values if "answers" in tensors else None)
    if trained is not None and sample_ends is None and batch.answers is None:
        batch.labels[trained:] = IGNORE
    elif trained is not None and batch.answers is not None:
        batch.labels[batch.answers >= 2 * trained] = IGNORE
    elif trained is not None and sample_ends is not None and trained < len(sample_ends):
        batch.labels[:, int(sample_ends[trained - 1]) if trained else 0 :] = IGNORE  # the samples share one row
    return batch


def pop_media(arrays: BatchArrays) -> Media | None:
    """Remove the arrays of images, videos and sounds, and return these; None without any."""
    names = ("patches", "grids", "uses", "image_answers")
    patches, grids, uses, answers = (arrays.pop(name, None) for name in names)
    sounds = pop_sounds(arrays)
    order = take_order(arrays)
    if patches is None and sounds is None:
        return None
    media = build_empty_media()
    if patches is not None and grids is not None:
        media = Media(torch.from_numpy(patches), tuple((t, h, w) for t, h, w in grids.tolist()), order=order)
    if uses is not None and answers is not None:
        media = replace(media, uses=uses.tolist(), answers=answers.tolist())
    return replace(media, sounds=sounds)


def pop_sounds(arrays: BatchArrays) -> Sounds | None:
    """Remove the arrays of sounds, and return these; None without any."""
    names = ("frames", "lengths", "sound_uses", "sound_answers", "sound_counts")
    frames, lengths, uses, answers, counts = (arrays.pop(name, None) for name in names)
    if frames is None or lengths is None:
        return None
    sounds = Sounds(torch.from_numpy(frames), tuple(lengths[:, 0].tolist()))
    if uses is None or answers is None or counts is None:
        return sounds
    return replace(sounds, uses=uses.tolist(), answers=answers.tolist(), counts=tuple(counts.tolist()))


def collate_rows(
    rows: Sequence[Sequence[Example]],
    *,
    padding: bool,
    weighted: bool,
    channels: Sequence[str],
    values: str | None = None,
) -> BatchArrays:
    """Collate rows of samples: concatenated in one row with the `sample_ends` of each, or padded.

    Args:
        padding: stack the rows, padded on the right.
        weighted: include the weights of labels.
        channels: the names of the numbers in `channels`; empty to leave them out.
        values: the name of the numbers that belong to answers, which are then numbered; None for samples that are
            single documents.
    """
    if values is not None:
        return _collate_answers(rows, values, padding=padding, weighted=weighted, channels=channels)
    sizes = [sum(len(example.ids) for example in row) for row in rows]
    if padding:
        padded = [_concatenate(row, max(sizes), weighted, channels) for row in rows]
        return {name: np.concatenate([arrays[name] for arrays in padded]) for name in padded[0]}
    arrays = _concatenate([example for row in rows for example in row], sum(sizes), weighted, channels)
    if sum(map(len, rows)) == 1:  # one sample needs no mask
        del arrays["documents"], arrays["positions"]
    return arrays | {"sample_ends": np.cumsum(sizes)}


def _collate_answers(
    rows: Sequence[Sequence[Example]], values: str, *, padding: bool, weighted: bool, channels: Sequence[str]
) -> BatchArrays:
    """Collate rows of samples of two answers each: every answer is a document, in a row of its own if padded."""
    samples = [sample for row in rows for sample in row]
    answers = [answer for sample in samples for answer in sample.documents]
    arrays = collate_rows([[answer] for answer in answers], padding=padding, weighted=weighted, channels=channels)
    documents = arrays["documents"]
    numbers = np.arange(len(answers), dtype=np.int32)[:, None] if padding else documents
    arrays["answers"] = np.where(documents >= 0, numbers, -1).astype(np.int32)
    return arrays | {values: np.repeat(np.array([sample.value for sample in samples], np.float32), 2)}


def _concatenate(examples: Sequence[Example], total: int, weighted: bool, channels: Sequence[str]) -> BatchArrays:
    """Concatenate samples to one row (1, total), padded on the right."""
    arrays: BatchArrays = {
        "ids": np.zeros((1, total), np.int64),
        "labels": np.full((1, total), IGNORE, np.int64),
        "documents": np.full((1, total), -1, np.int32),
        "positions": np.zeros((1, total), np.int64),
    }
    if weighted:
        arrays["weights"] = np.zeros((1, total), np.float32)
    if channels:
        arrays["channels"] = np.zeros((1, total), np.int32)
    start = 0
    for number, example in enumerate(examples):
        size = len(example.ids)
        tokens = np.s_[0, start : start + size]
        shifted = np.s_[0, start : start + size - 1]  # the last token has no next one
        arrays["ids"][tokens] = example.ids
        arrays["labels"][shifted] = np.where(example.weights[1:] > 0, example.ids[1:], IGNORE)
        arrays["documents"][tokens] = number
        arrays["positions"][tokens] = np.arange(size)
        if weighted:
            arrays["weights"][shifted] = example.weights[1:]
        if channels:
            arrays["channels"][tokens] = channels.index(example.channel or "default")
        start += size
    return arrays
