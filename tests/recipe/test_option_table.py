"""The table of options of Megatron-SWIFT and ms-swift: complete, well-formed, and each translation builds a recipe."""

import itertools
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ConfigDict, TypeAdapter, with_config

from litgpt.model.transformer_config import TransformerConfig
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.from_yaml import parse_text
from litgpt.recipe.launch_script import parse_launch
from litgpt.recipe.option_table import (
    TABLES,
    Option,
    index_options,
    list_hints,
    load_defaults,
    load_options,
    read_table,
)
from litgpt.recipe.option_transforms import TRANSFORMS
from litgpt.recipe.to_yaml import to_plain
from litgpt.recipe.translation import RecipeTranslation, translate
from litgpt.recipe.translation_yaml import format_translation
from litgpt.recipe.unknown_key import load_own_field_names

SAMPLES: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "megatron_options.yaml").read_text())
NAMES = [name for section in SAMPLES.values() for name in section]
SWIFT_SAMPLES = {
    "moe_pad_expert_input_to_capacity": "true",
    "max_length": "2048",
    "dataset_shuffle": "false",
    "metric_for_best_model": "loss",
    "greater_is_better": "false --metric_for_best_model loss",
    "early_stop_interval": "3",
    "split_dataset_ratio": "0.1",
    "data_seed": "3",
    "torch_dtype": "float16",
    "hub_token": "t",
    "dataset": "a.jsonl b.jsonl#5",
    "val_dataset": "v.jsonl",
    "system": "Hello.",
    "model_name": "'Xiao Xing' Aster",
    "model_author": "litgpt",
    "truncation_strategy": "left",
    "agent_template": "hermes",
    "strict": "true",
    "sequence_parallel_size": "2",
    "gradient_checkpointing": "false",
    "gradient_accumulation_steps": "4",
    "deepspeed": "zero2_offload",
    "deepspeed_autotp_size": "2",
    "fsdp": "full_shard",
    "vit_lr": "2e-6",
    "aligner_lr": "0",
    "lr_scheduler_kwargs": """'{"min_lr": 1e-6}'""",
    "report_to": "wandb",
    "eval_on_start": "true",
    "save_total_limit": "5",
    "resume_from_checkpoint": "out/step-00000010",
    "neftune_noise_alpha": "5",
    "average_tokens_across_devices": "true",
    "group_by_length": "true",
    "torch_compile": "true",
    "shuffle_buffer_size": "100",
    "quant_bits": "4",
    "quant_method": "bnb",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": "false",
    "init_weights": "pissa",
    "use_dora": "true",
    "lora_ga_direction": "ArBr",
    "lora_ga_scale": "unit",
    "lora_ga_stable_gamma": "32",
    "lorap_lr_ratio": "16",
    "boft_block_size": "8",
    "fourier_n_frequency": "500",
    "fourier_scaling": "150",
    "adalora_target_r": "4",
    "adalora_init_r": "16",
    "adalora_tinit": "100",
    "adalora_tfinal": "200",
    "adalora_deltaT": "10",
    "adalora_beta1": "0.9",
    "adalora_beta2": "0.9",
    "adalora_orth_reg_weight": "0.1",
    "vera_rank": "128",
    "vera_projection_prng_key": "3",
    "vera_dropout": "0.1",
    "vera_d_initial": "0.2",
    "use_galore": "true",
    "galore_rank": "64",
    "galore_update_proj_gap": "100",
    "galore_scale": "0.5",
    "galore_proj_type": "left",
    "lisa_activated_layers": "2",
    "lisa_step_interval": "10",
    "llamapro_num_new_blocks": "8",
    "llamapro_num_groups": "4",
    "reft_layers": "1 2",
    "reft_rank": "8",
    "max_new_tokens": "64",
    "temperature": "0",
    "top_k": "5",
    "top_p": "0.9",
    "stream": "false",
    "stop_words": "END",
    "hub_model_id": "org/name",
    "model": "Qwen/Qwen3-4B",
    "lr_wsd_decay_iters": "10",
    "lr_wsd_decay_style": "minus_sqrt",
    "virtual_pipeline_model_parallel_size": "2",
    "cp_comm_type": "a2a",
    "ddp_timeout": "7200",
    "make_vocab_size_divisible_by": "128",
    "loss_weights": "0.5 0.5 --loss_type sigmoid hinge",
    "ld_alpha": "0.5",
    "discopop_tau": "0.1",
    "simpo_gamma": "0.5",
    "cpo_alpha": "0.5",
    "desirable_weight": "2.0",
    "undesirable_weight": "2.0",
    "center_rewards_coefficient": "0.01",
    "f_alpha_divergence_coef": "0.3",
    "sync_ref_model": "true",
    "ref_model_mixup_alpha": "0.5",
    "ref_model_sync_steps": "100",
    "precompute_ref_log_probs": "true",
    "muon_momentum": "0.9",
    "muon_num_ns_steps": "6",
    "mtp_loss_scaling_factor": "0.3",
    "NPROC_PER_NODE": "4",
    "CUDA_VISIBLE_DEVICES": "0,1,2",
    "NNODES": "2",
}
"""The values of the options that are not in the list of Megatron-SWIFT, and that a key is set for."""
CONDITIONS = {  # what fulfils a condition on the options that are no options of the script
    ("tuner_class", "LISA"): "--train_type full --lisa_activated_layers 3",
    ("optimizer_class", "AdamW"): "--optimizer adam",
    ("optimizer_class", "SGD"): "--optimizer sgd",
    ("optimizer_class", "Muon"): "--optimizer muon",
    ("val_dataset", "unset"): "",
    ("quant_bits", "set"): "--quant_bits 4 --train_type lora",
    ("lr_decay_style", "WSD"): "--lr_decay_style WSD",
    ("train_type", "full"): "--train_type full",
    ("mtp_num_layers", "set"): "--mtp_num_layers 1",
    ("fp8_format", "set"): "--fp8_format e4m3",
}
NEEDS = {  # options whose meaning depends on others
    "initial_adapter_dir": "--train_type lora",
    "quantize": "--train_type lora",
    "train.global_batch_size": "--micro_batch_size 2 --NPROC_PER_NODE 2",
    "parallel.pipeline_layers": "--pipeline_model_parallel_size 2",
    "parallel.expert_tensor": "--tensor_model_parallel_size 2",
    "tuner.trainable_parameters": "--freeze_parameters_ratio 1",
    "tuner.trainable_parameters_regex": "--freeze_parameters_ratio 1",
    "devices": "--global_batch_size 12",
    "train.lr_decay_steps": "--train_iters 100",
    "parallel.cpu_offload": "--NPROC_PER_NODE 2",
    "parallel.zero": "--NPROC_PER_NODE 2",
    "parallel.expert": "--NPROC_PER_NODE 8",
    "moe.router_load_balancing_type": "--moe_aux_loss_coeff 1e-3",
    **dict.fromkeys(("moe.token_drop_policy", "moe.pad_expert_input_to_capacity"), "--moe_expert_capacity_factor 1.25"),
    "data.group_by_length: 50": "--packing false",
}
GIVEN = "--model Qwen/Qwen3-8B --dataset rows.jsonl --train_iters 1000"


def fulfil(option: Option) -> Iterator[str]:
    """Arguments with which an option has an effect."""
    for name in option.when:
        original = next(value for key, value in find_row(option)["when"].items() if key == name)
        value = str(original).split(", ")[0]
        if name == "command" or (value.lower().startswith("not ") and value.lower() != "not 1") or value == "unset":
            continue
        if value == "not 1":
            yield f"--{name} 2" if name != option.name else ""
        elif name == "tuner_class" and (name, value) not in CONDITIONS:
            yield f"--train_type {value.lower()}"
        else:
            yield CONDITIONS.get((name, value), f"--{name} {value}")


def find_row(option: Option) -> dict[str, Any]:
    return next(rows[option.name] for table in TABLES for rows in read_table(table).values() if option.name in rows)


def build_translation(option: Option, value: str) -> RecipeTranslation:
    """Translate a launch in which an option has a value and an effect."""
    command = option.when.get("command", "")
    verbs = {"pretrain": "pt", "generate": "infer", "convert_from_litgpt": "export", "align, kto, rm": "rlhf"}
    verb = "rlhf" if "preference." in (option.key or "") else verbs.get(command, "sft")
    tail = f"{' '.join(fulfil(option))} {NEEDS.get(option.key or '', '')}"
    given = {"export": "--model m --output_dir o --push_to_hub true", "infer": "--model m"}.get(verb, GIVEN)
    program = "swift" if verb in ("export", "infer") else "megatron"
    text = f"{verb} {given} {tail} --{option.name} {value}"
    return translate(parse_launch(text, program, "test"), find_layers=lambda _model: 36)


def build(translation: RecipeTranslation) -> Any:
    """Build the recipe from the text of a translation."""
    recipe = COMMANDS[translation.command].import_recipe()
    tree = parse_text(format_translation(translation), "test")
    return build_recipe(recipe, merge_settings(recipe, {}, tree, trusted=True))


def read_key(recipe: Any, key: str) -> Any:
    """The value of a dotted key of a recipe."""
    value = to_plain(recipe)
    for part in key.split("."):
        value = value.get("init_args", value) if isinstance(value, Mapping) else value
        value = value[part]
    return value.get("class_path", value) if isinstance(value, Mapping) else value


def test_each_option_of_the_list_is_accepted_translated_or_refused() -> None:
    options = index_options()
    assert len(NAMES) == len(set(NAMES)) == 186
    assert [name for name in NAMES if name not in options] == []
    for name in NAMES:
        option = options[name]
        assert option.reason if option.state == "refused" else option.key or option.note, name


def test_rows_have_the_form_of_the_table() -> None:
    adapter = TypeAdapter(with_config(ConfigDict(extra="forbid", strict=False))(Option))
    for option in load_options():
        adapter.validate_python({name: getattr(option, name) for name in Option.__dataclass_fields__})
        assert option.transform is None or option.transform in TRANSFORMS, option.name
        assert not (option.values and option.transform), option.name
        assert (option.state == "refused") == (option.key is None and bool(option.reason) and not option.note), option
        assert option.key or option.note or option.reason, option.name
        assert "\n" not in option.describe() and option.describe(), option.name
        for name in option.when:
            assert name in index_options() or name in ("command", "tuner_class", "optimizer_class"), option.name
    assert {option.transform for option in load_options()} - {None} == set(TRANSFORMS)


def test_names_are_unique() -> None:
    names = [name for option in load_options() for name in (option.name, *option.aliases)]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert sorted(set(load_own_field_names()) & set(dict(list_hints()))) == []


def test_defaults_are_options() -> None:
    for groups in load_defaults().values():
        for group in groups.values():
            assert set(group) <= set(index_options())


def list_translated() -> Iterator[Any]:
    for option in load_options():
        if option.key and not option.key.startswith("model_config."):
            sample = next((group[option.name] for group in SAMPLES.values() if option.name in group), None)
            yield pytest.param(option, sample or SWIFT_SAMPLES.get(option.name, ""), id=option.name)


@pytest.mark.parametrize(("option", "value"), list(list_translated()))
def test_each_translated_option_builds_a_recipe(option: Option, value: str) -> None:
    assert value, f"{option.name} has no value in this test"
    translation = build_translation(option, value)
    lines = (*translation.unset, *translation.refused, *translation.left_over)
    mine = [line for line in lines if line.startswith((f"--{option.name} ", f"{option.name}="))]
    assert mine == []
    assert translation.missing == []
    recipe = build(translation)
    key = (option.key or "").partition(": ")[0]
    keys = [name for name in translation.settings if name == key or option.name in translation.comments.get(name, "")]
    assert keys
    for name in keys:
        ours = translation.settings[name]
        if name == "access_token":  # which is not written
            assert recipe.access_token == ours
            continue
        assert str(read_key(recipe, name)).lower() == str(ours).lower() or read_key(recipe, name) == ours, name


def test_keys_of_models_are_fields_of_its_config() -> None:
    for option in load_options():
        if option.key and option.key.startswith("model_config."):
            field = option.key.split(".")[1].partition(": ")[0]
            assert field in TransformerConfig.__dataclass_fields__, option.name


@pytest.mark.slow
def test_each_value_of_an_option_is_one_of_its_key() -> None:
    """Every value of every table of values builds a recipe."""
    for option in load_options():
        for theirs in option.values if option.key and "model_config" not in option.key else ():
            if option.values[theirs] in ("inverse-sqrt", "constant", "wsd"):
                continue
            translation = build_translation(option, theirs)
            build(translation)


def test_every_option_has_a_value_that_shlex_reads() -> None:
    for section in SAMPLES.values():
        for name, value in section.items():
            assert shlex.split(value), name


@pytest.mark.parametrize("value", ["", "x", "a b", "''", "1e999", "null"])
def test_any_value_is_translated_or_refused(value: str) -> None:
    verbs = itertools.cycle([("megatron", "sft"), ("megatron", "pt"), ("swift", "rlhf"), ("swift", "infer")])
    for option, (program, verb) in zip(load_options(), verbs, strict=False):
        translation = translate(parse_launch(f"{verb} --{option.name} {value}", program, "test"))
        assert isinstance(parse_text(format_translation(translation), "test") or {}, dict)
