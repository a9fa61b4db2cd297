"""LLaMA-Pro: inserted blocks start as the identity, only they are trained, and transformers loads the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import llama_pro
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import LLaMAPro
from litgpt.store.load_model import load_config, load_model
from litgpt.store.save_model import save_model_folder
from tests.adapt.models import IDS, copy_base, train_steps
from tests.store.models import random_model, small, weights

EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama-3.2-1B", {}),
    "biases, side by side": ("pythia-14m", {}),
    "norms after": ("Gemma-2-2b", {"sliding_window_indices": [1, 0, 1, 0], "sliding_window_size": 4}),
    "norms after alone": ("OLMo-2-0425-1B", {}),
    "windows": (
        "Gemma-3-1b-pt",
        {"sliding_window_indices": [1, 1, 0, 1], "sliding_window_size": 4, "rope_indices": [1, 1, 0, 1]},
    ),
    "experts with biases": ("gpt-oss-20b", {"n_expert": 4, "sliding_window_size": 4, "rope_adjustments": None}),
    "dense at first": (
        "DeepSeek-V3",
        {**EXPERTS, "first_k_dense_replace": 1, "n_expert_groups": 2, "n_topk_groups": 1, "latent_attention": LATENT}
        | {"n_query_groups": 4, "rope_adjustments": None},
    ),
}  # fmt: skip


def base(case: str) -> GPT:
    name, changes = CASES[case]
    return random_model(small(name, **{"n_layer": 4, **changes})).double()


def build_expanded(model: GPT, settings: LLaMAPro) -> GPT:
    """The expanded model with the weights of its base, as in a run."""
    config = llama_pro.expand_config(model.config, settings)
    grown = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.fill_(float("nan"))
    adapt.attach(grown, settings)
    order = settings.get_block_order(model.config.n_layer)
    llama_pro.load_expanded(grown, model.named_parameters(), order)
    return grown


@pytest.mark.parametrize("case", CASES)
def test_initial_logits_equal_the_base_and_steps_change_only_inserted_blocks(case: str) -> None:
    model = base(case)
    grown = build_expanded(model, LLaMAPro(new_blocks=2))
    assert grown.config.n_layer == 6 and not any(value.isnan().any() for value in grown.parameters())
    assert torch.equal(grown(IDS), model(IDS))
    own = {0: 0, 1: 1, 3: 2, 4: 3, 6: 4}  # the last is a prediction layer
    first = copy_base(grown)
    for name, value in weights(model).items():
        moved = name
        for place, layer in own.items():
            moved = f"blocks.{place}.{name.split('.', 2)[2]}" if name.startswith(f"blocks.{layer}.") else moved
        assert torch.equal(first[moved], value), name
    losses = train_steps(grown, lambda: grown(IDS), 3)
    assert losses[-1] < losses[0]
    now = copy_base(grown)
    changed = {name for name in now if not torch.equal(now[name], first[name])}
    trained = {name for name, value in grown.named_parameters() if value.requires_grad}
    assert (
        changed
        == trained
        == {name for name in now if name.startswith(("blocks.2.", "blocks.5.")) and "correction" not in name}
    )


def test_blocks_are_inserted_after_each_group() -> None:
    assert LLaMAPro(new_blocks=2).get_block_order(4) == [
        (0, False), (1, False), (1, True), (2, False), (3, False), (3, True)
    ]  # fmt: skip
    assert LLaMAPro(new_blocks=4, groups=2).get_block_order(4) == [
        (0, False), (1, False), (0, True), (1, True), (2, False), (3, False), (2, True), (3, True)
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["llama", "biases, side by side", "norms after", "windows"])
def test_transformers_loads_the_expanded_model(case: str, tmp_path: Path) -> None:
    model = base(case)
    grown = build_expanded(model, LLaMAPro(new_blocks=2))
    train_steps(grown, lambda: grown(IDS), 2)
    save_model_folder(
        tmp_path / "grown", config=grown.config, tensors=dict(adapt.merge_adapter(grown)), dtype=torch.float32
    )
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["num_hidden_layers"] == 6
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    scores: Tensor = loaded(IDS).logits
    assert (scores - grown.float()(IDS)).abs().max() < 1e-4
    assert (scores - model.float()(IDS)).abs().max() > 1e-2
    again = GPT(load_config(tmp_path / "grown")).eval()
    load_model(again, tmp_path / "grown")
    assert torch.equal(again(IDS), grown(IDS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new_blocks": 3}, r"tuner.groups: 4 and 3 new blocks are not divisible by 3; set 1"),
        ({"new_blocks": 4, "groups": 3}, r"tuner.groups: 4 and 4 new blocks are not divisible by 3; set 1 or 2 or 4"),
        ({"new_blocks": 5}, r"tuner.new_blocks: 5 is more than the model's 4 blocks; set at most 4"),
    ],
)
def test_groups_that_are_not_divisible_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llama_pro.expand_config(small("Llama-3.2-1B", n_layer=4), LLaMAPro(**settings))
