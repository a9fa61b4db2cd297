"""Pairs of answers for tests: a tiny model, batches of pairs in any arrangement, and scores from all logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.precision import PRECISIONS
from litgpt.train.reference import Reference, copy_values
from litgpt.train.train_state import TrainState

SHAPE = Config(
    name="toy",
    block_size=64,
    padded_vocab_size=50,
    n_layer=2,
    n_head=2,
    n_embd=12,
    intermediate_size=20,
    mlp_class_name="LLaMAMLP",
    norm_class_name="RMSNorm",
    parallel_residual=False,
    bias=True,
    rotary_percentage=1.0,
)


@dataclass(frozen=True)
class Answer:
    """A prompt with an answer: its tokens, and the weight of each as a label, 0 for the prompt."""

    ids: list[int]
    weights: list[float]


def draw_answers(pairs: int, *, seed: int = 0, weighted: bool = False) -> list[Answer]:
    """Chosen and rejected answers in turn, of different lengths, with the prompt of their pair."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(1, 50, (count,), generator=generator).tolist()

    answers = []
    for _ in range(pairs):
        prompt = draw(2 + draw(1)[0] % 4)
        for _ in range(2):
            tokens = draw(1 + draw(1)[0] % 9)
            weights = [1.0 + index % 2 if weighted else 1.0 for index in range(len(tokens))]
            answers.append(Answer(prompt + tokens, [0.0] * len(prompt) + weights))
    return answers


def collate(answers: Sequence[Answer], *, packed: bool = False, **values: Tensor) -> Batch:
    """A batch of one row per answer, or of one row with all of them and some padding."""
    sizes = [len(answer.ids) for answer in answers]
    shape = (1, sum(sizes) + 3) if packed else (len(answers), max(sizes))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    documents, numbers = torch.full(shape, -1, dtype=torch.int32), torch.full(shape, -1, dtype=torch.int32)
    positions, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    start = 0
    for number, answer in enumerate(answers):
        row, first = (0, start) if packed else (number, 0)
        place = (row, slice(first, first + len(answer.ids)))
        factors = torch.tensor([*answer.weights[1:], 0.0])
        ids[place] = torch.tensor(answer.ids)
        labels[place] = torch.where(factors > 0, torch.tensor([*answer.ids[1:], 0]), IGNORE)
        documents[place] = number if packed else 0
        numbers[place] = number
        positions[place] = torch.arange(len(answer.ids))
        weights[place] = factors
        start += len(answer.ids)
    return Batch(ids, labels, documents, positions, weights, answers=numbers, answer_values=dict(values))


def build_model(seed: int = 0) -> GPT:
    """A model in float64 with weights far from zero."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    initialize(model, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def build_state(model: GPT, reference: nn.Module | None = None) -> TrainState:
    other = None if reference is None else Reference(copy_values(reference, dict(reference.named_parameters())))
    return TrainState(model, [], torch.device("cpu"), PRECISIONS["64-true"], reference=other)


def compute_token_log_probs(model: GPT, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
    """Of the labels of one answer, from all its logits: log p, the log of sum p^2, and the mean of the logits."""
    logits = model(torch.tensor([answer.ids]))[0, :-1]
    kept = torch.tensor(answer.weights[1:]) > 0
    log_probs = logits.log_softmax(-1)
    labels = torch.tensor(answer.ids[1:])
    chosen = log_probs[torch.arange(len(labels)), labels]
    return chosen[kept], log_probs.exp().square().sum(-1).log()[kept], logits.mean(-1)[kept]
