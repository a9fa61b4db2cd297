"""Hints for unknown keys: other projects' names and misspellings, to keys that the command at hand has."""

from functools import cache
from typing import Any

import pytest

from litgpt.model.transformer_config import TransformerConfig
from litgpt.recipe.build import list_known_keys
from litgpt.recipe.choices import parse_choice
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.keys import find_choice_base, list_settings
from litgpt.recipe.unknown_key import find_hint, is_available, list_hint_keys, load_field_names

TREES: list[dict[str, str]] = [
    *[{}, {"data": "Conversations"}, {"data": "JSON"}, {"data": "TextFiles"}, {"data": "LitData"}],
    *[{"data": "Alpaca"}, {"tuner": "LoRA"}, {"tuner": "Full"}, {"optimizer": "SGD"}],
    {"optimizer": "PrecisionAwareAdamW"},
]


@cache
def list_keys_with(command: str, choices: tuple[tuple[str, str], ...]) -> list[str]:
    """The keys of a command with some classes, and the fields of a model's configuration."""
    recipe = COMMANDS[command].import_recipe()
    settings, tree = list_settings(recipe), dict[str, Any]()
    for key, name in choices:
        if base := find_choice_base(settings.get(key, (None, None))[0]):
            tree[key] = parse_choice(base, name, key)
    known = list_known_keys(recipe, tree)
    fields = [f"model_config.{name}" for name in TransformerConfig.__dataclass_fields__]
    return known + (fields if "model_config" in known else [])


def resolves(hint: str, command: str, choices: dict[str, str]) -> bool:
    """Whether all keys of a hint exist in a command, with the classes that it names."""
    named = {key: value for key, value in list_hint_keys(hint).items() if value and value[0].isupper()}
    return set(list_hint_keys(hint)) <= set(list_keys_with(command, tuple((choices | named).items())))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_hint_that_is_available_is_a_key_of_the_command(command):
    for choices in TREES:
        known = frozenset(key for key in list_keys_with(command, tuple(choices.items())) if "model_config." not in key)
        for name, hints in load_field_names().items():
            for hint in hints:
                assert not is_available(hint, known) or resolves(hint, command, choices), (name, hint, choices)


def test_each_entry_of_the_table_is_a_key_of_some_command():
    for name, hints in load_field_names().items():
        for hint in hints:
            assert any(resolves(hint, command, choices) for command in COMMANDS for choices in TREES), (name, hint)


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (
            "finetune",
            {
                "model": "checkpoint_dir",
                "base_model": "checkpoint_dir",
                "lr": "optimizer.lr",
                "train.lr": "optimizer.lr",
                "data.path": "data: Conversations and data.sources",
                "dataset": "data: Conversations and data.sources",
                "tuner_type": "tuner",
                "learning_rate": "optimizer.lr",
                "num_train_epochs": "train.epochs",
                "per_device_train_batch_size": "train.micro_batch_size",
                "gradient_accumulation_steps": "train.global_batch_size",
                "max_length": "train.max_seq_length",
                "output_dir": "out_dir",
                "bf16": "precision: bf16-mixed",
                "lora_rank": "lora_r",
                "tuner.rank": "tuner.r",
                "target_modules": "tuner.target_modules",
                "warmup_ratio": "train.lr_warmup_fraction",
                "weight_decay": "optimizer.weight_decay",
                "save_steps": "train.save_interval",
                "eval_steps": "eval.interval",
                "logging_steps": "train.log_interval",
                "gradient_checkpointing": "recompute.granularity: full",
                "load_in_4bit": "quantize: bnb.nf4",
                "learning_rte": "optimizer.lr",
                "modle": "checkpoint_dir",
            },
        ),
        (
            "pretrain",
            {
                "model": "model_name",
                "modle": "model_name",
                "tensor_model_parallel_size": "parallel.tensor",
                "pipeline_model_parallel_size": "parallel.pipeline",
                "context_parallel_size": "parallel.context",
                "expert_model_parallel_size": "parallel.expert",
                "micro_batch_size": "train.micro_batch_size",
                "global_batch_size": "train.global_batch_size",
                "seq_length": "train.max_seq_length",
                "save": "out_dir",
                "load": "initial_checkpoint_dir",
                "dataset": "data: TextFiles and data.train_data_path",
                "data.path": "data: TextFiles and data.train_data_path",
                "val_dataset": "data: TextFiles and data.val_data_path",
                "recompute_granularity": "recompute.granularity",
                "clip_grad": "train.max_norm",
                "num_layers": "model_config.n_layer",
                "optimizer.xyz": None,
                "metric_for_best_model": "checkpoint.best.metric",
                "early_stopping_patience": "train.patience and checkpoint.best.metric",
                "moe_aux_loss_coeff": "moe.aux_loss_coeff",
                "fp8_format": "fp8.format",
                "freeze_vit": None,
            },
        ),
        ("finetune_full", {"freeze_parameter_ratio": "tuner.freeze_parameters_ratio", "lora_rank": None}),
        ("generate", {"model": "checkpoint_dir", "max_length": "max_new_tokens", "adapters": "checkpoint_dir"}),
        ("merge_lora", {"adapters": "checkpoint_dir", "save_dir": "output_dir", "base_model": "checkpoint_dir"}),
        ("convert_from_litgpt", {"out_dir": "output_dir", "hub_model_id": "push_to_hub"}),
    ],
)
def test_hints(command, keys):
    known = list_keys_with(command, ())
    assert {key: find_hint(key, known) for key in keys} == keys


def test_the_class_decides_on_the_hint(litgpt):
    for flags, hint in {
        ("--data", "JSON"): "data.json_path",
        ("--data", "TextFiles"): "data.train_data_path",
        ("--data", "LitData"): "data.data_path",
        ("--data", "Conversations"): "data.sources",
    }.items():
        for order in ([*flags, "--data.path", "a"], ["--data.path", "a", *flags], ["--data_dir", "a", *flags]):
            assert f"did you mean {hint}?" in litgpt("pretrain", "x", *order).error_line()
    nested = litgpt("finetune", "x", "--data", "Conversations", "--data.sources=[a]", "--data.packing.lenght", "4")
    assert nested.error_line() == "data.packing.lenght is not a key; did you mean data.packing.length?"


def test_without_a_similar_key_the_keys_beside_it_are_listed(litgpt):
    line = litgpt("pretrain", "x", "--optimizer.xyz", "1").error_line()
    assert line.startswith("optimizer.xyz is not a key; the keys of optimizer are lr, betas, eps")
    assert litgpt("pretrain", "x", "--zzz", "1").error_line() == (
        "zzz is not a key; --help all lists the keys of the command"
    )


def test_options_that_no_key_is_set_for(litgpt):
    reasons = {
        "overlap_grad_reduce": "always, by FSDP2 and DDP",
        "parallel.overlap-grad-reduce": "always, by FSDP2 and DDP",
        "no_rope_fusion": "compile fuses all elementwise operations; compile: false fuses none",
    }
    for name, reason in reasons.items():
        line = litgpt("finetune", "x", f"--{name}", "1").error_line()
        assert line == f"{name} is not a key, and nothing is set in its place: {reason}"


def test_names_with_hyphens(litgpt):
    hints = {
        "lr-decay-style": "train.lr_decay_style",
        "tensor-model-parallel-size": "parallel.tensor",
        "out-dir": "out_dir",
    }
    for name, hint in hints.items():
        assert litgpt("finetune", "x", f"--{name}", "1").error_line() == f"{name} is not a key; did you mean {hint}?"


def test_a_key_with_dots_in_a_file(litgpt, tmp_path):
    (tmp_path / "flat.yaml").write_text("train.max_steps: 7\n")
    assert litgpt("finetune", "x", "--config", tmp_path / "flat.yaml").error_line() == (
        "train.max_steps: keys with dots are of the command line; in YAML write max_steps below train"
    )


def test_an_optimizer_without_settings(litgpt, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "class Still:\n    def __init__(self, params): ...\n    def step(self): ...\n"
    (tmp_path / "own_optimizer.py").write_text(code)
    line = litgpt("pretrain", "x", "--optimizer", "own_optimizer.Still", "--optimizer.lr", "1").error_line()
    assert (
        line
        == "optimizer: own_optimizer.Still takes no lr, which is set at every step; use a class that takes it, or AdamW"
    )


def test_all_unknown_keys_are_answered_at_once(litgpt, tmp_path):
    line = litgpt("finetune", "--model", "x", "--lr", "1e-4", "--bf16", "true", "--zzz", "1").error_line()
    hints = "checkpoint_dir (model), optimizer.lr (lr), precision: bf16-mixed (bf16)"
    assert line == f"model, lr, bf16, zzz are not keys; did you mean {hints}?"
    (tmp_path / "hf.yaml").write_text("learning_rate: 1e-4\nnum_train_epochs: 3\ntrain: {lr: 1, foo: 2}\n")
    line = litgpt("finetune", "x", "--config", tmp_path / "hf.yaml").error_line()
    assert line == (
        "learning_rate, num_train_epochs are not keys; did you mean optimizer.lr (learning_rate), "
        "train.epochs (num_train_epochs)?"
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "books", "org/rows", "none/rows.csv"])
def test_a_path_in_the_place_of_a_data_module(litgpt, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "rows.json").write_text(" [{}]")
    line = litgpt("finetune", "x", "--data", name).error_line()
    assert line.endswith(f"and not a class; set data: Conversations and data.sources: [{name}]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--data.sources", "rows.jsonl"], "data.sources is not a key of Alpaca, but of Conversations; set data: "),
        (["--tuner.vera_r", "3", "--tuner", "IA3"], "tuner.vera_r is not a key"),
    ],
)
def test_a_key_of_another_class_names_the_class(line, message, litgpt):
    assert litgpt("finetune", "model", *line).error_line().startswith(message)
