"""What a rank does in the tests of checkpoints of parallel models: train, save, load what other layouts saved."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from litgpt import adapt
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import LoRA
from litgpt.store.checkpoint_load import load_checkpoint, load_reference, open_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.load_model import load_model
from litgpt.store.save_model import gather_stages, save_model
from litgpt.store.state_dict import iter_model_tensors, iter_optimizer_state
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.reference import copy_values
from litgpt.train.step import train_step
from litgpt.train.train_state import TrainState
from tests.layouts.layouts import ROWS, build_global_batch, take_micro_batches
from tests.store.models import small

# experts, some of them shared, a tied embedding, and more rows than go round
SHAPE = small(
    "Qwen3-30B-A3B",
    n_layer=2,
    n_expert=6,
    n_expert_per_token=2,
    moe_intermediate_size=16,
    shared_expert_size=16,
    tie_embeddings=True,
    padded_vocab_size=62,
)
REFERENCE = ("embedding.weight", "blocks.0.attention.q.weight", "blocks.1.mlp.experts.down")
"""The parameters whose initial values are saved too: one in two stages of a pipeline, and one in each of them."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp": (2, {"data_replicate": 2}),
    "hsdp": (4, {"data_replicate": 2, "data_shard": 2}),
    "tensor": (4, {"tensor": 2, "data_shard": 2}),
    "stages": (4, {"pipeline": 2, "data_shard": 2}),
    "experts": (4, {"tensor": 2, "context": 2, "expert": 2, "expert_tensor": 2}),
}


def train_state(layout: str, seed: int) -> TrainState:
    """A model that is laid out, and its optimizer."""
    ranks, parallel = LAYOUTS[layout]
    settings = ParallelArgs(**parallel)
    mesh = Mesh(settings.resolve_dims(ranks), "cpu") if ranks > 1 else None
    with torch.device("meta"):
        model = GPT(SHAPE).to(torch.float64)
    parallelize(model, mesh, settings, precision=PRECISIONS["64-true"], compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, seed, write=copy_full_tensor)
    steppers = build_optimizers(AdamW(lr=1e-2, weight_decay=0.1), model)
    return TrainState(apply_ddp(model, mesh), steppers, torch.device("cpu"), PRECISIONS["64-true"], mesh)


def train(trained: TrainState, steps: int) -> list[float]:
    """The losses of some steps on the same batch."""
    mesh = trained.mesh
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    batches = take_micro_batches(build_global_batch(packed=False), rank, ranks, ROWS // (2 * ranks))
    return [train_step(trained, batches, next_token(LossArgs())).loss for _ in range(steps)]


def degrees(trained: TrainState) -> dict[str, int]:
    """What a checkpoint records of the layout."""
    return {} if trained.mesh is None else asdict(trained.mesh.dims)


def save(layout: str, folder: Path) -> list[float]:
    """Train two steps and save them with initial values; the losses of the next three."""
    trained = train_state(layout, 1)
    reference = copy_values(trained.core, REFERENCE)
    train(trained, 2)
    checkpoints = Checkpoints(folder / layout, layout=degrees(trained), reference=reference)
    checkpoints.save(2, trained.core, trained.optimizers, {})
    saved = checkpoints.commit()
    assert saved is not None
    compare(trained, saved)
    return train(trained, 3)


def resume(layout: str, folder: Path, losses: dict[str, list[float]]) -> list[str]:
    """Load what every layout saved, to the bit, and train on as it did; what was said."""
    messages: list[str] = []
    reference = copy_values(train_state(layout, 1).core, REFERENCE)
    for other in LAYOUTS:
        saved = folder / other / "step-00000002"
        trained = train_state(layout, 2)
        load_checkpoint(saved, trained.core, trained.optimizers, layout=degrees(trained), warn=messages.append)
        compare(trained, saved)
        loaded = load_reference(saved, trained.core, torch.empty_like)
        assert loaded.keys() == reference.keys()
        assert all(torch.equal(loaded[name], value) for name, value in reference.items())
        torch.testing.assert_close(train(trained, 3), losses[other], rtol=1e-9, atol=0)
    return messages


def compare(trained: TrainState, saved: Path) -> None:
    """Hold all values, gathered by torch, against those in the files."""
    files = open_checkpoint(saved)
    values: dict[str, Any] = {f"model.{name}": tensor for name, tensor in iter_model_tensors(trained.core)}
    values |= {f"optimizer.{name}": item for name, item in iter_optimizer_state(trained.core, trained.optimizers)}
    assert len(values) > len(list(trained.core.parameters())) * 3
    for name, value in values.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert isinstance(whole, Tensor) and torch.equal(whole, files.read(name)), (saved, name)


def fill_and_write(layout: str, folder: Path) -> None:
    """Fill a model that is laid out from `<folder>/model`, each rank its part; write the whole of it again."""
    ranks, parallel = LAYOUTS[layout]
    mesh = Mesh(ParallelArgs(**parallel).resolve_dims(ranks), "cpu") if ranks > 1 else None
    tuner = LoRA(r=2, dropout=0.0, target_modules=["q", "down"])
    with torch.device("meta"):
        model = GPT(SHAPE)
    adapt.attach(model, tuner)
    parallelize(model, mesh, ParallelArgs(**parallel), precision=PRECISIONS["32-true"], compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, 1, write=copy_full_tensor)
    load_model(model, folder / "model")
    adapt.initialize_adapter(model, tuner, 1, write=copy_full_tensor)
    base = dict(adapt.merge_adapter(model))
    save_model(folder / layout, model, tensors=iter(base.items()), config=SHAPE)
    for name, parameter in adapt.get_adapter_parameters(model).items():
        copy_full_tensor(parameter, torch.arange(parameter.numel()).view(parameter.shape) / 1e3 + len(name))
    added = ((name, full_tensor(value.detach())) for name, value in adapt.get_adapter_parameters(model).items())
    whole = dict(gather_stages(model, added))
    if mesh is None or dist.get_rank() == 0:
        torch.save(whole, folder / f"{layout}.pt")
    merged = adapt.merge_adapter(model)
    save_model(folder / f"{layout} merged", model, tensors=merged, config=SHAPE)
