"""A dataset of instructions and its collation, for the data modules of LitGPT's users."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from litgpt.data.render.prompt_styles import PromptStyle, parse_style
from litgpt.data.stream.batch import IGNORE
from litgpt.data.tokenizer import Tokenizer

SFTSample = dict[str, Any]


class SFTDataset(Dataset):
    """Instructions and answers, formatted and tokenized when they are read.

    An item holds `input_ids` and `labels`, both (T,) int64 and not shifted, and `token_counts`: `raw` of instruction
    and answer, `raw_plus_prompt_template` of the whole sample.

    Args:
        data: rows of `instruction`, `output` and other columns that the style uses, such as `input`.
        prompt_style: a style, or the name of one.
        max_seq_length: samples are cut to this many tokens, from the right; -1 for no limit.
        mask_prompt: exclude the prompt from the loss.
        ignore_index: the label of a token that is excluded.
        transform: called with each row before it is formatted.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        prompt_style: str | PromptStyle,
        max_seq_length: int = -1,
        mask_prompt: bool = True,
        ignore_index: int = IGNORE,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.prompt_style = parse_style(prompt_style)
        self.max_seq_length = max_seq_length
        self.mask_prompt = mask_prompt
        self.ignore_index = ignore_index
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> SFTSample:
        row = self.data[index] if self.transform is None else self.transform(self.data[index])
        limit = self.max_seq_length
        prompt = self.prompt_style.apply(prompt=row["instruction"], **row)
        prompt_ids = self.tokenizer.encode(prompt, max_length=limit)
        answer_ids = self.tokenizer.encode(row["output"], bos=False, eos=True, max_length=limit)
        ids = torch.cat((prompt_ids, answer_ids)).to(torch.int64)
        ids = ids[:limit] if limit > 0 else ids
        labels = ids.clone()
        if self.mask_prompt:
            labels[: len(prompt_ids)] = self.ignore_index
        raw = len(self.tokenizer.encode(row["instruction"], max_length=limit)) + len(answer_ids)
        return {
            "input_ids": ids,
            "labels": labels,
            "token_counts": {"raw": raw, "raw_plus_prompt_template": len(ids)},
        }


def get_sft_collate_fn(
    max_seq_length: int = -1, pad_id: int = 0, ignore_index: int = IGNORE
) -> Callable[[list[SFTSample]], dict[str, Any]]:
    """Return the function that collates items of `SFTDataset` to tensors (B, T), padded at the right to the longest.

    Args:
        max_seq_length: T is at most this; -1 for no limit.
        pad_id: the token of the padding.
        ignore_index: the label of the padding.
    """
    return partial(collate_samples, max_seq_length=max_seq_length, pad_id=pad_id, ignore_index=ignore_index)


def collate_samples(
    samples: list[SFTSample], max_seq_length: int, pad_id: int, ignore_index: int
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Collate samples to `input_ids` and `labels`, (B, T), and `token_counts`, each (B, 1)."""
    batch: dict[str, Any] = {}
    for name, padding in (("input_ids", pad_id), ("labels", ignore_index)):
        rows = pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=padding)
        batch[name] = rows[:, :max_seq_length] if max_seq_length > 0 else rows
    counts = [sample["token_counts"] for sample in samples]
    batch["token_counts"] = {name: torch.tensor([[count[name]] for count in counts]) for name in counts[0]}
    return batch
