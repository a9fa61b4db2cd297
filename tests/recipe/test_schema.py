"""The JSON Schema accepts and refuses the same recipes as the command line."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.schema import build_schema

CONFIG_HUB = sorted((Path(__file__).parents[2] / "config_hub").rglob("*.yaml"))


class Yaml12(yaml.SafeLoader):
    """YAML 1.2 as in editors, where 6e-5 is a number."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", __import__("re").compile(r"^\d+(\.\d*)?e[+-]?\d+$"), list("0123456789")
)


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return validator_of("pretrain")


def errors(validator: Draft202012Validator, text: str) -> list[Any]:
    return [error.message for error in validator.iter_errors(Yaml12(text).get_single_data())]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_schema_is_valid(name):
    schema = validator_of(name).schema
    Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert all("description" in keys or "$ref" in keys for keys in schema["properties"].values())


@cache
def validator_of(command: str) -> Draft202012Validator:
    return Draft202012Validator(build_schema(COMMANDS[command].import_recipe()))


@pytest.mark.parametrize("path", CONFIG_HUB, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_of_the_hub_are_valid(path):
    full = path.stem == "full" or path.parent.name == "scale"
    finetuning = "finetune_full" if full else "finetune"
    command = "pretrain" if "\nmodel_name:" in path.read_text() else finetuning
    command = "align" if path.parent.name == "align" or path.stem.endswith("dpo") else command
    assert errors(validator_of(command), path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "model_name: x",
        "{model_name: x, data: TextFiles}",
        "{model_name: x, data: my.own.Data}",
        "{model_name: x, data: {class_path: litgpt.data.TextFiles, init_args: {train_data_path: a}}}",
        "{model_name: x, optimizer: SGD}",
        "{model_name: x, optimizer: {class_path: torch.optim.Adagrad, init_args: {anything: 1}}}",
        "{model_name: x, checkpoint: {async: false}, parallel: {data_shard: auto}}",
        "{model_name: x, train: {max_tokens: 3e12}, resume: out/step-1, tokenizer: {kind: bytes}}",
    ],
)
def test_correct_recipes_are_valid(validator, text):
    assert errors(validator, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1",
        "{model_name: x, sed: 1}",
        "{model_name: x, train: {max_step: 1}}",
        "{model_name: x, train: {max_steps: 1.5}}",
        "{model_name: x, train: {micro_batch_size: 0}}",
        "{model_name: x, precision: bf16}",
        "{model_name: x, data: TextFile}",
        "{model_name: x, data: {class_path: TextFiles}}",
        "{model_name: x, data: {class_path: TextFiles, init_args: {train_data_path: a, sed: 1}}}",
        "{model_name: x, optimizer: {class_path: AdamW, init_args: {lrr: 1}}}",
        "{model_name: x, optimizer: {class_path: AdamW, init_args: {lr: -1}}}",
    ],
)
def test_incorrect_recipes_are_invalid(validator, text):
    assert errors(validator, text)


@pytest.mark.parametrize(
    ("command", "key"),
    [("finetune_full", "freeze_parameters_ratio"), ("finetune_adapter", "start_layer"), ("finetune", "r")],
)
def test_a_tuner_without_a_class_is_that_of_the_command(command, key):
    schema = validator_of(command)
    assert not errors(schema, f"{{checkpoint_dir: x, tuner: {{init_args: {{{key}: 1}}}}}}")
    assert errors(schema, "{checkpoint_dir: x, tuner: {init_args: {block_size: 1}}}")


def test_properties_have_descriptions_and_choices(validator):
    group = validator.schema["$defs"]["TrainArgs"]["properties"]
    assert group["micro_batch_size"]["description"] == "Number of samples per forward pass on one device."
    assert "wsd" in group["lr_decay_style"]["enum"]
    assert "AdamW" in str(validator.schema["$defs"]["Optimizer"])


@pytest.mark.parametrize(
    ("command", "text", "is_valid"),
    [
        ("pretrain", "{model_name: x, data: {init_args: {use_starcoder: false}}}", True),
        ("pretrain", "{model_name: x, data: {init_args: {val_split_fraction: 0.1}}}", False),
        ("finetune", "{checkpoint_dir: x, data: {init_args: {val_split_fraction: 0.1}}}", True),
        ("finetune", "{checkpoint_dir: x, data: {init_args: {use_starcoder: false}}}", False),
        ("finetune", "{checkpoint_dir: x, max_seq_length: 8}", False),
        ("data inspect", "{data: {init_args: {use_starcoder: false}}}", False),
        ("data inspect", "{data: TinyLlama, train: {max_seq_length: 8}}", True),
        ("data inspect", "{data: TinyLlama, max_seq_length: 8}", True),
        ("data inspect", "{data: TinyLlama, train: {max_steps: 8}}", False),
    ],
)
def test_default_data_and_other_names_depend_on_the_command(command, text, is_valid, litgpt, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    assert (errors(validator_of(command), text) == []) is is_valid
    outcome = litgpt(*command.split(), "--config", str(tmp_path / "recipe.yaml"))
    assert (outcome.recipe is not None) is is_valid
