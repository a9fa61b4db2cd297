"""Adapters on two ranks: gradients, steps, merging and disabling, compared with one process."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import quantization
from litgpt.adapt.layers import disable_adapters
from litgpt.adapt.quantization import QUANT_FORMATS
from litgpt.adapt.schedule import TunerSchedule
from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import AdaLoRA, AdapterV2, Bone, FourierFT, LoRA, Tuner, VeRA
from litgpt.train.objective import next_token
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState
from tests.adapt.models import IDS, compute_loss
from tests.store.models import small

SETTINGS: dict[str, Tuner] = {
    "default": LoRA(r=3, dropout=0.0, bias="all", modules_to_save=["embedding", "norm"]),
    "pissa": LoRA(r=4, dropout=0.0, init="pissa", dora=True, target_modules=["all-linear", "head"]),
    "experts": LoRA(r=4, dropout=0.0, target_modules=["all-linear", "all-router"]),
    "VeRA": VeRA(r=4),
    "AdaLoRA": AdaLoRA(init_r=3, target_r=1, dropout=0.0),
    "FourierFT": FourierFT(n_frequency=51),
    "Bone": Bone(r=5),
    "bat": Bone(r=4, variant="bat"),
    "AdapterV2": AdapterV2(start_layer=0),
    "bnb.nf4-dq": LoRA(r=4, dropout=0.0),
    "torchao.nf4": LoRA(r=4, dropout=0.0, init="pissa"),
}
BATCH = Batch(IDS[:, :-1].contiguous(), IDS[:, 1:].contiguous())
EXPERTS = {"n_expert": 4, "sliding_window_size": None}


def build(case: str, mesh: Mesh | None, precision: str = "64-true") -> GPT:
    """A model with an adapter, maybe over a packed base, built as a run builds it."""
    settings = SETTINGS[case]
    shape = small("Mixtral-8x7B-v0.1", **EXPERTS) if case == "experts" else small("Qwen2.5-0.5B", tie_embeddings=False)
    with torch.device("meta"):
        model = GPT(shape).to(PRECISIONS[precision].storage)
    if case in QUANT_FORMATS:
        quantization.quantize(model, case)
    adapt.attach(model, settings)
    parallelize(model, mesh, ParallelArgs(), precision=PRECISIONS[precision], compile_blocks=False)
    model.to_empty(device="cpu")
    if case in QUANT_FORMATS:
        base = GPT(shape)
        initialize(base, 3)
        quantization.load_quantized(model, base.named_parameters(), write=copy_full_tensor)
    else:
        initialize(model, 3, write=copy_full_tensor)
    adapt.initialize_adapter(model, settings, 3, write=copy_full_tensor)
    return model


def compute_results(case: str, ranks: int) -> dict[str, Tensor]:
    """Gradients of a first step, parameters after two, logits with and without the adapter, and the merged model.

    Both ranks see the same rows, so that summed gradients are twice those of one.
    """
    mesh = Mesh(ParallelDims(data_shard=ranks), "cpu") if ranks > 1 else None
    model = build(case, mesh)
    base = {
        name: full_tensor(value).detach().clone() for name, value in model.named_parameters() if not value.requires_grad
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    results: dict[str, Tensor] = {}
    schedule = adapt.build_schedule(model, SETTINGS[case], 3, steps=4) or TunerSchedule()
    train_state = TrainState(model, [], torch.device("cpu"), PRECISIONS["64-true"], mesh, tuner_schedule=schedule)
    for number in range(2):
        schedule.begin_step(number)
        optimizer.zero_grad()
        compute_gradients(train_state, [BATCH], next_token(LossArgs()), counts=[BATCH.targets * ranks])
        if number == 1:
            named = model.named_parameters()
            results |= {f"gradient {name}": full_tensor(value.grad) for name, value in named if value.grad is not None}
        optimizer.step()
        schedule.end_step([optimizer], copy_full_tensor)
    with torch.no_grad():
        results["adapted"] = model(IDS)
        with disable_adapters(model):
            results["base"] = model(IDS)
    results |= {
        f"tensor {name}": full_tensor(value).detach().clone()
        for name, value in adapt.get_adapter_parameters(model).items()
    }
    if case != "AdapterV2":
        results |= {f"merged {name}": value.clone() for name, value in adapt.merge_adapter(model)}
    now = dict(model.named_parameters())
    changed = [name for name, value in base.items() if not torch.equal(full_tensor(now[name]), value)]
    assert not changed, changed
    return results


def compare(folder: Path) -> None:
    """One rank: compute the same as one process, and near it in bfloat16."""
    dist.init_process_group("gloo")
    for name in SETTINGS:
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        results = compute_results(name, dist.get_world_size())
        assert results.keys() == expected.keys()
        differences: dict[str, Any] = {
            key: (results[key] - value).abs().max().item() for key, value in expected.items()
        }
        assert max(differences.values()) < 1e-10, differences
        mesh = Mesh(ParallelDims(data_shard=dist.get_world_size()), "cpu")
        scores = build(name, mesh, "bf16-mixed")(IDS)
        compute_loss(scores.float()).backward()
        assert scores.dtype == torch.bfloat16 and scores.isfinite().all()
    dist.barrier()
