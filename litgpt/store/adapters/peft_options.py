"""The options of PEFT's configs with which an adapter cannot be loaded, or cannot be trained further."""

from collections.abc import Mapping
from typing import Any

from litgpt.errors import UserError

CONVERT = "save it with PEFT's path_initial_model_for_weight_conversion"
MERGE = "merge it with PEFT, and use the merged model"
BASE_CHANGING_INITS = {"pissa": CONVERT, "olora": CONVERT, "corda": CONVERT, "lora_ga": CONVERT, "loftq": MERGE}
"""Values of `init_lora_weights` that change the base's weights; by prefix, with a cure."""
TASK_TYPES = {"logits": "CAUSAL_LM", "score": "SEQ_CLS"}
"""PEFT's `task_type` of a model, by its output."""
UNSUPPORTED = {
    "LORA": {
        "alora_invocation_tokens": "it applies to the tokens after these alone; use PEFT",
        "arrow_config": "it routes between several adapters; use PEFT",
        "kasa_config": MERGE,
        "layer_replication": "it repeats the base's blocks; use PEFT",
        "lora_bias": MERGE,
        "megatron_config": "it is for Megatron's layers; save the adapter of the Hugging Face model",
        "monteclora_config": MERGE,
        "use_bdlora": MERGE,
        "use_qalora": "it is for GPTQ layers; use PEFT",
    },
    "ADALORA": {"modules_to_save": MERGE, "bias": MERGE},
    "IA3": {"modules_to_save": MERGE},
    "VERA": {"modules_to_save": MERGE, "bias": MERGE},
    "BOFT": {"modules_to_save": MERGE, "bias": MERGE},
    "FOURIERFT": {"modules_to_save": MERGE, "bias": MERGE, "n_frequency_pattern": MERGE},
    "MISS": {"modules_to_save": MERGE, "bias": MERGE},
    "BONE": {"modules_to_save": MERGE, "bias": MERGE},
}
"""Options that change what an adapter computes, with a cure; by `peft_type`."""
UNSUPPORTED_IN_TRAINING = {
    "trainable_token_indices": "it trains rows of the embedding",
    "velora_config": "it approximates gradients",
}
"""Options that change how an adapter is trained, with what they do."""


def check_options(values: Mapping[str, Any]) -> None:
    """Check that an adapter of PEFT uses no option that is not supported.

    Args:
        values: the content of `adapter_config.json`.

    Raises:
        UserError: naming the option.
    """
    if values.get("task_type") not in (None, *TASK_TYPES.values()):
        supported = " or ".join(TASK_TYPES.values())
        raise UserError(f"task_type: {values['task_type']} is not supported; use an adapter of {supported}")
    for key, cure in UNSUPPORTED.get(str(values.get("peft_type")), {}).items():
        if values.get(key) not in (None, False, "none", [], {}):
            raise UserError(f"{key}: {values[key]} is not supported; {cure}")
    initialization = str(values.get("init_lora_weights")).lower()
    for prefix, cure in BASE_CHANGING_INITS.items():
        if initialization.startswith(prefix):
            raise UserError(f"init_lora_weights: {initialization} changed the weights of the base; {cure}")


def find_training_error(values: Mapping[str, Any]) -> str:
    """Why an adapter of PEFT cannot be trained further; empty if it can."""
    reasons = [f"{key}: {why}" for key, why in UNSUPPORTED_IN_TRAINING.items() if values.get(key)]
    if values.get("init_lora_weights") == "mica":
        reasons.append("init_lora_weights: mica trains A alone")
    return reasons[0] if reasons else ""
