"""Cases of the layout tests: a few training steps whose results do not depend on the layout.

A case is a small model, a batch of uneven rows, and `parallel:` settings over some ranks. The initial weights, loss,
gradients, gradient norm and weights after three steps of all ranks are compared with those of a single process that has
the whole batch.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import quantization
from litgpt.data.media.patches import cut_patches, pack_media
from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.media import pack_sounds
from litgpt.model.tower_config import TowerShape
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.moe import MoEArgs
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.to_yaml import find_changes
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import Full, LoRA, Tuner
from litgpt.train import reference as reference_weights
from litgpt.train.kto import rated_answers
from litgpt.train.objective import Objective, next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.preference import paired_answers
from litgpt.train.reference import Reference
from litgpt.train.reward import pair_rewards
from litgpt.train.router_training import RouterTrainer
from litgpt.train.step import add_gradients, compute_trained_norm, finish_gradients, train_step
from litgpt.train.train_state import TrainState
from tests.layouts.pool import POOL
from tests.store.models import small
from tests.train.pairs import collate, draw_answers
from tests.training_records import stop_recording

ROWS, LENGTH = 8, 22  # not a multiple of the token shards
LOSS = LossArgs(chunk_rows=7)
Facts = dict[str, dict[str, Tensor]]

SHAPES: dict[str, Config] = {
    "dense": small("Qwen2.5-0.5B", tie_embeddings=False, bias=True),
    "tied": small("Qwen2.5-0.5B", n_layer=4),
    "gemma": small("Gemma-2-2b", n_layer=4, sliding_window_size=7),
    "neox": small("pythia-14m", n_layer=2),
    "scores": small("Qwen2.5-0.5B", n_layer=4, output="score"),
    "learned": small("gpt2", n_query_groups=4),
    "olmo2": small("OLMo-2-1124-7B"),
    "head norms": small("Llama-3.2-1B", n_layer=2, norm_qk=True, norm_qk_type="per_head_bias"),
    "one head": small("Qwen3-0.6B", n_query_groups=1),
    "deep": small("Llama-3.2-1B", n_layer=8, tie_embeddings=False),
    "moe": small("Mixtral-8x7B-v0.1", n_expert=4, sliding_window_size=None, n_layer=4),
    "shared experts": small(
        "Qwen3-30B-A3B", n_expert=8, n_expert_per_token=2, moe_intermediate_size=16, shared_expert_size=16
    ),
    "corrected": small(
        "Qwen3-30B-A3B",
        n_expert=8,
        n_expert_per_token=2,
        moe_intermediate_size=16,
        n_layer=4,
        moe_layers=[0, 1, 1, 1],
        router_score="sigmoid",
        router_correction=True,
        n_expert_groups=4,
        n_topk_groups=2,
        n_topk_scores_per_group=2,
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
SHAPES["predictions"] = small(
    "DeepSeek-V3",
    n_expert=4,
    n_expert_per_token=2,
    moe_intermediate_size=16,
    n_query_groups=4,
    first_k_dense_replace=1,
    n_expert_groups=2,
    n_topk_groups=1,
    n_prediction_layers=2,
    rope_adjustments=None,
    latent_attention={**(SHAPES["latent"].latent_attention or {}), "q_lora_rank": 12},
)
IMAGE = 50  # which no row of text has
IMAGE_START = 4  # so that images are in several chunks of a row with context parallelism
TOWER = {"width": 16, "layers": 3, "heads": 2, "mlp_size": 24, "blocks_run": 2, "patch": 2, "merge": 2, "side": 4}
TOWER |= {"positions": "bucket", "class_token": True, "final_norm": "applied", "projector_hidden": 16}
TOWER["image_token"] = IMAGE
SHAPES["vision"] = replace(SHAPES["tied"], n_layer=2, vision=TowerShape.from_values(TOWER).to_dict())
SECTIONS = {**TOWER, "positions": "none", "rope_base": 100.0, "window": 4, "full_layers": [1], "class_token": False}
SECTIONS |= {"temporal": 2, "projector_norm": "layer", "final_norm": "none", "deep_layers": [0]}
SHAPES["sections"] = replace(
    SHAPES["dense"], n_layer=4, rope_sections=[1, 1, 2], vision=TowerShape.from_values(SECTIONS).to_dict()
)
BLOCKS = {**TOWER, "positions": "learned", "class_token": False, "merge": 1, "side": 2, "image_blocks": True}
SHAPES["image blocks"] = replace(SHAPES["gemma"], vision=TowerShape.from_values(BLOCKS).to_dict())
PROMPTS = {**BLOCKS, "image_blocks": False, "prompt_blocks": True}
SHAPES["prompt blocks"] = replace(SHAPES["gemma"], vision=TowerShape.from_values(PROMPTS).to_dict())
SOUNDS = {"width": 16, "layers": 2, "heads": 2, "mlp_size": 24, "mels": 6, "places": 20, "audio_token": IMAGE}
SHAPES["audio"] = replace(SHAPES["tied"], n_layer=2, audio=AudioShape.from_values(SOUNDS).to_dict())
SHAPES["deep predictions"] = replace(SHAPES["predictions"], n_layer=4)
SHAPES["dense predictions"] = replace(SHAPES["dense"], n_prediction_layers=1)
PREFERENCES = {
    "dpo": PreferenceArgs(rpo_alpha=0.5, use_weighting=True, ld_alpha=0.5),
    "ipo": PreferenceArgs(loss_type="ipo", f_divergence_type="js_divergence"),
    "simpo": PreferenceArgs(loss_type="simpo", cpo_alpha=0.5),
    "kto": PreferenceArgs(loss_type="kto", undesirable_weight=0.5),
    "reward": PreferenceArgs(loss_type="reward", center_rewards_coefficient=0.1),
}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "next token": lambda: next_token(LOSS),
    "predictions": lambda: next_token(replace(LOSS, prediction_weight=0.5), prediction_layers=2),
    "one prediction": lambda: next_token(replace(LOSS, impl="plain", chunk_rows=512), prediction_layers=1),
    **{name: partial(paired_answers, PREFERENCES[name], LOSS) for name in ("dpo", "ipo", "simpo")},
    "kto": partial(rated_answers, PREFERENCES["kto"], LOSS),
    "reward": partial(pair_rewards, PREFERENCES["reward"]),
}
TUNERS: dict[str, Tuner] = {
    "lora": LoRA(r=4, dropout=0.0, bias="all", target_modules=["all-linear"]),
    "lora on experts": LoRA(r=2, dropout=0.0, bias="all", target_modules=["gate", "up", "down", "q"]),
    "projector alone": Full(freeze_parameters_ratio=1.0, trainable_parameters=["vision.projector"]),
    "lora on parts": LoRA(r=4, dropout=0.0, target_modules=["attention.q", "vision.blocks.0.q", "linear_1"]),
    "decoder alone": Full(freeze_parameters=["vision"]),
    "all but the tower": Full(freeze_parameters=["audio"]),
    "lora on audio": LoRA(r=4, dropout=0.0, target_modules=["attention.q", "audio.blocks.0.q", "audio.projector"]),
    "lora and scores": LoRA(r=4, dropout=0.0, target_modules=["q", "v"], modules_to_save=["score"]),
    "lora and head": LoRA(r=4, dropout=0.0, target_modules=["q", "v", "head"], modules_to_save=["norm", "embedding"]),
}


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        shape: of `SHAPES`.
        ranks: processes.
        parallel: settings of `ParallelArgs`.
        micro: rows of a micro-batch.
        packed: rows hold several documents.
        images: the rows that have an image, or a sound if the model has an audio tower.
        tuner: of `TUNERS`.
        quantize: format of the quantized base.
        objective: of `OBJECTIVES`.
        more: further arguments of `parallelize`.
        moe: how routers are trained.
        fixed_micro: whether the result depends on which rows share a micro-batch.
    """

    shape: str
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    micro: int = 2
    packed: bool = False
    images: tuple[int, ...] = ()
    tuner: str | None = None
    quantize: str | None = None
    objective: str = "next token"
    more: dict[str, Any] = field(default_factory=dict)
    moe: MoEArgs | None = None
    fixed_micro: bool = False

    def __str__(self) -> str:
        layout = " ".join(f"{key} {value}" for key, value in self.parallel.items()) or "auto"
        marks = [
            self.shape,
            f"x{self.ranks}",
            layout,
            "packed" * self.packed,
            f"images in {self.images}" * bool(self.images),
            f"micro {self.micro}" * (self.moe is not None),
            self.tuner or "",
            self.quantize or "",
            self.objective * (self.objective != "next token"),
            *map(str, self.more),
            *(f"{name} {value}" for name, value in find_changes(self.moe or MoEArgs()).items()),
        ]
        return ", ".join(mark for mark in marks if mark)

    @property
    def single_process(self) -> "Case":
        """The same case on one process, in one micro-batch, or in the same ones."""
        return replace(self, ranks=1, parallel={}, micro=self.micro if self.fixed_micro else ROWS, more={})


def build_global_batch(*, packed: bool) -> Batch:
    """Rows with different numbers of targets, one with none; packed ones have documents of different lengths."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (ROWS, LENGTH + 1), generator=draw)
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, max(0, LENGTH - row * row) :] = IGNORE
    if not packed:
        return Batch(ids[:, :-1].contiguous(), labels)
    ends = torch.randint(1, LENGTH, (ROWS, 3), generator=draw).sort().values
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    documents = torch.searchsorted(ends, positions, right=True).int()
    starts = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), ends], dim=1).gather(1, documents.long())
    labels[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORE
    return Batch(ids[:, :-1].contiguous(), labels, documents=documents, positions=positions - starts)


def place_images(
    batches: Sequence[Batch], starts: Iterable[int], images: Collection[int], config: Config
) -> list[Batch]:
    """Micro-batches with an image of its own size in each of these rows, which are numbered from `starts`."""
    shape, placed = TowerShape.from_values(config.vision or {}), []
    for batch, start in zip(batches, starts, strict=True):
        ids, labels, items = batch.ids.clone(), batch.labels.clone(), []
        positions = torch.arange(LENGTH).expand_as(ids) if batch.positions is None else batch.positions
        sections = positions[:, None].repeat(1, 3, 1)
        for row in sorted(set(range(start, start + len(ids))) & set(images)):
            is_square = shape.positions == "learned"
            places = (shape.side or 0) ** 2 if is_square else 1 + row % 3
            size = (4, 4) if is_square else (4, 4 * places)
            pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(row))
            items.append(cut_patches(pixels, shape))
            first, end = IMAGE_START, IMAGE_START + places
            ids[row - start, first:end], labels[row - start, : end - 1] = IMAGE, IGNORE
            sections[row - start, :2, first:end] = sections[row - start, :2, first : first + 1]
        has_sections = bool(items and config.rope_sections)
        changed = replace(batch, ids=ids, labels=labels, positions=sections if has_sections else batch.positions)
        placed.append(replace(changed, media=pack_media(items) if items else None))
    return placed


def place_sounds(batches: Sequence[Batch], starts: Iterable[int], rows: Collection[int], config: Config) -> list[Batch]:
    """Micro-batches with a sound of its own length in each of these rows, which are numbered from `starts`."""
    shape, placed = AudioShape.from_values(config.audio or {}), []
    for batch, start in zip(batches, starts, strict=True):
        ids, labels, parts, lengths = batch.ids.clone(), batch.labels.clone(), list[Tensor](), list[int]()
        for row in sorted(set(range(start, start + len(ids))) & set(rows)):
            places = 1 + row % 3
            frames, end = 4 * places + row % 4, IMAGE_START + places
            draw = torch.Generator().manual_seed(row)
            parts.append(torch.randn(shape.count_read_frames(frames), shape.mels, generator=draw))
            lengths.append(frames)
            ids[row - start, IMAGE_START:end], labels[row - start, IMAGE_START - 1 : end - 1] = IMAGE, IGNORE
        media = pack_sounds(torch.cat(parts), lengths) if parts else None
        placed.append(replace(batch, ids=ids, labels=labels, media=media))
    return placed


def take_micro_batches(batch: Batch, rank: int, ranks: int, micro: int) -> list[Batch]:
    """The micro-batches of one data rank, in the order of the data stream."""
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    starts = range(rank * micro, ROWS, ranks * micro)
    return [Batch(**{name: value[start : start + micro] for name, value in fields.items()}) for start in starts]


def build_micro_batches(case: Case, rank: int, ranks: int) -> list[Batch]:
    """The micro-batches of one data rank, in the order of the data stream."""
    if case.objective not in PREFERENCES:
        batches = take_micro_batches(build_global_batch(packed=case.packed), rank, ranks, case.micro)
        starts = range(rank * case.micro, ROWS, ranks * case.micro)
        place = place_images if SHAPES[case.shape].audio is None else place_sounds
        return place(batches, starts, case.images, SHAPES[case.shape]) if case.images else batches
    answers, desirable = draw_answers(ROWS, weighted=True), (torch.arange(2 * ROWS) // 4 % 2).float()
    values = {"desirable": desirable, "margin": torch.linspace(0, 1, ROWS).repeat_interleave(2)}
    starts = range(2 * rank * case.micro, 2 * ROWS, 2 * ranks * case.micro)
    parts = [slice(start, start + 2 * case.micro) for start in starts]
    return [
        collate(answers[part], packed=case.packed, **{name: value[part] for name, value in values.items()})
        for part in parts
    ]


def build_model(case: Case, mesh: Mesh | None) -> GPT:
    """The model with the layout of the case and its initial weights."""
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


def draw_values(_config: Config, name: str, shape: Iterable[int]) -> Tensor:
    """Values without zeros and ones, as a function of the parameter's name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=draw, dtype=torch.float64) * 0.1
    return values + (1.0 if ".norm" in name or name.removeprefix("reference ").startswith("norm") else 0.0)


def copy_values(model: GPT, prefix: str = "") -> None:
    """Set every parameter to values that are a function of the prefix and its name."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            copy_full_tensor(parameter, draw_values(model.config, prefix + name, parameter.shape))


def collect_facts(case: Case) -> Facts:
    """The results of this rank, by kind and parameter; those of the whole model are of the kind "model"."""
    settings = ParallelArgs(**case.parallel)
    mesh = Mesh(settings.resolve_dims(case.ranks), "cpu") if case.ranks > 1 else None
    model = build_model(case, mesh)
    facts: Facts = {"first": collect_full_tensors(model, lambda parameter: parameter)}
    copy_values(model, "reference ")
    reference = Reference(reference_weights.copy_values(model, dict(model.named_parameters())))
    copy_values(model)
    train_state = TrainState(
        apply_ddp(model, mesh),
        build_optimizers(AdamW(lr=1e-2, weight_decay=0.1), model),
        torch.device("cpu"),
        PRECISIONS["64-true"],
        mesh,
        reference=reference,
        routers=None if case.moe is None else RouterTrainer(case.moe, model, mesh),
    )
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    batches, objective = build_micro_batches(case, rank, ranks), OBJECTIVES[case.objective]()
    gradients = add_gradients(train_state, batches, objective)
    norm = finish_gradients(train_state)
    (loss,) = all_reduce_sum([gradients.loss.item() * train_state.counts_loss], train_state.device)
    facts["gradient"] = collect_full_tensors(model, lambda parameter: parameter.grad)
    train_state.zero_grad()
    results = [train_step(train_state, batches, objective, max_norm=1.0) for _ in range(3)]
    facts["after"] = collect_full_tensors(model, lambda parameter: parameter)
    losses = [value for result in results for value in (result.loss, *result.metrics.values())]
    facts["model"] = {"loss": to_tensor([loss, *losses]), "gradient norm": to_tensor([norm])}
    facts["model"]["media"] = to_tensor(list(results[0].media))
    facts["model"]["parameter norm"] = to_tensor([compute_trained_norm(train_state)])
    if train_state.routers is not None:
        facts["model"]["load"] = to_tensor([value for load in train_state.routers.load.values() for value in load])
    return facts


def to_tensor(numbers: list[float]) -> Tensor:
    """Numbers in float64."""
    return torch.tensor(numbers, dtype=torch.float64)


def collect_full_tensors(model: GPT, value: Any) -> dict[str, Tensor]:
    """The full tensors of `value(parameter)` of every parameter, except None."""
    tensors = ((name, value(parameter)) for name, parameter in model.named_parameters())
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in tensors if tensor is not None}


REFERENCES: dict[str, Facts] = {}


def run_reference(case: Case) -> Facts:
    """The results of a single process."""
    if str(case) not in REFERENCES:
        REFERENCES[str(case)] = collect_facts(case)
    return REFERENCES[str(case)]


def measure_differences(case: Case, all_facts: list[Facts]) -> dict[str, float]:
    """The largest difference of any rank from a single process: relative L2, and exact for initial weights."""
    expected = run_reference(case.single_process)
    worst = dict.fromkeys(expected, 0.0)
    for kind, values in expected.items():
        for name, value in values.items():
            results = [facts[kind][name] for facts in all_facts if name in facts[kind]]
            if not results:
                raise AssertionError(f"{case}: no rank has the {kind} of {name}")
            scale = value.double().norm().item() if kind != "gradient" else max(value.double().norm().item(), 1e-8)
            for result in results:
                assert result.shape == value.shape, (name, result.shape, value.shape)
                worst[kind] = max(worst[kind], (result.double() - value.double()).norm().item() / (scale or 1.0))
        extra = {name for facts in all_facts for name in facts[kind]} - values.keys()
        assert not extra, (kind, extra)
    return worst


LIMITS = {"first": 0.0, "gradient": 1e-8, "after": 1e-8, "model": 1e-10}
# quantized weights are dequantized in float32
QUANTIZED_LIMITS = LIMITS | {"gradient": 1e-5, "after": 1e-5, "model": 1e-5}


def find_deviations(case: Case) -> dict[str, float]:
    """The differences from a single process that are larger than rounding."""
    limits = QUANTIZED_LIMITS if case.quantize else LIMITS
    differences = measure_differences(case, POOL.run(collect_facts, case, ranks=case.ranks))
    return {kind: difference for kind, difference in differences.items() if difference > limits[kind]}


def measure_mutation(mutation: Callable[[Case], Facts], case: Case) -> dict[str, float]:
    """The differences from a single process with a mutation, which collects the facts with something left out."""
    try:
        with stop_recording():
            all_facts = POOL.run(mutation, case, ranks=case.ranks)
    finally:
        POOL.close()  # the mutation stays in its processes
    return measure_differences(case, all_facts)
