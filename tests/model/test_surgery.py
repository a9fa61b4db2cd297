"""Modified modules: layers with the same modifications are one class, which is compiled once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from litgpt.model.delayed_scaling import AmaxHistory
from litgpt.model.fp8 import use_fp8
from litgpt.model.surgery import add_mixin, override_parameter


class Doubled(nn.Module):
    """A layer with twice its output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


def negate(module: Any, name: str) -> Tensor:
    return -module._parameters[name]


def test_layers_with_the_same_modifications_are_compiled_once() -> None:
    counter, layers, x = CompileCounter(), [nn.Linear(4, 4) for _ in range(4)], torch.randn(2, 4)
    for layer in layers:
        expected = 2 * nn.functional.linear(x, -layer.weight, layer.bias)
        add_mixin(layer, Doubled)
        override_parameter(layer, "weight", negate)
        layer.compile(backend=counter)
        torch.testing.assert_close(layer(x), expected)
    assert len({type(layer) for layer in layers}) == 1 and counter.frame_count == 1
    plain = nn.Linear(4, 4)
    override_parameter(plain, "weight", negate)
    assert isinstance(plain, nn.Linear) and not isinstance(plain, type(layers[0])) and type(layers[0]) is not nn.Linear


def test_layers_with_delayed_scales_are_compiled_once() -> None:
    names, cpu, counts = [str(number) for number in range(4)], torch.device("cpu"), []
    settings: dict[str, Any] = {"length": 1, "algorithm": "max", "formats": "hybrid", "emulate": True, "device": cpu}
    counter, history = CompileCounter(), AmaxHistory(names, **settings)
    for name in names:
        layer = nn.Linear(16, 16)
        use_fp8(layer, {"weight": history.build_product(name)}, 16)
        layer.compile(backend=counter)
        assert layer(torch.randn(16, 16)).shape == (16, 16)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4 and history.step_M3[:, 0].count_nonzero() == 4
