"""The formula for operations of vision towers against a count of the operations that run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt.model.config import Config
from litgpt.model.flops import TrainedShares, compute_training_flops
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from litgpt.model.tower_flops import EncodedMedia, measure_media
from litgpt.model.weight_counts import count_tower_layers

TOWER: dict[str, Any] = {"width": 32, "layers": 3, "heads": 2, "mlp_size": 48, "blocks_run": 3, "patch": 2, "merge": 2}
TOWER |= {"projector_hidden": 40, "image_token": 9}
TOWERS: dict[str, dict[str, Any]] = {
    "like LLaVA": {"class_token": True, "positions": "learned", "side": 4, "merge": 1, "blocks_run": 2},
    "like Qwen2.5-VL": {"rope_base": 100.0, "mlp_form": "gated", "window": 8, "full_layers": [1], "temporal": 2},
    "like Gemma 3": {"projector_merge": "mean", "projector_hidden": None, "pooling": True},
    "like GLM-4.1V": {"projector_merge": "convolution", "projector_form": "gated", "mlp_form": "gated"},
    "like Mistral 3": {"projector_merge": "matrix", "deep_layers": [1, 2]},
    "like Llama 4": {
        "projector_form": "triple",
        "class_token": True,
        "positions": "learned",
        "side": 4,
        "rope_base": 9.0,
    },
}
IMAGES = dict.fromkeys(("like LLaVA", "like Llama 4"), ((1, 4, 4), (1, 4, 4)))
FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda _: False,
    "decoder": lambda name: not name.startswith("vision."),
    "tower and projector": lambda name: name.startswith("vision."),
    "tower": lambda name: name.startswith("vision.") and "projector" not in name,
    "all but a block": lambda name: not name.startswith("vision.blocks.1."),
}


def build_config(kind: str) -> Config:
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "padded_vocab_size": 128, "vision": {**TOWER, **TOWERS[kind]}}
    return Config(**shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", TOWERS)
def test_formula_equals_the_count(kind: str, frozen: str) -> None:
    config = build_config(kind)
    model = GPT(config)
    unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unused and not FROZEN[frozen](name))
    assert model.vision is not None
    grids = IMAGES.get(kind, ((1, 6, 10), (2, 4, 2)))
    media = Media(torch.randn(sum(t * h * w for t, h, w in grids), model.vision.shape.patch_numbers), grids)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        features = model.vision(media)
        if features.requires_grad:
            features.sum().backward()
    shares, sizes = TrainedShares.measure(model), measure_media(config, [None, media])
    flops = compute_training_flops(config, tokens=0, sequence_length=0, trained=shares, media=sizes)
    assert counter.get_total_flops() == flops


def test_adapters_leave_weights_without_gradients() -> None:
    config = build_config("like Qwen2.5-VL")
    model, sizes = GPT.on_meta(config), EncodedMedia(patches=8, tokens=8, pairs=64, window_pairs=32)

    def count(*, adapted: bool) -> float:
        shares = TrainedShares.measure(model, adapted=adapted)
        return compute_training_flops(config, tokens=0, sequence_length=0, trained=shares, media=sizes)

    attention = 12 * 32 * (64 + 2 * 32)
    assert 3 * (count(adapted=True) - attention) == pytest.approx(2 * (count(adapted=False) - attention), rel=0.03)


def test_layers_that_a_tower_counts_for() -> None:
    assert count_tower_layers(Config.from_name("pythia-14m")) == 0
    assert count_tower_layers(build_config("like Mistral 3")) == 1
