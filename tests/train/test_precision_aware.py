"""AdamW with states in few bytes: its steps, its memory, its checkpoints and its layouts."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.torchao import import_torchao
from litgpt.parallel.apply import full_tensor
from litgpt.parallel.exchange import get_local_tensor
from litgpt.parallel.state_layout import shard_scales, zeros_in_layout
from litgpt.recipe.optimizer import PrecisionAwareAdamW
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.pretrain import Pretrain
from litgpt.store.checkpoint_load import load_checkpoint, open_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.train import precision_aware
from litgpt.train.optimizer import build_optimizers
from litgpt.train.precision_aware import PrecisionAwareOptimizer
from litgpt.train.state_formats import FORMATS
from tests.layouts.pool import POOL
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import SHAPE as RUN_SHAPE
from tests.runs import read_losses, write_recipe
from tests.store.models import small
from tests.train.layouts import LAYOUTS, build_model, train_on_drawn_gradients

SHAPE = small(  # rows of 256 that are split into whole blocks
    "Qwen3-30B-A3B",
    **{"n_layer": 1, "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 256, "head_size": 64},
    tie_embeddings=False,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "halves": {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp16"},
    "fp8 and masters": {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8", "main_params_dtype": "fp32"},
    "codes and masters": {"exp_avg_dtype": "4bit", "exp_avg_sq_dtype": "8bit", "main_params_dtype": "fp16"},
}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


def build(layout: str, settings: dict[str, Any], seed: int = 1) -> tuple[GPT, PrecisionAwareOptimizer]:
    """A model in a layout, and its optimizer."""
    model = build_model(SHAPE, layout, "bf16-true" if settings.get("main_params_dtype") else "32-true", seed)
    (optimizer,) = build_optimizers(PrecisionAwareAdamW(lr=1e-2, **settings), model)
    assert isinstance(optimizer, PrecisionAwareOptimizer)
    return model, optimizer


def save(layout: str, kind: str, folder: Path, resume: Path | None = None) -> None:
    """Train three steps or, from a checkpoint of those, to the fifth; save the result."""
    model, optimizer = build(layout, SETTINGS[kind], seed=2 if resume else 1)
    if resume:
        load_checkpoint(resume, model, [optimizer], warn=lambda _: None)
    train_on_drawn_gradients(model, [optimizer], range(3, 5) if resume else range(3))
    checkpoints = Checkpoints(folder, save_rng=False)
    checkpoints.save(5 if resume else 3, model, [optimizer], {})
    checkpoints.commit()


def read_values(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in full."""
    files = open_checkpoint(checkpoint)
    return {name: files.read(name) for name in files.tensors}


def assert_equal(one: Path, other: Path) -> None:
    expected, values = read_values(one), read_values(other)
    assert expected.keys() == values.keys()
    for name, value in expected.items():
        assert value.dtype == values[name].dtype and torch.equal(
            *(one.reshape(-1).view(torch.uint8) for one in (value, values[name]))
        ), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of a single process, after three steps and after five, for every kind."""
    folder = tmp_path_factory.mktemp("unbroken")
    for kind in SETTINGS:
        save("one", kind, folder / kind)
        model, optimizer = build("one", SETTINGS[kind])
        train_on_drawn_gradients(model, [optimizer], range(5))
        checkpoints = Checkpoints(folder / kind, save_rng=False, keep=9)
        checkpoints.save(5, model, [optimizer], {})
        checkpoints.commit()
    return folder


FAST = ("shards", "tensor")


@needs_torchao
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(name, kind, marks=() if name in FAST else pytest.mark.slow)
        for name in list(LAYOUTS)[1:]
        for kind in SETTINGS
        if "experts" not in name or kind == "codes and masters"  # layouts of experts take minutes
    ],
)
def test_a_run_goes_on_in_another_layout_equal_to_the_bit(
    layout: str, kind: str, unbroken: Path, tmp_path: Path
) -> None:
    ranks, _ = LAYOUTS[layout]
    first, last = unbroken / kind / "step-00000003", unbroken / kind / "step-00000005"
    POOL.run(save, layout, kind, tmp_path / "parts", ranks=ranks)
    assert_equal(first, tmp_path / "parts" / "step-00000003")
    save("one", kind, tmp_path / "whole", tmp_path / "parts" / "step-00000003")
    assert_equal(last, tmp_path / "whole" / "step-00000005")
    POOL.run(save, layout, kind, tmp_path / "again", first, ranks=ranks)
    assert_equal(last, tmp_path / "again" / "step-00000005")


def read_first_moments(layout: str, folder: Path, resume: Path | None = None) -> dict[str, Tensor]:
    """The first moments, in full, of a model that is saved after three steps, or of one that is loaded."""
    config = small("Llama-3.2-1B", n_layer=1, intermediate_size=24)  # a layout splits blocks of 8 values
    model = build_model(config, layout, "32-true", seed=1)
    (optimizer,) = build_optimizers(PrecisionAwareAdamW(exp_avg_dtype="fp8"), model)
    assert isinstance(optimizer, PrecisionAwareOptimizer)
    if resume:
        load_checkpoint(resume, model, [optimizer], warn=lambda _: None)
    else:
        train_on_drawn_gradients(model, [optimizer], range(3))
        checkpoints = Checkpoints(folder, save_rng=False)
        checkpoints.save(3, model, [optimizer], {})
        checkpoints.commit()
    moments = {}
    for name, parameter in model.named_parameters():
        state, width = optimizer.state[parameter], get_local_tensor(parameter).shape[-1]
        formats = optimizer.choose_formats(parameter)
        stored = {
            suffix: get_local_tensor(shard_scales(state[f"exp_avg{suffix}"], parameter, one.values))
            for suffix, one in formats.list_tensors(width)["exp_avg"].items()
        }
        values = zeros_in_layout(parameter, torch.float32, torch.device("cpu"))
        get_local_tensor(values).copy_(formats.exp_avg.read(stored, signed=True))
        moments[name] = full_tensor(values)
    return moments


def test_moments_are_kept_where_a_layout_splits_their_blocks(tmp_path: Path) -> None:
    whole = read_first_moments("one", tmp_path / "one")
    split = POOL.run(read_first_moments, "tensor", tmp_path / "tensor", ranks=2)[0]
    checkpoint, other = (tmp_path / name / "step-00000003" for name in ("one", "tensor"))
    name = "optimizer.exp_avg_exponent.blocks.0.mlp.down.weight"
    exponents = [open_checkpoint(one).tensors[name] for one in (checkpoint, other)]
    assert [saved.shape[1] for saved in exponents] == [24 // 8, 24 // 4]
    for loaded in POOL.run(read_first_moments, "tensor", tmp_path, checkpoint, ranks=2):
        assert all(torch.equal(moment, whole[name]) for name, moment in loaded.items())
    loaded = read_first_moments("one", tmp_path, other)
    assert all(torch.equal(moment, split[name]) for name, moment in loaded.items())


def draw_gradients(steps: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def step_on(weight: Tensor, steps: int = 12, **settings: Any) -> tuple[nn.Parameter, PrecisionAwareOptimizer]:
    """A weight after steps with gradients that are drawn."""
    module = nn.Module()
    module.weight = nn.Parameter(weight.clone())
    (optimizer,) = build_optimizers(PrecisionAwareAdamW(lr=1e-2, **settings), module)
    for gradient in draw_gradients(steps, *weight.shape):
        module.weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return module.weight, optimizer  # type: ignore[return-value]


def step_as_torch(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, foreach=False)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def test_states_in_float32_step_as_torch_s_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_aware, "UPDATE_SIZE", 640)  # ten rows at a time
    (weight,) = draw_gradients(1, 33, 64)
    assert torch.equal(step_on(weight)[0], step_as_torch(weight, draw_gradients(12, 33, 64)))


def test_master_weights_in_float32_are_those_of_torch_to_the_bit() -> None:
    weight = draw_gradients(1, 33, 64)[0].bfloat16()
    halves, optimizer = step_on(weight, main_params_dtype="fp32")
    expected = step_as_torch(weight.float(), [gradient.bfloat16().float() for gradient in draw_gradients(12, 33, 64)])
    master = optimizer.formats.main_param.read(halves.detach(), {"": optimizer.state[halves]["main_param"]})
    assert torch.equal(master, expected)
    spacing = expected.abs().log2().floor().exp2() * 2**-7
    assert ((halves.float() - expected).abs() <= spacing / 2).all()
    fp16, _ = step_on(weight, main_params_dtype="fp16")
    assert (fp16.float() - expected).norm() / expected.norm() < 2**-8


def test_weights_without_masters_follow_small_updates_on_average() -> None:
    """Updates of a thousandth of the distance of neighboring numbers move the mean of weights as far as in float32."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.full((500, 1000), 1.0, dtype=torch.bfloat16))
    settings = PrecisionAwareAdamW(lr=2**-7 / 1000, weight_decay=0.0)
    (optimizer,) = build_optimizers(settings, module)
    for _ in range(50):
        module.weight.grad = torch.full_like(module.weight, -0.5)
        optimizer.step()
    assert module.weight.float().mean().item() - 1 == pytest.approx(50 * 2**-7 / 1000, rel=0.05)


@pytest.mark.parametrize("kind", SETTINGS)
def test_states_in_host_memory_change_no_bit(kind: str) -> None:
    if kind == "codes and masters":
        pytest.importorskip("torchao")
    results = []
    for fraction in (0.0, 0.5, 1.0):
        model, optimizer = build("one", {**SETTINGS[kind], "offload_fraction": fraction})
        total, on_host = (sum(p.numel() for p in some) for some in (model.parameters(), optimizer.on_host))
        assert fraction - 0.02 <= on_host / total <= fraction
        train_on_drawn_gradients(model, [optimizer], range(4))
        results.append([parameter.detach() for parameter in model.parameters()])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


PAGE = (Path(__file__).parents[2] / "tutorials/precision.md").read_text()
BYTES = [row for row in re.findall(r"^\| `(\w+)` .*\| ([\d.]+) \|$", PAGE, re.MULTILINE) if row[0] in FORMATS]


@needs_torchao
@pytest.mark.parametrize(("name", "stated"), BYTES)
def test_states_take_the_bytes_that_the_tutorial_states(name: str, stated: str) -> None:
    weight, optimizer = step_on(torch.randn(256, 1024), 1, exp_avg_dtype=name, exp_avg_sq_dtype=name)
    measured = sum(one.nbytes for one in optimizer.state[weight].values() if isinstance(one, Tensor))
    assert measured / weight.numel() / 2 == pytest.approx(float(stated), rel=0.02)
    assert len(BYTES) == 6


@pytest.mark.parametrize(("master", "stated"), [(None, 0), ("fp32", 2), ("fp16", 2 + 1 / 32), ("fp8", 1 + 1 / 32)])
def test_master_weights_take_at_most_two_bytes_beside_the_weights(master: str | None, stated: float) -> None:
    weight, optimizer = step_on(torch.randn(256, 1024).bfloat16(), 1, main_params_dtype=master)
    measured = sum(one.nbytes for one in optimizer.state[weight].values() if isinstance(one, Tensor))
    assert measured / weight.numel() == 8 + stated


def test_formats_other_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    save("one", "halves", tmp_path)
    model, optimizer = build("one", {"exp_avg_dtype": "fp8"})
    with pytest.raises(UserError, match=r"exp_avg of \S+ was saved as BF16 \[.*\], in this run it is F8_E4M3"):
        load_checkpoint(tmp_path / "step-00000003", model, [optimizer])


@pytest.mark.parametrize(
    ("precision", "settings", "message"),
    [
        ("bf16-mixed", {"main_params_dtype": "fp16"}, "optimizer.main_params_dtype: fp16 needs precision: bf16-true"),
        (None, {"main_params_dtype": "fp32"}, "weights of precision: null are in float32"),
        ("64-true", {}, "precision: 64-true is not supported with optimizer: PrecisionAwareAdamW"),
    ],
)
def test_formats_that_do_not_fit_the_precision_are_refused(
    precision: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Pretrain("x", precision=precision, optimizer=PrecisionAwareAdamW(**settings))


def test_missing_torchao_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_4bit", None)
    import_torchao.cache_clear()
    with pytest.raises(
        UserError, match=r"states of 4bit need torchao .*; run pip install 'litgpt\[quantize\]', or use fp8"
    ):
        build_optimizers(PrecisionAwareAdamW(exp_avg_dtype="4bit"), nn.Linear(4, 4))


def test_offloading_what_is_in_host_memory_is_refused() -> None:
    with pytest.raises(UserError, match=r"offload_fraction: 0\.5 has no effect with parallel.cpu_offload: true; set"):
        Pretrain("x", parallel=ParallelArgs(cpu_offload=True), optimizer=PrecisionAwareAdamW(offload_fraction=0.5))


def train_200_steps(folder: Path, text: Path, precision: str, **settings: str) -> float:
    """The mean loss of the last 20 of 200 steps on real text."""
    folder.mkdir()
    shape = {**RUN_SHAPE, "n_embd": 64, "intermediate_size": 128, "block_size": 128}
    write_recipe(
        folder,
        model_config=shape,
        precision=precision,
        data={"class_path": "PythonDocs", "init_args": {"data_path": str(text)}},
        train__max_steps=200,
        train__micro_batch_size=8,
        train__save_interval=None,
        optimizer={"class_path": "PrecisionAwareAdamW", "init_args": {"lr": 3e-3, **settings}},
    )
    codes = join_ranks(start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=folder), timeout=250)
    assert codes == [0], (folder / "rank-0.log").read_text()
    losses = read_losses(folder)
    return sum(losses[step] for step in range(181, 201)) / 20


@pytest.mark.slow
@needs_torchao
@pytest.mark.timeout(1200)
def test_losses_after_200_steps_are_those_of_states_in_float32(tmp_path: Path, python_docs: Path) -> None:
    runs: dict[str, tuple[str, dict[str, str]]] = {
        **{name: ("32-true", {"exp_avg_dtype": name, "exp_avg_sq_dtype": name}) for name in FORMATS},
        **{f"master {name}": ("bf16-true", {"main_params_dtype": name}) for name in ("fp32", "fp16", "fp8")},
        "no master": ("bf16-true", {}),
    }
    losses = {
        name: train_200_steps(tmp_path / name, python_docs, precision, **settings)
        for name, (precision, settings) in runs.items()
    }
    print(losses)
    assert {name: loss for name, loss in losses.items() if loss > losses["fp32"] + 0.02} == {}
