"""Prediction layers against those of transformers, which runs them to draft tokens."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import MtpModel

from litgpt.model.gpt import GPT, compute_logits
from litgpt.store.load_model import load_config, load_model
from litgpt.store.save_model import save_model_folder
from tests.store.models import random_model, weights
from tests.store.test_prediction_layers import CONFIGS


def draft(model: transformers.PreTrainedModel, hidden_BTD: Tensor, ids: Tensor) -> list[Tensor]:
    """The logits of both prediction layers of transformers; ids and positions are those of later tokens."""
    predictions, logits = MtpModel.from_pretrained(model), []
    for layer in range(2):
        rows = ids.roll(-1 - layer, 1)
        positions = torch.arange(ids.shape[1])[None] + 1 + layer
        hidden_BTD = predictions.forward_layer(layer, hidden_BTD, positions, None, input_ids=rows)
        logits.append(predictions._project_to_logits(hidden_BTD))
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, config=CONFIGS[name], tensors=weights(random_model(CONFIGS[name])))
    model = GPT(load_config(tmp_path)).eval()
    load_model(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="float32", attn_implementation="eager", experts_implementation="eager"
    )
    # by default the numbers of the layers of published models
    reference._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23]\..*"]
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = reference(ids, output_hidden_states=True)
        expected = [output.logits, *draft(reference, output.hidden_states[-1], ids)]
        later = [(ids.roll(-1 - layer, 1), compute_logits) for layer in range(2)]
        actual = model(ids, predictions=later)
    for own, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
