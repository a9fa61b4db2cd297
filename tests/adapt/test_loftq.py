"""LoftQ: the quantized base with its update is as near to the weights as can be, and is quantized alike when loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import adapt
from litgpt.adapt import loftq
from litgpt.adapt.quantization import QuantizedLinear
from litgpt.errors import UserError
from litgpt.infer.load import open_model
from litgpt.model.gpt import GPT
from litgpt.recipe.finetune import FinetuneLora
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.folder import save_adapter_folder
from litgpt.store.adapters.saved_adapter import BaseSettings
from litgpt.store.load_model import iter_tensors
from tests.adapt.models import IDS, perturb
from tests.adapt.test_quantization import build_quantized

KIND = "bnb.nf4"


def build(folder: Path, **settings: Any) -> tuple[GPT, LoRA]:
    tuner = LoRA(r=4, alpha=6, dropout=0.0, init="loftq", target_modules=["q", "down", "head"], **settings)
    model = build_quantized(KIND, tuner, folder / "base")
    loftq.initialize_loftq(model, tuner, iter_tensors(folder / "base", model.config))
    return model, tuner


def list_errors(model: GPT, folder: Path) -> list[float]:
    """How far each quantized matrix with its update is from the weights, in the order of the model."""
    weights, merged = dict(iter_tensors(folder / "base", model.config)), dict(adapt.merge_adapter(model))
    layers = [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    names = [f"{name}.weight" for name in layers if name.endswith((".q", ".down"))]
    return [(weights[name] - merged[name]).norm().item() for name in names]


def test_the_update_is_the_best_one_for_the_error_and_rounds_improve_it(tmp_path: Path) -> None:
    model, tuner = build(tmp_path)
    weights, expected = dict(iter_tensors(tmp_path / "base", model.config)), []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and name.endswith((".q", ".down")):
            error = weights[f"{name}.weight"] - layer.dequantize_weight(dtype=torch.float32)
            expected.append(torch.linalg.svdvals(error)[tuner.r :].norm().item())
    once = list_errors(model, tmp_path)
    assert once == pytest.approx(expected, rel=1e-4)
    assert not model.head.lora_b.any()  # type: ignore[union-attr]
    again = list_errors(build(tmp_path, loftq_iterations=4)[0], tmp_path)
    assert len(again) == 4 and sum(again) < 0.99 * sum(once)


@torch.no_grad()
def test_an_adapter_is_loaded_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    model, tuner = build(tmp_path, loftq_iterations=3)
    perturb(model)
    wanted = model.eval()(IDS)
    tensors = {name: value.clone() for name, value in adapt.get_adapter_parameters(model).items()}
    trained = BaseSettings("float32", KIND)
    where: dict[str, Any] = {"base": str(tmp_path / "base"), "base_settings": trained}
    save_adapter_folder(tmp_path / "adapter", tensors, config=model.config, settings=tuner, **where)
    loaded = open_model(tmp_path / "adapter", device=torch.device("cpu"))
    assert torch.equal(loaded(IDS), wanted)
    plain = build_quantized(KIND, tuner, tmp_path / "base")
    adapt.load_adapter(plain, tensors)
    assert not torch.allclose(plain(IDS), wanted, atol=1e-4)
    merged, exact = GPT(model.config), GPT(model.config)
    merged.load_state_dict(dict(adapt.merge_adapter(model)))
    assert (merged(IDS) - wanted).abs().max() < 1e-5
    # with the original weights, as in PEFT, only the error of quantization is missing
    exact.load_state_dict(weights := dict(iter_tensors(tmp_path / "base", model.config)))
    adapt.attach(exact, tuner)
    adapt.load_adapter(exact, tensors)
    for name, value in adapt.merge_adapter(exact):
        if name.endswith(".q.weight"):
            assert (value - merged.state_dict()[name]).norm() < 0.12 * weights[name].norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner": LoRA(init="loftq")}, "tuner.init: loftq has no effect without a quantized base; set quantize"),
        (
            {"tuner": LoRA(init="lora_ga"), "quantize": KIND},
            "lora_ga needs gradients of the weights, which quantize: bnb",
        ),
        (
            {"tuner": LoRA(init="lora_ga"), "devices": 2, "parallel": ParallelArgs(tensor=2)},
            "tuner.init: lora_ga is not supported with parallel.tensor: 2; set parallel.tensor: 1",
        ),
    ],
)
def test_what_an_initialization_needs_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        FinetuneLora(Path("x"), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loftq_iterations": 2}, "tuner.loftq_iterations: 2 has no effect with tuner.init: default; set tuner.init"),
        ({"ga_gamma": 8.0, "init": "pissa"}, "tuner.ga_gamma: 8.0 has no effect with tuner.init: pissa"),
        ({"init": "loftq", "dora": True}, "tuner.dora: true is not supported with tuner.init: loftq"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**settings)
