"""FourierFT: a matrix is changed by the inverse transform of a few trained frequencies (Gao et al. 2024)."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, gather_value, own_parameter, upcast
from litgpt.adapt.targets import find_linears, get_module_aliases
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import seeded_generator
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import FourierFT


class FourierLinear(AdaptedLayer):
    """A linear layer that computes (W + s Re F^-1(S)) x + b, where S is zero but for the trained frequencies.

    Its added parameter is `fourier_spectrum` (n,), the values of S at the entries `fourier_entries` of the flat matrix.
    """

    fourier_scaling: float
    fourier_entries: Tensor
    in_features: int
    out_features: int

    @classmethod
    def from_linear(cls, layer: nn.Linear, name: str, settings: FourierFT) -> None:
        """Convert a layer in place.

        Raises:
            UserError: if its matrix has fewer entries than frequencies are trained.
        """
        count, most = settings.n_frequency, layer.out_features * layer.in_features
        if count > most:
            raise UserError(f"tuner.n_frequency: {count} is more than the {most} weights of {name}; set at most {most}")
        add_parameter(layer, "fourier_spectrum", (count,), own_parameter(layer, "weight"))
        layer.fourier_scaling = settings.scaling  # type: ignore[assignment]
        layer.fourier_entries = draw_entries(most, count, settings.frequency_seed)
        add_mixin(layer, cls)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with the changed matrix; (..., in) -> (..., out)."""
        y = super().forward(x)
        if not self.adapter_on:
            return y
        spectrum = own_parameter(self, "fourier_spectrum")
        inputs = x if torch.is_autocast_enabled(x.device.type) else x.to(spectrum.dtype)
        return y + F.linear(inputs, self.build_update(spectrum).to(inputs.dtype)).to(y.dtype)

    def build_update(self, spectrum: Tensor) -> Tensor:
        """The change of the matrix (out, in), in float32 or wider."""
        values = upcast(spectrum)
        dense = values.new_zeros(self.out_features * self.in_features)
        dense = dense.scatter(0, self.fourier_entries.to(values.device), values)
        return torch.fft.ifft2(dense.view(self.out_features, self.in_features)).real * self.fourier_scaling

    def merge_parameter(self, name: str) -> Tensor:
        """The changed matrix; the bias is the base's."""
        value = super().merge_parameter(name)
        if name != "weight":
            return value
        return value + self.build_update(gather_value(self, "fourier_spectrum")).to(value.dtype)

    def init_values(self, settings: FourierFT, seed: str) -> InitValues:
        """Standard normal values, as in algorithm 1 of the paper, or zeros."""
        spectrum = torch.zeros(own_parameter(self, "fourier_spectrum").shape)
        if settings.init == "normal":
            spectrum.normal_(generator=seeded_generator(f"{seed}/fourier_spectrum"))
        yield "fourier_spectrum", spectrum


@cache
def draw_entries(size: int, count: int, seed: int) -> Tensor:
    """Distinct entries (count,) of a flat matrix, drawn as PEFT draws them; equal for all matrices of a size."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:count].clone()


def attach_fourierft(model: GPT, settings: FourierFT) -> None:
    """Add a spectrum to the layers that the settings name.

    Raises:
        UserError: if a name matches no linear layer, or a layer has too few weights.
    """
    for name, layer in find_linears(model, get_module_aliases(model), settings.target_modules):
        FourierLinear.from_linear(layer, name, settings)
