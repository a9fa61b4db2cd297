"""The prompts of a micro-batch: what is before the first target of each document."""

import torch

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.train.local_batch import find_prompts

IDS = torch.arange(8)[None]
LABELS = torch.where(torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0]]).bool(), IDS + 1, IGNORE)


def test_a_prompt_ends_where_the_first_target_is_predicted() -> None:
    assert find_prompts(Batch(IDS, LABELS)).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert find_prompts(Batch(IDS, IDS)).int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]
    assert find_prompts(Batch(IDS, LABELS).without_targets()).all()


def test_each_document_has_its_prompt() -> None:
    rows, documents = IDS.expand(2, -1), torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 1, 2, 2, 2]])
    prompts = find_prompts(Batch(rows, LABELS.expand(2, -1), documents=documents))
    assert prompts.int().tolist() == [[1, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0]]
