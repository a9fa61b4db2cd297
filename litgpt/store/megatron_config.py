"""The config of a Megatron-core model, from the arguments of the run that trained it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.registry import load_family_files
from litgpt.store.megatron_files import COMMON, load_run_arguments

Arguments = Mapping[str, Any]
LATENT_ARGUMENTS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "qk_nope_head_dim": "qk_head_dim",
    "v_head_dim": "v_head_dim",
}
YARN_ARGUMENTS = {
    "factor": "rotary_scaling_factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""The sizes of latent attention and the settings of yarn: our keys and Megatron's arguments."""
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
"""What `use_rope_scaling` means in Megatron-core, beside the factor."""


def load_megatron_config(folder: Path, name: str) -> Config:
    """The config of a `torch_dist` checkpoint, from the arguments in its `common.pt`.

    Raises:
        UserError: if the arguments are missing, or describe a model that this package does not have.
    """
    arguments = load_run_arguments(folder)
    if arguments is None:
        raise UserError(
            f"{folder}: its {COMMON} has no arguments to read the config from; give --model_name, or put the "
            "config.json or model_config.yaml of the model there"
        )
    return build_config(arguments, folder / COMMON, name)


def build_config(arguments: Arguments, source: Path, name: str) -> Config:
    """The config of the model that Megatron-LM builds of these arguments.

    Raises:
        UserError: naming an argument that is missing or not supported.
    """
    table = load_family_files()["megatron"]
    for key in table["required"]:
        if arguments.get(key) is None:
            raise UserError(f"{source}: the argument {key} is missing; give --model_name or a config.json beside it")
    for key, values in table["expect"].items():
        if arguments.get(key) is not None and arguments[key] not in values:
            choices = ", ".join(map(str, values)) or "none"
            raise UserError(f"{source}: {key}: {arguments[key]!r} is not supported; only {choices}")
    fields = pick_fields(table["settings"], arguments)
    grouped = bool(arguments.get("group_query_attention"))
    fields |= {
        "parallel_residual": False,
        "n_query_groups": arguments.get("num_query_groups") if grouped else None,
        "tie_embeddings": not arguments.get("untie_embeddings_and_output_weights"),
        "norm_class_name": name_norm(arguments),
        "rotary_percentage": fields.get("rotary_percentage", 1.0),
        "padding_multiple": 1,
        "vocab_size": arguments["padded_vocab_size"],
        **read_feed_forward(arguments),
        **read_positions(arguments),
        **read_latent_attention(arguments),
        **(read_experts(arguments, table["experts"]) if arguments.get("num_experts") else {}),
    }
    try:
        return Config(name=name, **fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def pick_fields(names: Mapping[str, str], arguments: Arguments) -> dict[str, Any]:
    """Our fields of the arguments that are set, by a table of fields and arguments."""
    return {field: arguments[key] for field, key in names.items() if arguments.get(key) is not None}


def name_norm(arguments: Arguments) -> str:
    """The class of norms, whose weights are stored less 1 with `apply_layernorm_1p`."""
    offset = "Offset" if arguments.get("apply_layernorm_1p") else ""
    return offset + (arguments.get("normalization") or "LayerNorm")


def read_feed_forward(arguments: Arguments) -> dict[str, Any]:
    """The fields of dense layers."""
    if arguments.get("swiglu"):
        return {"mlp_class_name": "LLaMAMLP"}
    activation = {"activation": "relu_squared"} if arguments.get("squared_relu") else {}
    approximate = "tanh" if arguments.get("bias_gelu_fusion") else "none"  # the fused kernel is of the tanh form
    return {"mlp_class_name": "GptNeoxMLP", "gelu_approximate": approximate, **activation}


def read_positions(arguments: Arguments) -> dict[str, Any]:
    """The fields of positions; latent attention has its own scaling."""
    if arguments.get("position_embedding_type") == "learned_absolute":
        return {"position_embedding": "learned"}
    if arguments.get("multi_latent_attention"):
        yarn = arguments.get("rope_type", "yarn") == "yarn"
        return {"rope_interleave": True, "rope_adjustments": pick_fields(YARN_ARGUMENTS, arguments) if yarn else None}
    if arguments.get("use_rope_scaling"):
        return {"rope_adjustments": {"factor": arguments.get("rope_scaling_factor", 8.0), **LLAMA3_SCALING}}
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    return {} if factor is None else {"rope_adjustments": {"factor": factor}}


def read_latent_attention(arguments: Arguments) -> dict[str, Any]:
    """The fields of latent attention, whose norms are part of it."""
    if not arguments.get("multi_latent_attention"):
        return {}
    if not arguments.get("qk_layernorm"):
        raise UserError("multi_latent_attention: without qk_layernorm it is not supported; train with it")
    sizes = {field: arguments.get(key) for field, key in LATENT_ARGUMENTS.items()}
    return {"latent_attention": sizes, "norm_qk": False, "head_size": sizes["qk_rope_head_dim"], "n_query_groups": None}


def read_experts(arguments: Arguments, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    if not arguments.get("swiglu"):
        raise UserError("num_experts: experts without swiglu are not supported; use a model with --swiglu")
    fields = pick_fields(names, arguments)
    layers, every = arguments["num_layers"], arguments.get("moe_layer_freq") or 1
    marks = [int(layer % every == 0) for layer in range(layers)] if isinstance(every, int) else list(every)
    softmax = fields.setdefault("router_score", "softmax") == "softmax"
    first = arguments.get("moe_router_pre_softmax")
    topk, groups = arguments.get("moe_router_topk") or 2, arguments.get("moe_router_group_topk")
    return {
        **fields,
        "mlp_class_name": "LLaMAMoE",
        "n_expert_per_token": topk,
        "router_softmax": "before_top_k" if softmax and first else "after_top_k",
        "norm_topk_prob": not softmax and topk > 1,
        "router_correction": bool(fields.get("router_correction")),
        "n_topk_scores_per_group": topk // groups if groups else None,
        "moe_layers": None if all(marks) else marks,
    }
