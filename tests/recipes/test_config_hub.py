"""Every recipe of the hub parses, says what it is, and holds the values that LitGPT's recipe of that name has."""

import json
from pathlib import Path

import pytest
import torch

from litgpt.adapt import attach
from litgpt.adapt.quantization import quantize
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import Full

HUB = Path(__file__).parents[2] / "config_hub"
PRETRAIN = sorted((HUB / "pretrain").glob("*.yaml"))
FINETUNE = sorted((HUB / "finetune").glob("*/*.yaml"))
ALIGN = sorted((HUB / "align").glob("*.yaml"))
MULTIMODAL = sorted((HUB / "multimodal").glob("*.yaml"))

# out_dir, data, global batch, micro batch, warm-up steps, tokens, length, lr, min_lr, tokenizer, logger
LITGPT = {
    "debug": ("debug", "TinyStories", 125, 5, 100, 10**8, None, 6e-4, 6e-5, "EleutherAI/pythia-14m", "tensorboard"),
    "microllama": (
        *("micro-llama", "MicroLlama", 48, 12, 2000, 3 * 10**12, 2048),
        *(4e-4, 4e-5, "meta-llama/Llama-2-7b-hf", "tensorboard"),
    ),
    "tinyllama": (
        *("tiny-llama", "TinyLlama", 512, 4, 2000, 3 * 10**12, 2048),
        *(4e-4, 4e-5, "meta-llama/Llama-2-7b-hf", "tensorboard"),
    ),
    "tinystories": (
        *("stories15M", "TinyStories", 512, 128, 1000, 9_700_000_000, 256),
        *(5e-4, 0.0, "meta-llama/Llama-2-7b-hf", "csv"),
    ),
}


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_each_recipe_parses(litgpt, path):
    outcome = litgpt("pretrain", "--config", path)
    assert outcome.code == 0, outcome.err
    assert outcome.recipe.data is not None
    assert path.read_text().startswith("# ") and path.read_text().splitlines()[1].startswith("# ")


@pytest.mark.parametrize("name", LITGPT)
def test_values_are_those_of_litgpt(litgpt, name):
    recipe = litgpt("pretrain", "--config", HUB / f"pretrain/{name}.yaml").recipe
    train = recipe.train
    assert LITGPT[name] == (
        *(recipe.out_dir.name, type(recipe.data).__name__, train.global_batch_size, train.micro_batch_size),
        *(train.lr_warmup_steps, train.max_tokens, train.max_seq_length, recipe.optimizer.lr, train.min_lr),
        *(recipe.tokenizer_dir.relative_to("checkpoints").as_posix(), recipe.logger_name),
    )
    assert (recipe.optimizer.weight_decay, recipe.optimizer.betas) == (0.1, (0.9, 0.95))
    assert (recipe.precision, recipe.devices, recipe.num_nodes, recipe.seed) == ("bf16-mixed", "auto", 1, 42)
    assert (recipe.initial_checkpoint_dir, recipe.resume, train.max_norm) == (None, False, 1.0)


def test_there_is_a_recipe_that_needs_nothing(litgpt):
    recipe = litgpt("pretrain", "--config", HUB / "pretrain/quickstart.yaml").recipe
    assert recipe.tokenizer_dir is None and recipe.tokenizer.kind == "bpe"
    assert recipe.model_config["padded_vocab_size"] == recipe.tokenizer.vocab_size
    assert recipe.eval.sample_prompt and recipe.train.max_time and recipe.devices == 1


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_finetuning_recipe_fits_the_model_that_it_names(litgpt, path):
    outcome = litgpt("finetune_full" if path.stem.startswith("full") else "finetune", "--config", path)
    assert outcome.code == 0, outcome.err
    recipe = outcome.recipe
    shape = Config.from_name(recipe.checkpoint_dir.relative_to("checkpoints").as_posix(), n_layer=1)
    with torch.device("meta"):
        model = GPT(shape)
    if recipe.quantization:
        quantize(model, recipe.quantization)
    attach(model, recipe.resolved_tuner)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and (path.stem.startswith("full") or all("lora_" in name for name in trained))
    assert (recipe.quantization is not None) == path.stem.endswith("qlora")
    train = recipe.train
    assert train.global_batch_size % (train.micro_batch_size * recipe.devices) == 0 and train.max_seq_length == 512
    if path.stem.startswith("self-cognition"):
        own_path, other_source = recipe.data.sources
        rows = [json.loads(line) for line in (HUB.parent / own_path).read_text().splitlines()]
        assert len(rows) > 20 and "#" in other_source
        assert all(row["query"] and "{{NAME}}" in row["response"] for row in rows)
        assert recipe.data.model_name and any("{{AUTHOR}}" in row["response"] for row in rows)
        assert recipe.data.model_author
    else:
        rate = 1e-5 if path.stem == "full-1-gpu" else 2e-4
        assert type(recipe.data).__name__ == "Alpaca2k" and recipe.optimizer.lr == rate


@pytest.mark.parametrize("path", ALIGN, ids=lambda path: path.stem)
def test_each_preference_recipe_fits_the_model_that_it_names(litgpt, path):
    outcome = litgpt("align", "--config", path)
    assert outcome.code == 0, outcome.err
    recipe = outcome.recipe
    assert path.read_text().startswith("# ") and path.read_text().splitlines()[1].startswith("# ")
    assert path.stem.partition("-")[0] in {"pairs": "dpo", "kto": "kto", "reward": "reward"}[recipe.objective]
    assert (recipe.quantization is not None) == path.stem.endswith("qlora")
    assert isinstance(recipe.resolved_tuner, Full) == (path.stem in ("dpo-full", "reward"))
    with torch.device("meta"):
        model = GPT(Config.from_name(recipe.checkpoint_dir.relative_to("checkpoints").as_posix(), n_layer=1))
    attach(model, recipe.resolved_tuner)
    train = recipe.train
    assert train.global_batch_size % (train.micro_batch_size * recipe.devices) == 0 and train.max_seq_length == 1024


@pytest.mark.parametrize("path", MULTIMODAL, ids=lambda path: path.stem)
def test_each_recipe_for_media_parses(litgpt, path):
    command = "finetune_full" if "full" in path.stem else "align" if path.stem.endswith("dpo") else "finetune"
    outcome = litgpt(command, "--config", path)
    assert outcome.code == 0, outcome.err
    recipe, train = outcome.recipe, outcome.recipe.train
    assert path.read_text().startswith("# ") and path.read_text().splitlines()[1].startswith("# ")
    assert {"vision", "audio"} <= {*recipe.freeze.parts} and recipe.out_dir.name == path.stem
    ranks = recipe.parallel.resolve_dims(recipe.devices).data_ranks
    assert train.global_batch_size % (train.micro_batch_size * ranks) == 0 and recipe.data.on_error == "drop"
