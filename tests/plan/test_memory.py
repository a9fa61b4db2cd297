"""The memory of planned steps is that of real ones, by the allocator of torch and by what the tensors hold."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from litgpt.data.stream.batch import Batch
from litgpt.finetune_spec import find_spec
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.allocations import AllocationRecorder
from litgpt.plan.batches import build_batches
from litgpt.plan.build_spec import build_spec
from litgpt.plan.host_memory import list_offloaded_states
from litgpt.plan.memory import StepMemory, list_host_kinds, plan_step_memory, record_step
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.store.save_model import save_model
from litgpt.train import build_state
from litgpt.train.build_state import build_train_state
from litgpt.train.objectives import build_objective
from litgpt.train.run_spec import RunSpec
from litgpt.train.step import train_step
from litgpt.train.train_state import TrainState

CPU = torch.device("cpu")
TOKENS = 128
SHAPE = {
    **{"name": "tiny", "n_layer": 3, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "block_size": TOKENS},
    **{"padded_vocab_size": 512, "mlp_class_name": "LLaMAMLP", "intermediate_size": 160, "norm_class_name": "RMSNorm"},
    **{"bias": False, "rotary_percentage": 1.0, "parallel_residual": False},
}
TRAIN = {"micro_batch_size": 2, "global_batch_size": 4, "max_seq_length": TOKENS, "max_norm": 1.0}
PRETRAIN = {"model_name": "tiny", "model_config": SHAPE}
FINETUNE = {"checkpoint_dir": "EleutherAI/pythia-14m"}
PREFERENCES = {
    **FINETUNE,
    "precision": "bf16-true",
    "data": {"class_path": "Preferences", "init_args": {"sources": "pairs.jsonl"}},
}
EXPERTS = {
    **SHAPE,
    **{"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 32},
}


class Case(NamedTuple):
    """A recipe to plan and to run, with two documents in each row if it is `packed`."""

    command: str
    settings: dict[str, Any]
    packed: bool = False


FAST = {
    "chunked": Case("pretrain", PRETRAIN | {"precision": "32-true"}),
}
SLOW = {
    "recompute": Case("pretrain", PRETRAIN | {"precision": "bf16-mixed", "recompute": {"granularity": "full"}}),
    "plain": Case("pretrain", PRETRAIN | {"precision": "bf16-mixed", "loss": {"impl": "plain"}}),
    "bf16": Case("pretrain", PRETRAIN | {"precision": "bf16-true"}),
    "selective": Case("pretrain", PRETRAIN | {"precision": "32-true", "recompute": {"granularity": "selective"}}),
    "accumulation": Case("pretrain", PRETRAIN | {"train": {**TRAIN, "micro_batch_size": 1}}),
    "packed": Case("pretrain", PRETRAIN | {"train": {**TRAIN, "micro_batch_size": 1}}, packed=True),
    "one-batch": Case("pretrain", PRETRAIN | {"train": {**TRAIN, "micro_batch_size": 4}}),
    "experts": Case("pretrain", PRETRAIN | {"precision": "bf16-mixed", "model_config": EXPERTS}),
    "capacity": Case(
        "pretrain",
        PRETRAIN
        | {"precision": "bf16-mixed", "model_config": EXPERTS}
        | {"moe": {"expert_capacity_factor": 1.25, "pad_expert_input_to_capacity": True}},
    ),
    "tensorwise": Case("pretrain", PRETRAIN | {"precision": "bf16-mixed", "fp8": {"recipe": "tensorwise"}}),
    "sgd": Case("pretrain", PRETRAIN | {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}}),
    "states-in-bf16": Case(
        "pretrain",
        PRETRAIN
        | {"precision": "32-true"}
        | {
            "optimizer": {
                "class_path": "PrecisionAwareAdamW",
                "init_args": {"lr": 1e-3, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
            }
        },
    ),
    "muon": Case("pretrain", PRETRAIN | {"optimizer": {"class_path": "Muon", "init_args": {"lr": 0.01}}}),
    "full": Case("finetune_full", FINETUNE | {"precision": "bf16-true"}),
    "lora": Case("finetune_lora", FINETUNE | {"precision": "bf16-true"}),
    "qlora": Case("finetune_lora", FINETUNE | {"precision": "bf16-true", "quantize": "bnb.nf4"}),
    "adapter": Case("finetune_adapter", FINETUNE | {"precision": "32-true"}),
    "preferences": Case("dpo", PREFERENCES),
    "rated": Case("kto", PREFERENCES),
}
COUNTED = {
    "scores-ahead": Case("dpo", PREFERENCES | {"preference": {"precompute_ref_log_probs": True}}),
    "rewards": Case("rm", PREFERENCES),
    "states-on-host": Case(
        "pretrain",
        PRETRAIN
        | {"precision": "32-true"}
        | {"optimizer": {"class_path": "PrecisionAwareAdamW", "init_args": {"lr": 1e-3, "offload_fraction": 0.6}}},
    ),
    "activations-on-host": Case("pretrain", PRETRAIN | {"precision": "32-true", "recompute": {"offload": True}}),
    "reference-on-host": Case(
        "dpo",
        PREFERENCES | {"tuner": {"class_path": "Full"}, "preference": {"reference_offload": True}},
    ),
}
"""Those whose peak the allocator does not tell: host memory is the same, or more was in use before the step."""


def build_case(case: Case) -> tuple[Any, Any]:
    """The recipe of a case, and its spec."""
    tree = {"out_dir": "unused", "train": TRAIN} | case.settings
    cls = COMMANDS[case.command].import_recipe()
    recipe = build_recipe(cls, merge_settings(cls, {}, tree, trusted=True))
    return recipe, build_spec(case.command, recipe)


def plan(case: Case) -> StepMemory:
    recipe, spec = build_case(case)
    micro_batches = min(2, recipe.train.accumulation(1))
    return plan_step_memory(recipe, spec, None, length=TOKENS, steps=10, micro_batches=micro_batches)


def fill_batches(recipe: Any, spec: RunSpec, data_ranks: int = 1) -> list[Batch]:
    """The micro-batches of a step with random tokens."""
    generator = torch.Generator().manual_seed(1)
    batches = build_batches(recipe, spec, TOKENS, recipe.train.accumulation(data_ranks))
    ids = torch.randint(0, 512, batches[0].ids.shape, generator=generator)
    answers = None if batches[0].answers is None else torch.arange(len(ids), dtype=torch.int32)[:, None].expand_as(ids)
    return [replace(batches[0], ids=ids, labels=ids.roll(-1, 1), answers=answers)] * len(batches)


def build_real_state(case: Case) -> tuple[TrainState, list[Batch], Any]:
    """A state with real tensors, the micro-batches of a step, and keyword arguments of `train_step`."""
    recipe, spec = build_case(case)
    with patch.object(build_state, "uses_cpu_paths", lambda _: False):  # as on an accelerator
        state = build_train_state(recipe, spec, None, CPU, resumed=False, steps=10)
    if spec.scores_ahead:
        state.reference = None
    batches = fill_batches(recipe, spec)
    if case.packed:
        half = TOKENS // 2
        documents, positions = (torch.arange(TOKENS)[None] // half).int(), torch.arange(TOKENS)[None] % half
        batches = [replace(batch, documents=documents, positions=positions) for batch in batches]
    return state, batches, {"objective": build_objective(recipe, spec, ()), "max_norm": 1.0}


@contextmanager
def profile_memory() -> Iterator[list[int]]:
    """The bytes in use after each call of the allocator within the block, set at its end."""
    totals: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield totals
    events = profiler.profiler.kineto_results.events()
    total = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        totals.append(total)


def check_peak(case: Case) -> None:
    """Check the peak against the allocator, which also sees what kernels allocate inside."""
    with accelerator_paths(), profile_memory() as totals:
        state, batches, settings = build_real_state(case)
        for micro_batches in (batches[:1], batches):
            train_step(state, micro_batches, **settings)
    planned = plan(case)
    assert planned.peak == sum(planned.parts.values())
    assert planned.peak == pytest.approx(max(totals), rel=0.1)


def check_parts(case: Case) -> None:
    """Check what the memory holds against a real step with the same recorder, and against the tensors of the run."""
    planned = plan(case)
    recorder = AllocationRecorder()
    with accelerator_paths(), recorder:
        state, batches, settings = build_real_state(case)
        gradients = []
        for optimizer in state.optimizers:
            optimizer.register_step_pre_hook(lambda *_: gradients.append(count_gradients(state)))
        host_kinds = list_host_kinds(*build_case(case))
        real = record_step(recorder, state, batches, settings["objective"], max_norm=1.0, host_kinds=host_kinds)
    assert planned.host == pytest.approx(real.host, rel=0.03)
    for kind, size in real.parts.items():
        assert planned.parts[kind] == pytest.approx(size, rel=0.03, abs=4096), kind
    held = [*state.core.parameters(), *state.core.buffers()]
    states = [value for optimizer in state.optimizers for kept in optimizer.state.values() for value in kept.values()]
    assert planned.parts["parameters"] == pytest.approx(count_bytes(held), rel=0.03)
    on_host = [value for optimizer in state.optimizers for value in list_offloaded_states(optimizer)]
    assert planned.parts["optimizer"] == pytest.approx(count_bytes(states) - count_bytes(on_host), rel=0.03)
    assert planned.host >= count_bytes(on_host)
    if len(batches) > 1:
        assert planned.parts["gradients"] == pytest.approx(gradients[-1], rel=0.03)


def count_gradients(state: TrainState) -> int:
    return count_bytes(parameter.grad for parameter in state.parameters())


def count_bytes(values: Any) -> int:
    """The bytes of all tensors among some values, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in values
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("name", FAST)
def test_the_planned_peak_is_that_of_the_allocator(name: str) -> None:
    check_peak(FAST[name])


@pytest.fixture(scope="module")
def bitsandbytes() -> None:
    """Import it outside of a step: it logs an exception then, and pytest keeps its frames with the step's tensors."""
    importlib.import_module("bitsandbytes")


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("name", SLOW)
def test_the_planned_peaks_of_many_recipes_are_those_of_the_allocator(name: str) -> None:
    check_peak(SLOW[name])


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(
    "name",
    [
        *COUNTED,
        *("recompute", "selective", "plain", "packed", "experts", "capacity", "states-in-bf16", "lora", "qlora"),
        "tensorwise",
    ],
)
def test_what_the_memory_of_many_recipes_holds_is_that_of_real_steps(name: str) -> None:
    check_parts((SLOW | COUNTED)[name])


@pytest.mark.parametrize("tuner", ["Full", pytest.param("LoRA", marks=pytest.mark.slow)])
def test_a_reference_with_other_weights_is_planned_as_it_is_loaded(tmp_path: Path, tuner: str) -> None:
    config = Config(**SHAPE)
    for name in ("policy", "other"):
        save_model(tmp_path / name, GPT(config), config=config)
    recipe, planned_spec = build_case(
        Case(
            "dpo",
            PREFERENCES
            | {"checkpoint_dir": str(tmp_path / "policy"), "tuner": {"class_path": tuner}}
            | {"preference": {"reference": str(tmp_path / "other")}},
        )
    )
    planned = plan_step_memory(recipe, planned_spec, None, length=TOKENS, steps=10, micro_batches=2)
    state = build_train_state(recipe, find_spec(recipe), None, CPU, resumed=False, steps=10)
    assert state.reference is not None
    real = count_bytes(state.reference.values.values())  # without norms, which are the same in both models
    assert planned.parts["reference"] == pytest.approx(real, rel=0.01) and real > 300_000


def test_activations_are_the_tensors_that_autograd_saves() -> None:
    case = Case("pretrain", PRETRAIN | {"precision": "32-true", "loss": {"impl": "plain"}})
    planned = plan(case)
    state, batches, settings = build_real_state(case)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*state.core.parameters(), *state.core.buffers())}
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with accelerator_paths(), hooks:
        loss, _ = settings["objective"].loss(state.model, state.local_batch(batches[0]))
    kept = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in held]
    log_softmax = batches[0].ids.numel() * 512 * 4
    assert planned.phase == "backward"  # of the logits, before anything saved is freed
    assert planned.parts["activations"] + log_softmax == pytest.approx(count_bytes(kept), rel=0.03)
    assert loss.requires_grad
