"""GaLore steps as the paper's algorithm says, saves memory where it says, and is right for shards."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from litgpt.errors import UserError
from litgpt.parallel.galore_layout import check_galore_layout
from litgpt.recipe.optimizer import GaLore
from litgpt.train.galore import LowRankAdamW
from litgpt.train.optimizer import build_optimizers
from tests.processes import join_ranks, start_ranks
from tests.store.models import random_model, small

SETTINGS = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "rank": 3, "update_proj_gap": 3}
SIDES = {"std": "shorter", "reverse_std": "longer", "left": "rows", "right": "columns"}
STEPS = 7


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(STEPS)]


def of_the_paper(weight: Tensor, proj_type: str, scale: float) -> Tensor:
    """Algorithm 2 of the paper for one matrix, whose W grows by lr scale P N; written for the side that it shortens."""
    m, n = weight.shape
    shortens_rows = {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[proj_type]
    w = (weight if shortens_rows else weight.T).clone()
    first, second = SETTINGS["betas"]
    moment = variance = torch.zeros(SETTINGS["rank"], w.shape[1], dtype=w.dtype)
    for t, drawn in enumerate(gradients((m, n))):
        g = drawn if shortens_rows else drawn.T
        if t % SETTINGS["update_proj_gap"] == 0:
            u, _, v = torch.linalg.svd(drawn)  # of the matrix as it lies: signs are free, and the moments see them
            p = u[:, : SETTINGS["rank"]] if shortens_rows else v[: SETTINGS["rank"]].T
        r = p.T @ g
        moment = first * moment + (1 - first) * r
        variance = second * variance + (1 - second) * r**2
        corrected = moment / (1 - first ** (t + 1)), variance / (1 - second ** (t + 1))
        step = corrected[0] / (corrected[1].sqrt() + SETTINGS["eps"])
        w = w - SETTINGS["lr"] * SETTINGS["weight_decay"] * w - SETTINGS["lr"] * scale * p @ step
    return w if shortens_rows else w.T


def ours(weight: Tensor, proj_type: str, scale: float = 0.5, steps: int = STEPS) -> tuple[nn.Parameter, LowRankAdamW]:
    parameter = nn.Parameter(weight.clone())
    optimizer = LowRankAdamW([parameter], GaLore(scale=scale, proj_type=proj_type, **SETTINGS))
    for gradient in gradients(tuple(weight.shape))[:steps]:
        parameter.grad = gradient
        if isinstance(parameter.data, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        optimizer.step()
    return parameter, optimizer


def weight_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_steps_are_those_of_the_paper_s_algorithm(shape: tuple[int, int], proj_type: str) -> None:
    weight = weight_of(*shape)
    torch.testing.assert_close(
        ours(weight, proj_type)[0].data, of_the_paper(weight, proj_type, 0.5), atol=1e-10, rtol=0
    )


def test_both_sides_at_once_move_within_both_subspaces() -> None:
    weight = weight_of(6, 10)
    parameter, optimizer = ours(weight, "full", steps=1)
    u, _, v = torch.linalg.svd(gradients((6, 10))[0])
    moved = parameter.data - weight * (1 - SETTINGS["lr"] * SETTINGS["weight_decay"])
    r = u[:, :3].T @ gradients((6, 10))[0] @ v[:3].T
    wanted = -SETTINGS["lr"] * 0.5 * u[:, :3] @ (r / (r.abs() + SETTINGS["eps"])) @ v[:3]
    torch.testing.assert_close(moved, wanted, atol=1e-10, rtol=0)
    assert optimizer.state[parameter]["exp_avg"].shape == (3, 3)


@pytest.mark.parametrize("proj_type", [*SIDES, "full"])
def test_matrices_in_a_stack_are_on_their_own(proj_type: str) -> None:
    stack = weight_of(4, 6, 10)
    parameter = ours(stack, proj_type)[0]
    for number, matrix in enumerate(stack):
        alone = nn.Parameter(matrix.clone())
        optimizer = LowRankAdamW([alone], GaLore(scale=0.5, proj_type=proj_type, **SETTINGS))
        for gradient in gradients((4, 6, 10)):
            alone.grad = gradient[number]
            optimizer.step()
        torch.testing.assert_close(parameter.data[number], alone.data, atol=1e-10, rtol=0)


def test_what_is_kept_is_as_large_as_the_paper_says() -> None:
    parameter, optimizer = ours(weight_of(6, 10), "std")
    kept = sum(value.numel() for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    assert kept == 6 * 3 + 2 * 3 * 10  # m r for P, 2 n r for the moments (table 1)


def test_matrices_of_blocks_longer_than_the_rank_are_taken() -> None:
    model = random_model(small("Llama-3.2-1B", n_query_groups=1, tie_embeddings=False))
    low, adamw = build_optimizers(GaLore(rank=8), model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = {names[one] for group in low.param_groups for one in group["params"]}
    layers = ("attention.q", "attention.out", "mlp.gate", "mlp.up", "mlp.down")  # k and v are 8 x 32
    assert taken == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    rest = {names[one] for group in adamw.param_groups for one in group["params"]}
    assert taken.isdisjoint(rest) and taken | rest == set(names.values())
    assert [group["peak_lr"] for one in (low, adamw) for group in one.param_groups] == [1e-3] * 3


def test_a_rank_that_shortens_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"optimizer.rank: 128 is not below the sides of any trained matrix; give at most 31"
    ):
        build_optimizers(GaLore(), random_model(small("Llama-3.2-1B")))


def on_shards() -> None:
    """One rank of two: shards of rows, also uneven, step as whole matrices; state given back whole is laid out."""
    dist.init_process_group("gloo")
    one, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    cases = [(one, [Shard(0)], shape) for shape in ((6, 10), (7, 7), (3, 6, 10))]
    for mesh, placements, shape in [*cases, (two, [Replicate(), Shard(0)], (10, 6))]:
        for proj_type in ("std", "reverse_std", "full"):
            weight = weight_of(*shape)
            expected = ours(weight, proj_type)[0].data
            parameter, optimizer = ours(distribute_tensor(weight, mesh, placements), proj_type, steps=4)
            state = optimizer.state[parameter]
            assert all(isinstance(value, DTensor) for value in state.values() if isinstance(value, Tensor))
            whole = {key: value.full_tensor() if isinstance(value, Tensor) else value for key, value in state.items()}
            optimizer.state[parameter] = whole
            for gradient in gradients(shape)[4:]:
                parameter.grad = distribute_tensor(gradient, mesh, placements)
                optimizer.step()
            torch.testing.assert_close(parameter.full_tensor().data, expected, atol=1e-10, rtol=0)
    check_galore_layout(distribute_tensor(weight_of(6, 10), one, [Shard(1)]))
    mesh = init_device_mesh("cpu", (2, 1))
    with pytest.raises(UserError, match=r"GaLore is not supported with parallel.tensor; set"):
        check_galore_layout(distribute_tensor(weight_of(6, 10), mesh, [Shard(0), Shard(1)]))
    dist.barrier()


def test_shards_step_as_whole_matrices(tmp_path: Path) -> None:
    codes = join_ranks(start_ranks(on_shards, folder=tmp_path, ranks=2))
    assert codes == [0, 0], (tmp_path / "rank-0.log").read_text()[-2000:]
