"""Runs of other programs with published memory or times, and the recipes of this package that are most like them."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from litgpt.plan.build_spec import build_spec
from litgpt.plan.ranks import RunPlan, plan_run
from litgpt.plan.repeated_layers import Estimate, estimate_run
from litgpt.plan.table import compute_total
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.gpu import Gpu, build_gpu
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec

# Where the figures are
SWIFT = "https://swift.readthedocs.io/en/latest/Megatron-SWIFT/Quick-start.html#benchmark"
TITAN = "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "https://github.com/pytorch/torchtitan/blob/0413364/docs/performance.md"
AUTOMODEL = "https://github.com/NVIDIA-NeMo/Automodel/blob/01926a5/docs/performance-summary.md"
AUTOMODEL_BLOG = "https://huggingface.co/blog/nvidia/accelerating-fine-tuning-nvidia-nemo-automodel"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/061f2c7/scripts/train/benchmarking/README.md"
PAI_MEGATRON = "https://github.com/alibaba/Pai-Megatron-Patch/issues/643"

A100, A800, H100, H800 = (build_gpu(name) for name in ("A100-80GB", "A800-80GB", "H100-80GB", "H800-80GB"))
# 800 Gb/s per node: https://www.alibabacloud.com/help/en/pai/basic-concepts-1
PAI_A800 = replace(A800, network_bandwidth=12.5)
# 96 GB of HBM2e and 500 W; its peak, by the source, is between those of SXM and NVL
TITAN_H100 = replace(H100, memory=94.5, memory_bandwidth=2400, bf16_tflops=912, fp8_tflops=1824)


class Published(NamedTuple):
    """A published run, and the recipe that is most like it.

    Attributes:
        source: the address of its figures.
        seconds: of a step; None if none is published for this layout.
        memory: of the rank that needs the most, in GiB or, where the source says so, GB.
        planned: the numbers of layers of two models, from whose plans that of the whole model follows.
    """

    source: str
    gpu: Gpu
    settings: dict[str, Any]
    seconds: float | None = None
    memory: float | None = None
    command: str = "pretrain"
    planned: tuple[int, int] = (1, 2)


def train(length: int, micro: int, total: int) -> dict[str, Any]:
    return {"max_seq_length": length, "micro_batch_size": micro, "global_batch_size": total}


def per_gpu(tokens_per_second: float, gpus: int, settings: dict[str, Any]) -> float:
    """Seconds of a step by its tokens per second and GPU."""
    return settings["global_batch_size"] * settings["max_seq_length"] / gpus / tokens_per_second


BF16 = {"precision": "bf16-true"}
FULL, PLAIN, EAGER = {"granularity": "full"}, {"impl": "plain"}, {"compile": False}
# every second layer; torchtitan's "selective op" recomputes every second product instead
HALF = FULL | {"method": "block"}
DENSE = {"model_name": "Qwen2.5-14B", "devices": 8, "train": train(8192, 1, 16)}
EXPERTS = {"model_name": "Qwen3-30B-A3B", "devices": 8}
LLAMA = {"model_name": "Llama-3.1-8B", "devices": 8}
FP8 = {"recipe": "tensorwise", "param_gather": True}
LLAMA_2 = {"model_name": "Llama-2-13b-hf", "devices": 8, "num_nodes": 8, "train": train(4096, 2, 128)}


def titan(tokens_per_second: float, nodes: int, **settings: Any) -> Published:
    """A row of torchtitan's tables of Llama 3.1 8B, with rows of 8,192 tokens, two per GPU."""
    rows = train(8192, 2, 16 * nodes)
    seconds = per_gpu(tokens_per_second, 8 * nodes, rows)
    recipe = LLAMA | {"num_nodes": nodes, "train": rows, "recompute": HALF} | settings
    return Published(TITAN, TITAN_H100, recipe, seconds, planned=(2, 4))


MPT = {
    "7b": {"n_layer": 32, "n_embd": 4096, "n_head": 32},
    "30b": {"n_layer": 48, "n_embd": 7168, "n_head": 56},
}
"""Of llm-foundry's `scripts/train/yamls/pretrain`."""


def foundry(
    size: str, gpu: Gpu, length: int, micro: int, total: int, tokens_per_second: float, *, recomputed: bool = True
) -> Published:
    """A row of llm-foundry's tables with 8 GPUs; its models have biases of attention scores instead of rotations."""
    shape = MPT[size] | {"block_size": length, "padded_vocab_size": 50368, "norm_class_name": "LayerNorm"}
    shape |= {"bias": False, "mlp_class_name": "GptNeoxMLP", "parallel_residual": False, "tie_embeddings": True}
    recipe = {"model_name": "mpt", "model_config": {"name": "mpt"} | shape, "devices": 8}
    recipe |= EAGER | {"train": train(length, micro, total)} | ({"recompute": FULL} if recomputed else {})
    return Published(FOUNDRY, gpu, recipe, per_gpu(tokens_per_second, 8, recipe["train"]))


def pai_megatron(seconds: float, micro_batches: int, **axes: int) -> Published:
    """A row of a report about Qwen3-30B-A3B on 16 H800, with rows of 8,192 tokens."""
    rows = train(8192, 1, micro_batches)
    recipe = EXPERTS | {"num_nodes": 2, "train": rows, "parallel": axes, "moe": {"expert_capacity_factor": 1.0}}
    return Published(PAI_MEGATRON, H800, recipe, seconds, planned=(2 * axes["pipeline"], 3 * axes["pipeline"]))


# Megatron's kernels are fused, those of transformers with DeepSpeed are not.
ZERO = DENSE | {"recompute": FULL} | EAGER
PIPELINE = {"parallel": {"pipeline": 2, "expert": 8}}
EXPERT_RUN = EXPERTS | {"num_nodes": 2, "train": train(8192, 1, 16), "recompute": FULL}
BLOG = EXPERTS | BF16 | {"train": train(4096, 1, 8)}
RUNS = {
    "megatron-14b": Published(
        *(SWIFT, A800, DENSE | {"parallel": {"tensor": 4, "zero": 2}, "recompute": {"granularity": "selective"}}),
        *(9.04, 64),
    ),
    "zero2-14b": Published(SWIFT, A800, ZERO | {"parallel": {"zero": 2}, "loss": PLAIN}, 10.32, 80),
    "zero3-14b": Published(SWIFT, A800, ZERO | {"parallel": {"zero": 3}, "loss": PLAIN}, 10.56, 58),
    # the layout of the script today
    "megatron-30b-a3b": Published(SWIFT, PAI_A800, EXPERT_RUN | PIPELINE | {"loss": PLAIN}, memory=60, planned=(4, 6)),
    # that of the script with which the figures were published (ms-swift 55d5e7d, examples/train/megatron/qwen3_moe.sh);
    # without another setting, Megatron-Core splits the matrices of experts as the others
    "megatron-30b-a3b-tensor": Published(
        *(SWIFT, PAI_A800, EXPERT_RUN | {"parallel": {"tensor": 2, "expert": 8, "expert_tensor": 2, "zero": 2}}, 9.6),
    ),
    # blog_experiments/bench_automodel.py of AutoModel's branch blog/transformers-v5-automodel: Adam in bfloat16, no
    # recomputation, the memory that torch has allocated, and the time without that of the optimizer
    "automodel-30b-a3b": Published(
        *(AUTOMODEL_BLOG, H100, BLOG | {"parallel": {"expert": 8}}, per_gpu(11340, 8, BLOG["train"]), 48.1),
    ),
    "transformers-30b-a3b": Published(
        *(AUTOMODEL_BLOG, H100, BLOG | EAGER, per_gpu(3075, 8, BLOG["train"])),
    ),
    # examples/benchmark/configs/qwen3_moe_30b_te_deepep.yaml
    "automodel-30b-a3b-recomputed": Published(
        *(AUTOMODEL, H100, BLOG | {"train": train(4096, 4, 512), "parallel": {"expert": 8}, "recompute": FULL}, 21.773),
    ),
    # the table names no optimized kernels for this row
    "automodel-8b-lora": Published(
        *(AUTOMODEL, H100),
        {
            "checkpoint_dir": "meta-llama/Llama-3.1-8B",
            "devices": 1,
            "precision": "bf16-true",
            "train": train(4096, 2, 32),
        }
        | EAGER,
        10.51,
        command="finetune_lora",
    ),
    "titan-8": titan(6667, 1),
    "titan-8-eager": titan(5762, 1, **EAGER),
    "titan-128": titan(6514, 16),
    "titan-128-eager": titan(5605, 16, **EAGER),
    "titan-8-fp8": titan(8532, 1, fp8=FP8)._replace(memory=76.8, planned=(4, 6)),
    "titan-13b": Published(TITAN_A100, A100, LLAMA_2, 2 * 4096 / 2162),
    "titan-13b-recomputed": Published(TITAN_A100, A100, LLAMA_2 | {"recompute": HALF}, 2 * 4096 / 1914, planned=(2, 4)),
    "mpt-7b-2k": foundry("7b", A100, 2048, 6, 96, 4641, recomputed=False),
    "mpt-7b-2k-h100": foundry("7b", H100, 2048, 6, 48, 10643, recomputed=False),
    "mpt-30b-8k": foundry("30b", A100, 8192, 1, 168, 574),
    "mpt-30b-4k": foundry("30b", A100, 4096, 1, 168, 814),
    "mpt-30b-2k": foundry("30b", A100, 2048, 3, 504, 916),
    # plans of the following take up to a minute, and no test runs them; tutorials/experiments.md has their figures
    "mpt-7b-32k": foundry("7b", A100, 32768, 2, 32, 1672),
    "mpt-7b-16k": foundry("7b", A100, 16384, 4, 64, 2453),
    "mpt-7b-8k": foundry("7b", A100, 8192, 8, 128, 3206),
    "mpt-7b-4k": foundry("7b", A100, 4096, 16, 256, 3684),
    "pai-pipeline-2": pai_megatron(10.361, 128, pipeline=2, expert=8),
    "pai-pipeline-4": pai_megatron(20.992, 256, pipeline=4, expert=4),
}

CHUNKED, COMPILED = {"loss": {"impl": "chunked"}}, {"compile": True}
TENSOR = {"parallel": {"tensor": 2, "zero": 3}, "recompute": {"granularity": "selective", "modules": ["mlp"]}}
SMALLER: dict[str, dict[str, Any]] = {
    "megatron-14b": TENSOR,
    "zero2-14b": TENSOR | CHUNKED | COMPILED,
    "zero3-14b": CHUNKED | COMPILED,
    "megatron-30b-a3b": {"parallel": {"expert": 8}} | CHUNKED,
    "automodel-30b-a3b": {"recompute": {"granularity": "selective", "modules": ["norms", "activation"]}},
    "titan-8-fp8": {"train": train(8192, 1, 16), "recompute": HALF | {"num_layers": 6}},
}
"""Settings that other layouts of published runs have instead, with the same rows per step on the same GPUs, and with
less memory in no more time."""


def build_layers(run: Published, layers: int) -> tuple[Training, RunSpec]:
    """The recipe of a run and its spec, with a number of layers, half of which are recomputed if not all are."""
    settings = dict(run.settings)
    if settings.get("recompute", {}).get("method") == "block":
        settings["recompute"] = settings["recompute"] | {"num_layers": layers // 2}
    recipe, spec = build_settings(run.command, settings)
    return recipe, replace(spec, config=replace(spec.config, n_layer=layers))


def build_settings(command: str, settings: dict[str, Any]) -> tuple[Training, RunSpec]:
    """The recipe of a command with these settings, and its spec."""
    settings = {"precision": "bf16-mixed", "out_dir": "unused"} | settings
    recipe_class = COMMANDS[command].import_recipe()
    recipe = build_recipe(recipe_class, merge_settings(recipe_class, {}, settings, trusted=True))
    return recipe, build_spec(command, recipe)


def count_layers(run: Published) -> int:
    """The number of layers of the whole model."""
    recipe, _ = build_layers(run, run.planned[0])
    return build_spec(run.command, recipe).config.n_layer


@cache
def plan_pair(name: str) -> tuple[RunPlan, RunPlan]:
    """The plans of a run with the models of few layers."""
    run = RUNS[name]
    first, second = (plan_run(*build_layers(run, layers), run.gpu) for layers in run.planned)
    return first, second


def extrapolate(name: str, values: tuple[float, float]) -> float:
    """The value of the whole model, whose layers add as much as each other."""
    run = RUNS[name]
    slope = (values[1] - values[0]) / (run.planned[1] - run.planned[0])
    return values[0] + slope * (count_layers(run) - run.planned[0])


def plan_memory(name: str) -> float:
    """GiB of the rank that needs the most, with the allowance."""
    first, second = (max(map(compute_total, plan.ranks.values())) for plan in plan_pair(name))
    return extrapolate(name, (first, second))


def plan_seconds(name: str) -> float:
    """Seconds of a step."""
    first, second = (plan.time for plan in plan_pair(name))
    assert first is not None and second is not None
    return extrapolate(name, (first.seconds, second.seconds))


@cache
def plan_smaller(name: str) -> Estimate:
    """What the layout of a run with less memory needs."""
    run = RUNS[name]
    return estimate_run(*build_settings(run.command, run.settings | SMALLER[name]), run.gpu)
