"""Small random models of several families, and helpers of the tests of store."""

from pathlib import Path

import torch
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import NameTable, to_hf_names
from litgpt.model.registry import load_litgpt_table
from litgpt.store.load_model import load_model, stack_experts
from litgpt.store.published_tensor import PublishedTensor
from litgpt.store.weight_files import WeightSource

SMALL = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "block_size": 32,
    "vocab_size": 50,
    "padded_vocab_size": 64,
    "intermediate_size": 48,
}
MODELS = {
    "gpt_neox": "pythia-14m",
    "llama": "Llama-2-7b-hf",
    "llama3": "Llama-3.2-1B",
    "qwen2": "Qwen2.5-0.5B",
    "qwen3": "Qwen3-0.6B",
    "gemma": "Gemma-2b",
}


def small(name: str, **changes: object) -> Config:
    grouped = {} if name == "pythia-14m" else {"n_query_groups": 2}
    head = {"head_size": 8}
    return Config.from_name(name, **{**SMALL, **head, "n_query_groups": None, **grouped, **changes})


def random_model(config: Config, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_loads(folder: Path, model: GPT) -> None:
    loaded = random_model(Config.from_checkpoint(folder), seed=1)
    load_model(loaded, folder)
    expected = weights(model)
    assert weights(loaded).keys() == expected.keys()
    for name, tensor in weights(loaded).items():
        assert torch.equal(tensor, expected[name]), name


def lit_state(model: GPT) -> dict[str, Tensor]:
    state = to_hf_names(load_litgpt_table(), weights(model), model.config)
    return state | {"lm_head.weight": model.output_weight.detach()}


def as_source(tensors: dict[str, Tensor]) -> WeightSource:
    """Published tensors in memory as a source."""
    return WeightSource(Path("memory"), list(tensors), lambda name: tensors[name].to("meta"), tensors.__getitem__)


def to_our_names(table: NameTable, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A published state dict under our names, which need not be all of a model's; without a head that is tied."""
    names = [name for name in tensors if not table.get_skip_reason(name, config)]
    mappings = [mapping for name in names if (mapping := table.map_hf_name(name, config))]
    assert len(mappings) == len(names), "a tensor without a rule"
    published = [
        PublishedTensor(as_source(tensors), mapping, config, {})
        for mapping in mappings
        if not (config.tie_embeddings and mapping.names == ("head.weight",))
    ]
    return dict(stack_experts(published, config.n_expert))
