"""Functions that translate the value of an option to settings, where a key or a table of values is not enough."""

import json
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from litgpt.recipe.fp8 import E4M3_ONLY
from litgpt.recipe.launch_options import LaunchOptions
from litgpt.recipe.option_table import RefusedValue

Settings = dict[str, Any]
TRAINING_PRECISIONS = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}
INFERENCE_PRECISIONS = {"bfloat16": "bf16-true", "float16": "16-true", "float32": "32-true"}
LOGGERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "none": "csv",
    "all": "tensorboard",
}
# Megatron's layers, and those of a model here
MEGATRON_MODULES = {
    "linear_qkv": ["q", "k", "v"],
    "linear_proj": ["attention.out"],
    "linear_fc1": ["gate", "up"],
    "linear_fc2": ["down"],
}
ROPE_KEYS = {"original_max_position_embeddings": "original_max_seq_len", "rope_type": None, "type": None}
"""Keys of a rope_scaling, and ours; None for those that the other keys imply."""
ROPE_DEFAULTS = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0}}
INITIALIZATIONS = {
    "LoRA": {
        "true": "default",
        "gaussian": "gaussian",
        "pissa": "pissa",
        "olora": "olora",
        "loftq": "loftq",
        "lora-ga": "lora_ga",
    },
    "Bone": {"true": "bone", "bat": "bat"},
}
"""The values of init_weights by tuner, and ours; of Bone, they select its variant."""
COMMAND_LOSSES = {"kto": "kto", "rm": "reward"}
CPO_LOSSES = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo"}
EXO_SMOOTHING = 1e-3
"""The label_smoothing that ms-swift sets in exo_pair, whose loss is infinite without."""
MAX_MINUTES = 100_000
MCORE_SUFFIX = "-mcore"
"""The end of the name of a folder in Megatron's format, by the convention of ms-swift's pages."""
MIN_BATCH = 16
"""Samples per optimizer step that ms-swift accumulates to, unless it is told."""


def as_list(value: Any) -> list[Any]:
    """Return a list of one or several values."""
    return value if isinstance(value, list) else [value]


def as_number(value: Any) -> Any:
    """Return a number.

    Raises:
        RefusedValue: for any other value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedValue(f"{value!r} is not a number")
    return value


def negate(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """The opposite of a boolean."""
    return {key: not value}


def complement(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """A fraction that is counted from the other end."""
    return {key: 1 - as_number(value)}


def zero_to_null(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """A number that switches off at 0, where ours does at null."""
    return {key: as_number(value) or None}


def choose_gc_interval(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The steps between garbage collections, of which a manual one without an interval has none."""
    return {key: launch.get("manual_gc_interval", 0)} if value else {}


def seconds_to_minutes(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """A time limit; at most the longest that is supported."""
    return {key: min(as_number(value) / 60, MAX_MINUTES)}


def join_betas(key: str, _value: Any, launch: LaunchOptions) -> Settings:
    """Both decay rates of Adam's moments."""
    key = "optimizer.adamw_betas" if launch.get("optimizer_class") == "Muon" else key
    return {key: [launch.get("adam_beta1"), launch.get("adam_beta2")]}


def name_eps(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The term of Adam's denominator."""
    return {"optimizer.adamw_eps" if launch.get("optimizer_class") == "Muon" else key: value}


def count_micro_batches(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """A number of global batches as one of micro-batches over all devices; -1 for all data."""
    if as_number(value) < 0:
        return {key: value}
    return {
        key: value * as_number(launch.get("global_batch_size")) // max(1, as_number(launch.get("micro_batch_size")))
    }


def count_global_batch(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The samples per optimizer step, from the steps of gradient accumulation; `auto` for those of ms-swift."""
    ranks = launch.count_processes() // max(1, as_number(launch.get("sequence_parallel_size")))
    per_round = max(1, as_number(launch.get("micro_batch_size")) * ranks)
    return {key: per_round * (-(-MIN_BATCH // per_round) if value == "auto" else as_number(value))}


def count_devices(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The number of visible devices, unless the number of processes is given."""
    if launch.is_given("NPROC_PER_NODE"):
        return {}
    return {key: len(as_list(value)[0].split(",")) if isinstance(value, str) else 1}


def choose_zero(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The ZeRO stage of a DeepSpeed configuration by its name."""
    match = re.fullmatch(r"zero([0-3])(_offload)?", str(value))
    if match is None:
        raise RefusedValue("set parallel.zero to its stage, and parallel.cpu_offload")
    if match[1] == "0":
        return {"parallel.data_replicate": launch.count_processes()}
    return {key: int(match[1])} | ({"parallel.cpu_offload": True} if match[2] else {})


def choose_precision(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The precision of a dtype."""
    if launch.command.startswith("convert"):
        return {"dtype": value}
    table = TRAINING_PRECISIONS if launch.is_training else INFERENCE_PRECISIONS
    if value not in table:
        raise RefusedValue(f"use {', '.join(table)}")
    return {key: table[value]}


def choose_fp8_format(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The types of FP8 operands, which some recipes have one of."""
    recipe = str(launch.get("fp8_recipe"))
    if value == "hybrid" and recipe in E4M3_ONLY:
        raise RefusedValue(f"with fp8_recipe {recipe} all operands are e4m3")
    return {key: value}


def choose_quantization(key: str, _value: Any, launch: LaunchOptions) -> Settings:
    """The format of a number of bits and the options beside it."""
    bits, method = launch.get("quant_bits"), launch.get("quant_method", "bnb")
    if method != "bnb" or bits not in (4, 8):
        raise RefusedValue("the formats are those of bitsandbytes with 4 and 8 bits")
    if bits == 8:
        return {key: "bnb.int8-training" if launch.is_training else "bnb.int8"}
    kind = launch.get("bnb_4bit_quant_type", "nf4")
    return {key: f"bnb.{kind}" + "-dq" * launch.get("bnb_4bit_use_double_quant", True)}


def choose_logger(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """The first of several loggers."""
    name = str(as_list(value)[0]).lower()
    if name not in LOGGERS:
        raise RefusedValue(f"the loggers are {', '.join(LOGGERS)}")
    return {key: LOGGERS[name]}


def name_model(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The folder or name of the model, under the key of the command."""
    path = launch.converted.get(str(value), str(value))
    if launch.command == "pretrain":
        name = PurePath(path).name.removesuffix(MCORE_SUFFIX)
        path = path.removesuffix(MCORE_SUFFIX)
        return {"model_name": name, "initial_checkpoint_dir": path, "tokenizer_dir": path}
    if launch.command == "merge_lora":
        return {"pretrained_checkpoint_dir": path}
    if launch.command == "generate" and launch.is_given("adapter_load"):
        return {}
    return {key: path.removesuffix(MCORE_SUFFIX)}


def name_output(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The output folder, under the key of the command."""
    return {key if launch.is_training else "output_dir": str(value)}


def name_adapter(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The folder of an adapter, under the key of the command."""
    paths = as_list(value)
    if len(paths) > 1:
        raise RefusedValue("one adapter at a time is supported")
    return {key if launch.is_training else "checkpoint_dir": paths[0]}


def name_targets(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """The layers of a tuner, also by Megatron's names."""
    return {key: [layer for name in as_list(value) for layer in MEGATRON_MODULES.get(name, [name])]}


def choose_initialization(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The initialization of LoRA, or the variant of Bone."""
    tuner, name = str(launch.get("tuner_class")), str(value).lower()
    known = INITIALIZATIONS.get(tuner, {})
    if name not in known:
        raise RefusedValue(f"the initializations are {', '.join(known)}")
    return {key if tuner == "LoRA" else "tuner.variant": known[name]}


def name_system(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The system message, which is given as a text."""
    if str(value).endswith(".txt"):
        raise RefusedValue("give the text of the file")
    return {key if launch.is_training else "sys_prompt": str(value)}


def list_stage_layers(key: str, _value: Any, launch: LaunchOptions) -> Settings:
    """The layers of every stage: those of the first and last one, and equal shares of the rest for the others."""
    stages = as_number(launch.get("pipeline_model_parallel_size"))
    first, last = launch.get("decoder_first_pipeline_num_layers"), launch.get("decoder_last_pipeline_num_layers")
    ends = [as_number(count) for count in (first, last) if count is not None]
    if stages < max(2, len(ends)):
        raise RefusedValue("it needs a pipeline of several stages")
    layers, rest = launch.count_layers(), stages - len(ends)
    if layers is not None and (layers - sum(ends) < rest or (layers - sum(ends)) % max(1, rest)):
        raise RefusedValue(f"{layers} layers do not divide into {stages} stages with these")
    return {key: [*([first] if first else []), *[None] * rest, *([last] if last else [])]}


def list_moe_layers(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """A 1 for each layer with experts and a 0 for the others, from an interval or from a pattern as [0]*1+[1]*26."""
    layers = launch.count_layers()
    if isinstance(value, int) and value > 0:
        if layers is None:
            raise RefusedValue(f"set {key} to a 0 or 1 for each layer")
        return {key: [int(layer % value == 0) for layer in range(layers)]}
    marks: list[int] = []
    for part in re.sub(r"[()\s]", "", str(value)).split("+"):
        match = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", part)
        if match is None:
            raise RefusedValue(f"set {key} to a 0 or 1 for each layer")
        marks += [int(mark) for mark in match[1].split(",")] * int(match[2] or 1)
    return {key: marks}


def name_reference(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The folder of the reference model or adapter; nothing for the one that the run starts from."""
    paths = [launch.converted.get(str(path), str(path)) for path in as_list(value)]
    if len(paths) > 1:
        raise RefusedValue("one reference is supported")
    start = launch.given.get("adapter_load", launch.given.get("model", launch.given.get("load")))
    return {} if value == start else {key: paths[0].removesuffix(MCORE_SUFFIX)}


def choose_loss(key: str, _value: Any, launch: LaunchOptions) -> Settings:
    """The loss of a kind of alignment and its loss_type; nothing where the command has it."""
    kind = str(launch.get("rlhf_type", "dpo"))
    types = [str(name) for name in as_list(launch.get("loss_type", COMMAND_LOSSES.get(kind, "sigmoid")))]
    if kind in COMMAND_LOSSES:
        if types != [COMMAND_LOSSES[kind]]:
            raise RefusedValue(f"the loss of {kind} is {COMMAND_LOSSES[kind]}")
        return {}
    names = [CPO_LOSSES.get(name, name) if kind == "cpo" else name if kind == "dpo" else kind for name in types]
    smoothing = {"preference.label_smoothing": EXO_SMOOTHING}
    needs_smoothing = "exo_pair" in names and not launch.get("label_smoothing")
    return {key: names[0] if len(names) == 1 else names} | (smoothing if needs_smoothing else {})


def read_object(value: Any) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        parsed = json.loads(str(value))
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise RefusedValue("give it as a JSON object")
    return parsed


def read_rope_scaling(key: str, value: Any, _launch: LaunchOptions) -> Settings:
    """The scaling of rotary positions, from an entry of config.json."""
    given = read_object(value)
    kind = given.get("rope_type", given.get("type"))
    scaling = {ROPE_KEYS.get(name, name): item for name, item in given.items() if ROPE_KEYS.get(name, name)}
    return {key: ROPE_DEFAULTS.get(str(kind), {}) | scaling}


def read_min_lr(key: str, value: Any, launch: LaunchOptions) -> Settings:
    """The last learning rate, from the arguments of a schedule."""
    given = read_object(value)
    if set(given) == {"min_lr"}:
        return {key: given["min_lr"]}
    if set(given) == {"min_lr_rate"}:
        return {key: as_number(given["min_lr_rate"]) * as_number(launch.get("lr"))}
    raise RefusedValue("its keys are min_lr and min_lr_rate")


TRANSFORMS: dict[str, Callable[[str, Any, LaunchOptions], Settings]] = {
    function.__name__: function
    for function in (
        negate,
        complement,
        zero_to_null,
        choose_gc_interval,
        seconds_to_minutes,
        join_betas,
        name_eps,
        count_micro_batches,
        count_global_batch,
        count_devices,
        choose_zero,
        choose_precision,
        choose_fp8_format,
        choose_quantization,
        choose_logger,
        name_model,
        name_output,
        name_adapter,
        name_targets,
        choose_initialization,
        name_system,
        list_stage_layers,
        list_moe_layers,
        name_reference,
        choose_loss,
        read_rope_scaling,
        read_min_lr,
    )
}
"""The functions that the table names: (key, value, all options) -> settings; they raise RefusedValue."""
