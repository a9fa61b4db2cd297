"""What is computed again gives the same gradients to the bit and keeps less."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from litgpt import adapt
from litgpt.errors import UserError
from litgpt.model import layers
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.media import Media
from litgpt.parallel.apply import parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.offload import HostOffload, OffloadedTensor
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.recipe.tuner import LoRA
from tests.layouts.layouts import (
    Case,
    build_global_batch,
    build_model,
    collect_facts,
    measure_differences,
    take_micro_batches,
)
from tests.layouts.pool import POOL

SHAPE: dict[str, Any] = {
    "name": "toy",
    "block_size": 32,
    "padded_vocab_size": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 32,
    "intermediate_size": 88,
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "parallel_residual": False,
    "bias": False,
    "rotary_percentage": 1.0,
    "dropout": 0.1,
}
EXPERTS = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
TOWER = {
    "width": 32,
    "layers": 4,
    "heads": 4,
    "mlp_size": 88,
    "blocks_run": 4,
    "patch": 1,
    "merge": 2,
    "image_token": 47,
}
TOWER |= {"rope_base": 100.0, "deep_layers": [0, 1, 3]}
LATENT = {
    "latent_attention": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "norm_eps": 1e-6,
    },
    "attention_sinks": False,
}
SHAPES = {
    "dense": SHAPE,
    "capped": {**SHAPE, "attention_logit_softcapping": 20.0, "parallel_residual": True, "shared_attention_norm": True},
    "experts": SHAPE | EXPERTS,
    "latent": SHAPE | LATENT | EXPERTS,
    "tower": SHAPE | {"n_layer": 3, "dropout": 0.0, "vision": TOWER},
}


class MemoryTracker(TorchDispatchMode):
    """Tracks the memory that was allocated in its context and is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                memory = value.untyped_storage()
                self.allocated[memory._cdata] = (StorageWeakRef(memory), memory.nbytes())
        return out

    @property
    def bytes(self) -> int:
        """The bytes still in use."""
        return sum(size for memory, size in self.allocated.values() if not memory.expired())


def build(shape: str, recompute: RecomputeArgs | None, tuner: LoRA | None = None) -> GPT:
    with torch.device("meta"):
        model = GPT(Config(**SHAPES[shape]))
    if tuner:
        adapt.attach(model, tuner)
    layout = {"precision": PRECISIONS["32-true"], "compile_blocks": False}
    parallelize(model, None, ParallelArgs(), recompute=recompute, **layout)  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    initialize(model, 1)
    if tuner:
        adapt.initialize_adapter(model, tuner, 1)
        for name, value in adapt.get_adapter_parameters(model).items():
            value.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def measure(model: GPT) -> tuple[dict[str, Tensor], int, int]:
    """Every gradient, the bytes that blocks save for backward, and the multiplications of both passes."""
    torch.manual_seed(3)
    ids, media = torch.arange(64).view(2, 32) % 47, None
    if model.vision is not None:
        ids[1, :16], media = 47, Media(torch.randn(64, 3), ((1, 8, 8),))
    with FlopCounterMode(display=False) as flops:
        with MemoryTracker() as tracker:
            hidden = model(ids, media=media, head=lambda hidden, *_: hidden)
            saved_bytes = tracker.bytes
        hidden.square().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return gradients, saved_bytes, flops.get_total_flops()


def assert_equal(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert grads.keys() == expected.keys()
    for name in grads:
        assert torch.equal(grads[name], expected[name]), name


FULL = RecomputeArgs(granularity="full")
SELECTIVE = RecomputeArgs(granularity="selective")
# the maximum of saved bytes, and the FLOPs, relative to no recomputation with the norms of torch, which save more than
# those of training on a CPU; torch does not count grouped products
CASES = {
    "dense full": (FULL, 0.3, 1.333),
    "dense units of 2": (replace(FULL, num_layers=2), 0.28, 1.333),
    "dense units of 3": (replace(FULL, num_layers=3), 0.28, 1.333),
    "dense first 1": (replace(FULL, method="block"), 0.83, 1.083),
    "dense first 2": (replace(FULL, method="block", num_layers=2), 0.65, 1.167),
    "dense first of fewer": (replace(FULL, method="block", num_layers=9), 0.3, 1.333),
    "dense mlp": (replace(SELECTIVE, modules=["mlp"]), 0.705, 1.15),
    "dense layernorm": (replace(SELECTIVE, modules=["layernorm"]), 0.86, 1.0),
    "dense activation": (replace(SELECTIVE, modules=["activation"]), 0.905, 1.0),
    "dense norms in units of mlp": (replace(SELECTIVE, modules=["mlp", "norms", "activation"]), 0.56, 1.15),
    "dense offload": (RecomputeArgs(offload=True), 1.25, 1.0),
    "capped core_attn": (replace(SELECTIVE, modules=["core_attn"]), 0.755, 1.023),
    "capped all": (replace(SELECTIVE, modules=["core_attention", "mlp", "norms"], offload=True), 0.455, 1.152),
    "experts full": (FULL, 0.305, 1.333),
    "experts moe": (replace(SELECTIVE, modules=["moe"]), 0.7, 1.01),
    "experts moe_act": (replace(SELECTIVE, modules=["moe_act"]), 0.95, 1.0),
    "latent mla_up_proj": (replace(SELECTIVE, modules=["mla_up_proj"]), 0.95, 1.09),
    "tower full": (FULL, 0.37, 1.235),
    "tower units of 2": (replace(FULL, num_layers=2), 0.36, 1.258),
    "tower offload": (RecomputeArgs(offload=True), 1.25, 1.0),
    "latent all": (replace(SELECTIVE, modules=["core_attention", "moe", "norms", "up_projection"]), 0.372, 1.186),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_equal_to_the_bit_and_less_is_saved(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "is_trained_on_cpu", lambda _: False)
    settings, max_bytes, expected_flops = CASES[case]
    shape = case.split()[0]
    expected, all_bytes, all_flops = measure(build(shape, None))
    gradients, saved_bytes, flops = measure(build(shape, settings))
    assert_equal(gradients, expected)
    assert saved_bytes <= max_bytes * all_bytes
    assert flops / all_flops == pytest.approx(expected_flops, abs=2e-3)


@pytest.mark.parametrize("settings", [FULL, replace(SELECTIVE, modules=["mlp", "norms", "activation"])])
def test_dropout_in_adapters_is_the_same_when_recomputed(settings: RecomputeArgs) -> None:
    tuner = LoRA(r=4, dropout=0.3)
    expected, *_ = measure(build("dense", None, tuner))
    gradients, *_ = measure(build("dense", settings, tuner))
    assert any("lora_a" in name for name in gradients)
    assert_equal(gradients, expected)


def test_nothing_is_computed_again_without_gradients() -> None:
    model = build("dense", replace(SELECTIVE, modules=["mlp", "norms"]))
    expected = build("dense", None).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.arange(8)[None]), expected(torch.arange(8)[None]))


@pytest.mark.parametrize(
    ("shape", "part", "hint"),
    [("dense", "moe", "mlp"), ("experts", "mlp", "moe"), ("dense", "mla_up_proj", "core_attention")],
)
def test_parts_that_the_model_lacks_are_refused(shape: str, part: Any, hint: str) -> None:
    with pytest.raises(UserError, match=f"this model has none; use {hint}"):
        build(shape, replace(SELECTIVE, modules=[part]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 2}, "recompute.num_layers: 2 has no effect with recompute.granularity: none"),
        ({"method": "block"}, "set recompute.granularity: full"),
        ({"modules": ["mlp"], "granularity": "full"}, "set recompute.granularity: selective"),
        ({"modules": [], "granularity": "selective"}, "recompute.modules: empty"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RecomputeArgs(**settings)


LAYOUTS = [
    (Case("gemma", 2, {"tensor": 2}), replace(SELECTIVE, modules=["core_attention", "norms", "activation"])),
    (Case("sinks", 2, {"tensor": 2}), SELECTIVE),
    (Case("tied", 4, {"tensor": 2, "pipeline": 2}), FULL),
    (Case("deep", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}), replace(FULL, num_layers=2)),
    (Case("deep", 2, {"pipeline": 2, "zero": 3}), replace(SELECTIVE, modules=["mlp", "norms"], offload=True)),
    (Case("moe", 2, {"expert": 2}), replace(SELECTIVE, modules=["moe", "norms"])),
    (Case("latent", 2, {"context": 2}), replace(SELECTIVE, modules=["core_attention", "up_projection"])),
    pytest.param(
        Case("latent", 2, {"tensor": 2}), replace(SELECTIVE, modules=["up_projection"]), marks=pytest.mark.slow
    ),
    (Case("dense", 2, {"data_shard": 2}, tuner="lora"), replace(FULL, num_layers=2, offload=True)),
    (Case("dense", 2, {"data_replicate": 2}), FULL),
    pytest.param(Case("sections", 2, {"tensor": 2}, images=(0, 5)), FULL, marks=pytest.mark.slow),
    pytest.param(
        Case("vision", 2, {"data_shard": 2}, images=(5,)), replace(FULL, offload=True), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("case", "settings"), LAYOUTS, ids=lambda value: str(value)[:60])
def test_every_axis_trains_the_same_with_recomputation(case: Case, settings: RecomputeArgs) -> None:
    case = replace(case, more={"recompute": settings})
    differences = measure_differences(case, POOL.run(collect_facts, case, ranks=case.ranks))
    assert {kind: far for kind, far in differences.items() if far > 1e-8} == {}


@pytest.mark.parametrize("tuner", [None, "lora"])
def test_split_attention_has_the_same_gradients_to_the_bit(tuner: str | None) -> None:
    case = Case("sinks", 2, {"tensor": 2}, tuner=tuner)
    recomputed = POOL.run(collect_facts, replace(case, more={"recompute": SELECTIVE}), ranks=2)
    for with_recompute, without in zip(recomputed, POOL.run(collect_facts, case, ranks=2), strict=True):
        assert_equal(with_recompute["gradient"], without["gradient"])
        assert_equal(with_recompute["after"], without["after"])


def collect_offloaded_shapes(case: Case) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """The shapes of what a rank keeps in host memory, and of its parameters while they are gathered."""
    sent: set[tuple[int, ...]] = set()
    shapes: set[tuple[int, ...]] = set()
    pack = HostOffload.pack

    def record(host: HostOffload, tensor: Tensor) -> Any:
        packed = pack(host, tensor)
        if isinstance(packed, OffloadedTensor):
            sent.add(tuple(tensor.shape))
        return packed

    HostOffload.pack = record  # type: ignore[method-assign]
    try:
        mesh = Mesh(ParallelArgs(**case.parallel).resolve_dims(case.ranks), "cpu")
        model = build_model(case, mesh)
        batches = take_micro_batches(build_global_batch(packed=False), mesh.rank("data"), 2, 1)
        model(batches[0].ids).sum().backward()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        for block in model.blocks:
            locals_of = (getattr(value, "_local_tensor", value) for value in block.parameters())
            shapes |= {tuple(value.shape) for value in locals_of if value.dim() > 1}
    finally:
        HostOffload.pack = pack  # type: ignore[method-assign]
    return sent, shapes


def test_parameters_stay_on_the_device_when_activations_leave_it() -> None:
    case = Case("shared experts", 4, {"expert": 2}, more={"recompute": RecomputeArgs(offload=True)})
    for sent, shapes in POOL.run(collect_offloaded_shapes, case, ranks=4):
        assert len(sent) > 10
        stacks = {(shape[0], *sorted(shape[1:], reverse=True)) for shape in shapes if len(shape) == 3}
        assert stacks == {(4, 32, 16)}  # or transposed, which rows of some expert may be as well
        assert not sent & stacks
