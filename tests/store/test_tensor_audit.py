"""The audit of a folder's tensors: what is unknown, missing or there twice."""

from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.model.names import build_name_table
from litgpt.store.tensor_audit import audit_source
from tests.store.models import as_source, random_model, small, weights

SHAPE: dict[str, Any] = {"n_expert": 3, "n_expert_per_token": 2, "intermediate_size": 16, "n_layer": 1}
DOWN = "blocks.0.mlp.experts.down"


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ((0, 1), rf"lacks {DOWN}\[2\]"),
        ((0, 1, 2, 3), r"blocks\.0\.e\.3: no tensor of this name"),
        ((0, 1, 2, None), rf"blocks\.0\.e and blocks\.0\.e\.0 both hold {DOWN}"),
        ((0, 1, 2), ""),
        ((None,), ""),
    ],
)
def test_an_expert_missing_or_too_many_is_refused(experts: tuple[int | None, ...], message: str) -> None:
    config = small("Mixtral-8x7B-v0.1", **SHAPE)
    tensors = weights(random_model(config))
    lines = {name: name for name in tensors if name != DOWN}
    stack = "blocks.<i>.mlp.experts.down"
    table = build_name_table("t", {**lines, "blocks.<i>.e.<e>": stack, "blocks.<i>.e": stack})
    down = tensors.pop(DOWN)
    for expert in experts:
        tensors |= {"blocks.0.e": down} if expert is None else {f"blocks.0.e.{expert}": down[0]}
    audit = audit_source(as_source(tensors), table, config)
    assert audit.is_clean == (not message)
    if message:
        with pytest.raises(UserError, match=message):
            audit.check()
    else:
        audit.check()


def test_a_tensor_of_a_layer_that_the_model_does_not_have_is_unknown() -> None:
    config = small("Llama-2-7b-hf")
    tensors = weights(random_model(config))
    audit = audit_source(as_source({**tensors, "blocks.9.norm_1.weight": torch.ones(32)}), None, config)
    assert audit.unknown == ["blocks.9.norm_1.weight"] and not audit.missing and len(audit.tensors) == len(tensors)
