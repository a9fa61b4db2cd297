"""Write tiny checkpoints with Megatron-core on a CPU, and the logits that its models compute, for the tests of reading.

    pip install megatron-core==0.16.1
    torchrun --nproc-per-node 1 tests/store/write_megatron.py out && torchrun --nproc-per-node 2 \
        tests/store/write_megatron.py out && tar -C out -cJf tests/store/megatron.tar.xz .

Each folder is `torch_dist`, with the arguments that Megatron-LM stores, and has `logits.pt`. With two processes, the
model is split by tensor parallelism.
"""

import shutil
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

VOCAB = 40
SIZES = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24, "add_bias_linear": False,
    "normalization": "RMSNorm",
}  # fmt: skip
EXPERTS = {
    "moe_router_topk": 2, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 12,
    "moe_router_load_balancing_type": "none",
}  # fmt: skip
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5,
    "multi_latent_attention": True, "rope_type": "yarn", "rotary_scaling_factor": 4, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
SIGMOID = {
    "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
}  # fmt: skip
DENSE = {**SIZES, "num_query_groups": 2, "qk_layernorm": True, "add_qkv_bias": True}
MODELS = {
    "dense": DENSE,
    "experts": {**SIZES, **EXPERTS, "num_query_groups": 2, "num_moe_experts": 4},
    "latent": {**SIZES, **EXPERTS, **LATENT, **SIGMOID, "num_moe_experts": 4, "moe_layer_freq": [0, 1],
               "qk_layernorm": True},
    "separate": {**SIZES, **EXPERTS, "num_query_groups": 2, "num_moe_experts": 4},
    "gelu": {**SIZES, "normalization": "LayerNorm", "add_bias_linear": True},
}  # fmt: skip


class Attention(torch.nn.Module):
    """Causal attention whose values may be narrower than its keys, which Megatron-core has only for GPUs."""

    def __init__(self, config, *_args, softmax_scale=None, k_channels=None, **_options):
        super().__init__()
        self.scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5

    def forward(self, query, key, value, *_args, **_options):
        """(T, B, H, S) each -> (T, B, H S)."""
        groups = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return y.permute(2, 0, 1, 3).flatten(2)


def build_model(values):
    """Build a model with random weights."""
    gated = values["normalization"] == "RMSNorm"
    kind = MLATransformerConfig if "kv_lora_rank" in values else TransformerConfig
    config = kind(
        **values, use_cpu_initialization=True, gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu,
        init_method_std=0.3,
    )  # fmt: skip
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=values["normalization"]
    )
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = Attention
    tied = "num_moe_experts" in values and "kv_lora_rank" not in values
    model = GPTModel(
        config, spec, VOCAB, max_sequence_length=64, position_embedding_type="rope",
        share_embeddings_and_output_weights=tied, rotary_base=10000, parallel_output=False,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("linear_proj.bias") or name.endswith("linear_fc2.bias"):  # not split
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
        elif name.endswith("bias"):
            values = torch.empty(len(parameter) * dist.get_world_size()).uniform_(-0.5, 0.5)
            parameter.data = values.chunk(dist.get_world_size())[dist.get_rank()].clone()
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            torch.nn.init.uniform_(buffer, -0.2, 0.2)
    return model.eval(), tied


def list_arguments(values, tied):
    """The arguments of Megatron-LM for a model."""
    names = {"num_moe_experts": "num_experts"}
    return Namespace(
        **{names.get(key, key): value for key, value in values.items()},
        swiglu=values["normalization"] == "RMSNorm", untie_embeddings_and_output_weights=not tied,
        group_query_attention="num_query_groups" in values, max_position_embeddings=64, padded_vocab_size=VOCAB,
        position_embedding_type="rope", rotary_base=10000, rotary_percent=1.0, norm_epsilon=1e-5,
        bias_gelu_fusion=False, params_dtype=torch.float32, attention_backend=None,
    )  # fmt: skip


def write(folder, values):
    """Write the checkpoint of one model, with its logits."""
    torch.manual_seed(1)
    model, tied = build_model(values)
    tokens = torch.arange(24)[None] * 7 % VOCAB
    with torch.no_grad():
        logits = model(tokens, torch.arange(24)[None], torch.ones(1, 1, 24, 24, dtype=torch.bool).triu(1))
    checkpoint = folder / "iter_0000003"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.mkdir(parents=True)
    dist.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": folder.name == "separate", "dp_cp_group": group}
    state = {"model": model.sharded_state_dict(metadata=metadata), "args": list_arguments(values, tied), "iteration": 3}
    dist_checkpointing.save(state, str(checkpoint))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    torch.save({"tokens": tokens, "logits": logits}, folder / "logits.pt")


def main():
    """Write the checkpoints of all models."""
    torch.cuda.synchronize, torch.cuda.current_device = lambda *_: None, lambda: "cpu"  # Megatron-core saves from GPUs
    moe_utils.te_general_gemm, multi_latent_attention.TELinear = None, Attention  # of Transformer Engine: not there
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    models = MODELS if ranks == 1 else {"tensor": {**DENSE, "tensor_model_parallel_size": ranks}}
    for name, values in models.items():
        write(Path(sys.argv[1]) / name, values)


if __name__ == "__main__":
    main()
