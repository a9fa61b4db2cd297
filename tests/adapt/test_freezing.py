"""Full finetuning freezes the parameters that the settings name; a name that matches nothing is an error."""

import pytest
import torch

from litgpt import adapt
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import Full
from tests.adapt.models import IDS, compute_loss, copy_base, train_steps
from tests.store.models import random_model, small


def trained(settings: Full, **changes: object) -> tuple[GPT, set[str]]:
    model = random_model(small("Llama-3.2-1B", n_layer=4, tie_embeddings=False, **changes))
    adapt.attach(model, settings)
    return model, {name for name, value in model.named_parameters() if value.requires_grad}


def names(*starts: str) -> set[str]:
    model = GPT(small("Llama-3.2-1B", n_layer=4, tie_embeddings=False))
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


EVERYTHING = ("embedding", "blocks", "norm", "head")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Full(), names(*EVERYTHING)),
        (Full(freeze_parameters=["blocks.1", "head"]), names("embedding", "blocks.0", "blocks.2", "blocks.3", "norm")),
        (
            Full(freeze_parameters=["model.layers.1", "lm_head"]),
            names("embedding", "blocks.0", "blocks.2", "blocks.3", "norm"),
        ),
        (
            Full(freeze_parameters_regex=r"attention\.[qkv]\.|embed_tokens"),
            names(*EVERYTHING)
            - {"embedding.weight"}
            - {f"blocks.{i}.attention.{part}.weight" for i in range(4) for part in "qkv"},
        ),
        (Full(freeze_parameters_ratio=1.0, trainable_parameters=["norm"]), {"norm.weight"}),
        (
            Full(freeze_parameters_ratio=1.0, trainable_parameters_regex="self_attn.o_proj"),
            {f"blocks.{i}.attention.out.weight" for i in range(4)},
        ),
        (
            Full(freeze_parameters=["blocks"], trainable_parameters=["blocks.3"]),
            names("embedding", "blocks.3", "norm", "head"),
        ),
        (Full(freeze_parameters_ratio=0.05), names(*EVERYTHING)),
        (Full(freeze_parameters_ratio=0.0585), names("blocks", "norm", "head")),
        (Full(freeze_parameters_ratio=0.941), {"norm.weight", "head.weight"}),
    ],
)
def test_freezing(settings: Full, expected: set[str]) -> None:
    assert trained(settings)[1] == expected


def test_a_tied_embedding_is_counted_once_and_frozen_first() -> None:
    model = random_model(small("Llama-3.2-1B", n_layer=4, tie_embeddings=True))
    share = model.embedding.weight.numel() / sum(value.numel() for value in model.parameters())
    adapt.attach(model, Full(freeze_parameters_ratio=share + 1e-4))
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == {"embedding.weight"}


def test_steps_change_trained_parameters_and_no_bit_of_frozen_ones() -> None:
    model, expected = trained(Full(freeze_parameters=["embedding", "blocks.0"]))
    before = copy_base(model)
    train_steps(model, lambda: model(IDS), 3)
    after = copy_base(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    compute_loss(model(IDS)).backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze_parameters": ["blocks.9"]},
            "tuner.freeze_parameters: 'blocks.9' matches nothing in this model; .* blocks",
        ),
        (
            {"freeze_parameters_ratio": 0.5, "trainable_parameters": ["model.layer.1"]},
            "closest names are .*model.layers.1",
        ),
        ({"freeze_parameters_regex": "qqq"}, "tuner.freeze_parameters_regex: 'qqq' matches nothing in this model"),
        ({"freeze_parameters_regex": "(blocks"}, "tuner.freeze_parameters_regex: .* is not a regular expression"),
        ({"freeze_parameters_ratio": 1.5}, "tuner.freeze_parameters_ratio: 1.5 is not valid"),
        ({"freeze_parameters_ratio": 1.0}, "every parameter is frozen"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        trained(Full(**settings))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
