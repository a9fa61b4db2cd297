"""Layouts of a run, and all that one says of a few training steps: the same, whatever the layout.

A case is a small model, a batch of uneven rows, and `parallel:` settings over some ranks. What the ranks say of first
weights, loss, gradients, their norm and the weights after three steps is put together under full parameter names and
held against one process that has the whole batch.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import quantization
from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import LoRA, Tuner
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.step import TrainState, gradients, train_step
from tests.layouts.pool import POOL
from tests.store.models import small

ROWS, LENGTH = 8, 22  # no multiple of what tokens are cut into
Facts = dict[str, dict[str, Tensor]]

SHAPES: dict[str, Config] = {
    "dense": small("Qwen2.5-0.5B", tie_embeddings=False, bias=True),
    "tied": small("Qwen2.5-0.5B", n_layer=4),
    "gemma": small("Gemma-2-2b", n_layer=4, sliding_window_size=7),
    "neox": small("pythia-14m", n_layer=2),
    "learned": small("gpt2", n_query_groups=4),
    "olmo2": small("OLMo-2-1124-7B"),
    "one head": small("Qwen3-0.6B", n_query_groups=1),
    "deep": small("Llama-3.2-1B", n_layer=8, tie_embeddings=False),
    "moe": small("Mixtral-8x7B-v0.1", n_expert=4, sliding_window_size=None, n_layer=4),
    "shared experts": small(
        "Qwen3-30B-A3B", n_expert=8, n_expert_per_token=2, moe_intermediate_size=16, shared_expert_size=16
    ),
    "sinks": small("gpt-oss-20b", n_expert=4, n_expert_per_token=2, moe_intermediate_size=16, sliding_window_size=7),
    "chunked": small(
        "Llama-4-Scout-17B-16E",
        n_expert=2,
        n_layer=4,
        moe_intermediate_size=16,
        sliding_window_size=7,
        query_temperature={"floor_scale": 5, "scale": 0.1, "first_position": 1},
    ),
    "latent": small(
        "DeepSeek-V2-Lite",
        n_expert=4,
        n_expert_per_token=2,
        moe_intermediate_size=16,
        shared_expert_size=16,
        n_query_groups=4,
        latent_attention={
            "q_lora_rank": None,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "norm_eps": 1e-6,
        },
    ),
}
TUNERS: dict[str, Tuner] = {
    "lora": LoRA(r=4, dropout=0.0, bias="all", target_modules=["all-linear"]),
    "lora and head": LoRA(r=4, dropout=0.0, target_modules=["q", "v", "head"], modules_to_save=["norm", "embedding"]),
}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        shape: of `SHAPES`.
        ranks: processes.
        parallel: settings of `ParallelArgs`.
        micro: rows of a micro-batch.
        packed: rows hold several documents.
        tuner: of `TUNERS`.
        quantize: how the base is packed.
        more: further arguments of `parallelize`.
    """

    shape: str
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    micro: int = 2
    packed: bool = False
    tuner: str | None = None
    quantize: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        layout = " ".join(f"{key} {value}" for key, value in self.parallel.items()) or "auto"
        marks = [
            self.shape,
            f"x{self.ranks}",
            layout,
            "packed" * self.packed,
            self.tuner or "",
            self.quantize or "",
            *map(str, self.more),
        ]
        return ", ".join(mark for mark in marks if mark)

    @property
    def alone(self) -> "Case":
        """The same on one process, in one micro-batch."""
        return replace(self, ranks=1, parallel={}, micro=ROWS, more={})


def global_batch(*, packed: bool) -> Batch:
    """Rows with different numbers of targets, one with none; packed ones hold documents of different lengths."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (ROWS, LENGTH + 1), generator=draw)
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, max(0, LENGTH - row * row) :] = IGNORE
    if not packed:
        return Batch(ids[:, :-1].contiguous(), labels)
    ends = torch.randint(1, LENGTH, (ROWS, 3), generator=draw).sort().values
    places = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    documents = torch.searchsorted(ends, places, right=True).int()
    starts = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), ends], dim=1).gather(1, documents.long())
    labels[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORE
    return Batch(ids[:, :-1].contiguous(), labels, documents=documents, positions=places - starts)


def part_of(batch: Batch, rank: int, ranks: int, micro: int) -> list[Batch]:
    """The micro-batches of one data rank, dealt out as the data stream does."""
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    starts = range(rank * micro, ROWS, ranks * micro)
    return [Batch(**{name: value[at : at + micro] for name, value in fields.items()}) for at in starts]


def built(case: Case, mesh: Mesh | None) -> GPT:
    """The model, laid out as a run does it, with its first weights."""
    with torch.device("meta"):
        model = GPT(SHAPES[case.shape]).to(torch.float64)
    if case.quantize:
        quantization.quantize(model, case.quantize)
    if case.tuner:
        adapt.attach(model, TUNERS[case.tuner])
    precision = PRECISIONS["64-true"]
    settings = ParallelArgs(**case.parallel)
    parallelize(model, mesh, settings, precision=precision, compile_blocks=False, **case.more)
    model.to_empty(device="cpu")
    if case.quantize:
        base = GPT(SHAPES[case.shape])
        initialize(base, 3)
        quantization.load_quantized(model, base.named_parameters(), write=copy_full_tensor)
    else:
        initialize(model, 3, write=copy_full_tensor)
    if case.tuner:
        adapt.initialize_adapter(model, TUNERS[case.tuner], 3, write=copy_full_tensor)
    return model


def noise(_config: Config, name: str, shape: Iterable[int]) -> Tensor:
    """Other values than the first, which have zeros and ones; a function of the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=draw, dtype=torch.float64) * 0.1
    return values + (1.0 if ".norm" in name or name.startswith("norm") else 0.0)


def facts(case: Case) -> Facts:
    """What this rank knows: values by the names of parameters, and of the whole model under "model"."""
    settings = ParallelArgs(**case.parallel)
    mesh = Mesh(settings.resolve_dims(case.ranks), "cpu") if case.ranks > 1 else None
    model = built(case, mesh)
    found: Facts = {"first": everything(model, lambda parameter: parameter)}
    numbers = ((name, one) for name, one in model.named_parameters() if one.is_floating_point())
    for name, parameter in numbers:
        copy_full_tensor(parameter, noise(model.config, name, parameter.shape))
    train_state = TrainState(
        apply_ddp(model, mesh),
        build_optimizers(AdamW(lr=1e-2, weight_decay=0.1), model),
        torch.device("cpu"),
        PRECISIONS["64-true"],
        mesh,
    )
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    batches = part_of(global_batch(packed=case.packed), rank, ranks, case.micro)
    objective = next_token(LossArgs(chunk_rows=7))
    (targets,) = all_reduce_sum(
        [sum(batch.targets for batch in batches) * train_state.counts_batch], train_state.device
    )
    loss, norm = gradients(train_state, batches, objective, count=targets)
    (loss,) = all_reduce_sum([loss * train_state.counts_loss], train_state.device)
    found["gradient"] = everything(model, lambda parameter: parameter.grad)
    train_state.zero_grad()
    losses = [train_step(train_state, batches, objective, max_norm=1.0).loss for _ in range(3)]
    found["after"] = everything(model, lambda parameter: parameter)
    found["model"] = {"loss": exact([loss, *losses]), "gradient norm": exact([norm])}
    return found


def exact(numbers: list[float]) -> Tensor:
    """Python's numbers, all digits of them."""
    return torch.tensor(numbers, dtype=torch.float64)


def everything(model: GPT, value: Any) -> dict[str, Tensor]:
    """Something of every parameter in full, where there is such."""
    values = ((name, value(parameter)) for name, parameter in model.named_parameters())
    return {name: full_tensor(one.detach()).clone() for name, one in values if one is not None}


KNOWN: dict[str, Facts] = {}


def reference(case: Case) -> Facts:
    """What one process knows."""
    if str(case) not in KNOWN:
        KNOWN[str(case)] = facts(case)
    return KNOWN[str(case)]


def differences(case: Case, told: list[Facts]) -> dict[str, float]:
    """How far what any rank says is from one process: relative L2, and exact for first weights."""
    wanted = reference(case.alone)
    worst = dict.fromkeys(wanted, 0.0)
    for kind, values in wanted.items():
        for name, value in values.items():
            said = [facts[kind][name] for facts in told if name in facts[kind]]
            if not said:
                raise AssertionError(f"{case}: no rank has the {kind} of {name}")
            scale = value.double().norm().item() if kind != "gradient" else max(value.double().norm().item(), 1e-8)
            for one in said:
                assert one.shape == value.shape, (name, one.shape, value.shape)
                worst[kind] = max(worst[kind], (one.double() - value.double()).norm().item() / (scale or 1.0))
        extra = {name for facts in told for name in facts[kind]} - values.keys()
        assert not extra, (kind, extra)
    return worst


LIMITS = {"first": 0.0, "gradient": 1e-8, "after": 1e-8, "model": 1e-10}
PACKED_LIMITS = LIMITS | {"gradient": 1e-5, "after": 1e-5, "model": 1e-5}  # packed weights are unpacked in float32


def astray(case: Case) -> dict[str, float]:
    """What several ranks say that is farther from one process than rounding."""
    limits = PACKED_LIMITS if case.quantize else LIMITS
    found = differences(case, POOL.run(facts, case, ranks=case.ranks))
    return {kind: far for kind, far in found.items() if far > limits[kind]}


def spoilt(broken: Callable[[Case], Facts], case: Case) -> dict[str, float]:
    """How far what ranks say is from one process if `broken` leaves something out before it asks for the facts."""
    try:
        told = POOL.run(broken, case, ranks=case.ranks)
    finally:
        POOL.close()  # its processes stay broken
    return differences(case, told)
