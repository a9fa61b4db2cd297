"""The gradient of a global batch for every micro-batch size and layout, compared with that of a single process."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.recipe.train import LossArgs
from litgpt.train.objective import next_token
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState

ROWS, LENGTH = 8, 12
SHAPE = Config(
    name="toy",
    block_size=LENGTH,
    padded_vocab_size=50,
    n_layer=2,
    n_head=2,
    n_embd=12,
    intermediate_size=20,
    mlp_class_name="LLaMAMLP",
    norm_class_name="RMSNorm",
    parallel_residual=False,
    bias=True,
    rotary_percentage=1.0,
)
LAYOUTS = {1: {"plain": (1, 1)}, 2: {"ddp": (2, 1), "fsdp": (1, 2)}, 4: {"ddp": (4, 1), "fsdp": (1, 4), "hsdp": (2, 2)}}


def build_global_batch() -> Batch:
    """Rows with 1 to 12 targets, and one with none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (ROWS, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, max(0, LENGTH - row * row) :] = IGNORE
    return Batch(ids[:, :-1].contiguous(), labels)


def take_micro_batches(batch: Batch, rank: int, ranks: int, micro: int) -> list[Batch]:
    """The micro-batches of one rank, in the order of the data stream."""
    starts = range(rank * micro, ROWS, ranks * micro)
    return [Batch(batch.ids[start : start + micro], batch.labels[start : start + micro]) for start in starts]


def compute_rank_gradients(
    degrees: tuple[int, int], rank: int, ranks: int, micro: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Every parameter's full gradient, and the loss."""
    batches = take_micro_batches(build_global_batch(), rank, ranks, micro)
    return compute_batch_gradients(batches, degrees, SHAPE, LossArgs(chunk_rows=7))


def compute_batch_gradients(
    batches: list[Batch], degrees: tuple[int, int], shape: Config, settings: LossArgs
) -> tuple[dict[str, torch.Tensor], float]:
    """Every parameter's full gradient, and the loss, of this rank's micro-batches."""
    ranks = degrees[0] * degrees[1]
    objective = next_token(settings)
    mesh = Mesh(ParallelDims(data_replicate=degrees[0], data_shard=degrees[1]), "cpu") if ranks > 1 else None
    with torch.device("meta"):
        model = GPT(shape).to(torch.float64)
    parallelize(model, mesh, ParallelArgs(), precision=PRECISIONS["64-true"], compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, 3, write=copy_full_tensor)
    device = torch.device("cpu")
    train_state = TrainState(apply_ddp(model, mesh), [], device, PRECISIONS["64-true"], mesh)
    counts = all_reduce_sum(objective.count_batches(batches), device)
    loss, _ = compute_gradients(train_state, batches, objective, counts=counts)
    grads = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return grads, all_reduce_sum([loss], device)[0]


def compare_layouts(folder: Path, rank: int, ranks: int) -> dict[str, float]:
    """The largest relative difference from the reference, by layout and micro-batch size."""
    save_reference = torch.load(folder / "reference.pt", weights_only=True)
    worst = {}
    for layout, degrees in LAYOUTS[ranks].items():
        for micro in (1, 2, 4, 8):
            if ROWS % (micro * ranks) == 0:
                grads, loss = compute_rank_gradients(degrees, rank, ranks, micro)
                assert grads.keys() == save_reference["gradients"].keys()
                pairs = ((grads[name], value) for name, value in save_reference["gradients"].items())
                differences = [((a - b).norm() / b.norm()).item() for a, b in pairs]
                worst[f"{ranks} ranks {layout} micro {micro}"] = max([*differences, abs(loss - save_reference["loss"])])
    return worst


def save_reference(folder: Path) -> None:
    """Save the gradients of a single process with one micro-batch."""
    grads, loss = compute_rank_gradients((1, 1), 0, 1, ROWS)
    torch.save({"gradients": grads, "loss": loss}, folder / "reference.pt")


def worker(folder: Path) -> None:
    """One rank: compare; the first writes the result."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    worst = compare_layouts(folder, rank, ranks)
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(worst))
    dist.barrier()
