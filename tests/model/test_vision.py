"""The vision tower: what it refuses, and that media and places must match."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from litgpt.data.media.patches import cut_patches, pack_media
from litgpt.errors import UserError
from litgpt.model.attention_inputs import build_attention_inputs
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from litgpt.model.tower_config import TowerShape
from litgpt.model.vision import Tower

VISION: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "mlp_size": 16, "blocks_run": 1, "patch": 4}
VISION |= {"positions": "learned", "side": 2, "image_token": 9}
SHAPE: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "padded_vocab_size": 16, "block_size": 32}


def build_model(**fields: Any) -> GPT:
    return GPT(Config(**SHAPE, vision={**VISION, **fields}))


def cut(model: GPT, height: int = 8, width: int = 8) -> Media:
    assert model.vision is not None
    return pack_media([cut_patches(torch.randn(1, 3, height, width), model.vision.shape)])


def test_features_stand_at_their_places() -> None:
    model = build_model()
    media, ids = cut(model), torch.tensor([[1, 9, 9, 2, 9, 9]])
    hidden = model.embed_media(ids, media)
    assert model.vision is not None
    assert torch.equal(hidden[0, [1, 2, 4, 5]], model.vision(media))
    assert torch.equal(hidden[0, [0, 3]], model.embedding(ids[0, [0, 3]]))


def test_images_do_not_see_each_other() -> None:
    model = build_model(positions="bucket", merge=2, side=4)
    assert model.vision is not None
    first, second = torch.randn(1, 3, 8, 16), torch.randn(2, 3, 16, 8)
    items = [cut_patches(each, model.vision.shape) for each in (first, second[:1], second[1:])]
    together = model.vision(pack_media(items))
    apart = torch.cat([model.vision(pack_media([item])) for item in items])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


def test_deep_features_are_added_after_the_first_blocks() -> None:
    shape = {**VISION, "layers": 2, "blocks_run": 2, "deep_layers": [0, 1]}
    model = GPT(Config(**{**SHAPE, "n_layer": 3}, vision=shape))
    ids = torch.tensor([[1, 9, 9, 2, 9, 9]])
    hidden = model.embed_media(ids, cut(model))
    inputs = build_attention_inputs(model.config, torch.arange(6))
    assert hidden.shape == (1, 6, 3 * 16) and not hidden[0, [0, 3], 16:].any()
    expected, *added = hidden.split(16, -1)
    for block, more in zip(model.blocks, [*added, torch.zeros(())], strict=True):
        expected = block(expected, inputs) + more
    assert torch.equal(model.run_blocks(range(3), hidden, inputs), expected)
    for layer in range(3):  # as in groups that are recomputed
        hidden = model.run_blocks(range(layer, layer + 1), hidden, inputs)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("positions", ["bucket", "interpolated", "bicubic"])
def test_positions_for_images_of_any_size_do_not_wait_for_the_device(positions: str) -> None:
    with FakeTensorMode():
        tower = Tower(TowerShape.from_values({**VISION, "positions": positions}), 8)
        assert tower.compute_zero().shape == ()


def test_merged_patches_are_neighbours() -> None:
    shape = TowerShape.from_values({**VISION, "merge": 2, "positions": "none"})
    patches, grid = cut_patches(torch.arange(16 * 16.0).view(1, 1, 16, 16), shape)
    assert grid == (1, 4, 4)
    assert patches[:8, 0].tolist() == [0, 4, 64, 68, 8, 12, 72, 76]


@pytest.mark.parametrize(
    ("ids", "height", "message"),
    [([9, 9, 9], 8, "4 features for 3 places"), ([9] * 6, 12, "12 x 8 pixels: the vision tower reads 8 x 8")],
)
def test_refused_media(ids: list[int], height: int, message: str) -> None:
    model = build_model()
    with pytest.raises(UserError, match=message):
        model.embed_media(torch.tensor([ids]), cut(model, height))


def test_model_without_tower() -> None:
    model, media = GPT(Config(**SHAPE)), cut(build_model())
    with pytest.raises(UserError, match="no vision tower"):
        model.embed_media(torch.tensor([[9] * 4]), media)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": None}, "vision.width"),
        ({"heads": 3}, "16 does not fit 3 heads"),
        ({"side": None}, "vision.side"),
        ({"pixels": 99}, r"vision\.pixels: 99 with side: "),
        ({"blocks_run": 2}, "2 of 1 blocks"),
        ({"window": 3}, "vision.window"),
        ({"window": 16, "class_token": True}, r"vision\.window: 16 with class_token: true"),
        ({"act": "tanh"}, "vision.act"),
        ({"patches": 3}, "vision.patches: unknown"),
        ({"deep_layers": [1]}, r"vision\.deep_layers: \[1\] are not"),
        ({"projector_form": "triple"}, r"vision\.projector_hidden: None with projector_form: triple"),
        ({"layers": 2, "blocks_run": 2, "deep_layers": [0, 1]}, r"more than the 1 layers that add"),
        ({"image_blocks": True, "positions": "bucket"}, r"vision\.image_blocks: true with positions: bucket"),
        (
            {"image_blocks": True, "prompt_blocks": True, "positions": "learned", "side": 4},
            r"vision\.image_blocks: true with prompt_blocks: true",
        ),
    ],
)
def test_shapes_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**SHAPE, vision={**VISION, **fields})


def test_shape_without_a_size() -> None:
    with pytest.raises(UserError, match=r"vision\.image_token: missing"):
        Config(**SHAPE, vision={key: value for key, value in VISION.items() if key != "image_token"})


def test_sections_must_add_up() -> None:
    with pytest.raises(UserError, match="rope_sections"):
        Config(**SHAPE, rotary_percentage=1.0, rope_sections=[1, 1, 1])
