"""Models with a vision tower against transformers: read as published, logits, gradients, and written to load there."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt.data.media.canvases import choose_canvas, count_margins, order_canvas, order_frames
from litgpt.data.media.patches import count_places, cut_patches, pack_media
from litgpt.data.media.positions import build_media_positions
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.feature_order import FeatureOrder, join_orders
from litgpt.model.gpt import GPT
from litgpt.model.media import Grid, Media
from litgpt.model.registry import find_family
from litgpt.model.tower_config import TowerShape
from litgpt.store.adapters.peft_lora import list_published_mappings
from litgpt.store.load_model import iter_tensors, load_model
from litgpt.store.tensor_audit import audit_folder, find_differing
from tests.parity.tower_exports import check_export
from tests.parity.tower_gradients import compare_gradients
from tests.vision_model import DECODER, TOWER

IMAGE, VIDEO = 90, 91
SIGLIP = "siglip_vision_model"
TEXT = {**DECODER, "vocab_size": 96}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN = {"depth": 3, "num_heads": 2, "patch_size": 4}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 92, "vision_end_token_id": 93}


class Row(NamedTuple):
    """A small model: its class, settings, and the sizes of its images, and of the frames of a video, in pixels."""

    kind: str
    text: dict[str, Any]
    vision: dict[str, Any]
    outside: dict[str, Any]
    images: list[tuple[int, int]]
    video: tuple[int, int, int] | None = None


def llava(text: dict[str, Any], tower: str, select: str, layer: int = -2) -> Row:
    """A LLaVA model of a decoder and a tower."""
    outside = {"image_token_index": IMAGE, "vision_feature_select_strategy": select, "vision_feature_layer": layer}
    vision = {**TOWER, "model_type": tower, "image_size": 16}
    return Row("Llava", {**TEXT, **text}, vision, outside, [(16, 16)] * 3)


CANVASES = [[16, 32], [32, 16], [32, 32], [48, 16]]


def llava_next(text: dict[str, Any], tower: str, select: str) -> Row:
    """A LLaVA-NeXT model of a decoder and a tower, and images with margins at each side, and without."""
    row = llava(text, tower, select)
    sizes = [(20, 33), (40, 24), (32, 32)]
    return row._replace(kind="LlavaNext", outside={**row.outside, "image_grid_pinpoints": CANVASES}, images=sizes)


def llava_onevision() -> Row:
    """A LLaVA-OneVision model; the last pixels of tiles fill no patch, features of the last image are interpolated."""
    row = llava({"model_type": "qwen2"}, SIGLIP, "full", -1)
    outside = {"video_token_index": VIDEO, "vision_aspect_ratio": "anyres_max_2", "tie_word_embeddings": False}
    outside["image_grid_pinpoints"] = [[22, 44], [44, 22], [44, 44]]
    return row._replace(
        kind="LlavaOnevision",
        vision={**row.vision, "image_size": 22},
        outside={**row.outside, **outside},
        images=[(20, 33), (40, 24), (44, 44)],
        video=(3, 22, 22),
    )


def qwen(kind: str, vision: dict[str, Any], text: dict[str, Any] | None = None) -> Row:
    """A model of the Qwen-VL line; images of sizes that leave windows cut, and a video."""
    settings = {**TEXT, "rope_parameters": SECTIONS, **(text or {})}
    return Row(kind, settings, {**QWEN, **vision}, TOKENS, [(16, 24), (40, 48), (8, 8)], (5, 24, 16))


def glm(kind: str, **more: Any) -> Row:
    """A model of the GLM-V line; transformers reads a video at the places of images: a text has only one of them."""
    text = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None, **more}
    rope = {**SECTIONS, "partial_rotary_factor": 0.5}
    vision = {**QWEN, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "image_size": 24}
    tokens = {**TOKENS, "image_start_token_id": 92, "image_end_token_id": 93}
    sizes = [(16, 24), (40, 48), (8, 8)]
    return Row(kind, {**TEXT, **text, "rope_parameters": rope}, vision, tokens, sizes)


def idefics(kind: str) -> Row:
    """A model of the Idefics 3 line."""
    vision = {**TOWER, "image_size": 32}
    outside = {"image_token_id": IMAGE, "scale_factor": 2}
    return Row(kind, {**TEXT, "model_type": "llama"}, vision, outside, [(24, 24)] * 3)


def gemma() -> Row:
    """A Gemma 3 model, in which an image has more tokens than a window."""
    text = {**TEXT, "head_dim": 8, **ALTERNATING}
    vision = {**TOWER, "model_type": "siglip_vision_model", "image_size": 24}
    outside = {"image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93, "mm_tokens_per_image": 9}
    outside["tie_word_embeddings"] = False  # as in the test of generation, where the scale would repeat the last token
    return Row("Gemma3", text, vision, outside, [(24, 24)] * 3)


def paligemma(text: dict[str, Any], **vision: Any) -> Row:
    """A PaliGemma model of a decoder."""
    vision = {**TOWER, "model_type": "siglip_vision_model", "image_size": 16, **vision}
    outside = {"image_token_index": IMAGE, "projection_dim": 32, "tie_word_embeddings": False}
    return Row("PaliGemma", {**TEXT, "head_dim": 8, **text}, vision, outside, [(16, 16)] * 3)


def llama4() -> Row:
    """A Llama 4 model, for tiles of images."""
    text = {"head_dim": 8, "intermediate_size_mlp": 44, "num_local_experts": 4}
    text |= {"no_rope_layer_interval": 2, "attention_chunk_size": 16, "floor_scale": 16}
    sizes = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 20)
    vision = {**TOWER, "model_type": "llama4_vision_model", "intermediate_size": 64, "image_size": 24, **sizes}
    outside = {"image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93}
    return Row("Llama4", {**TEXT, **text}, vision, outside, [(24, 24)] * 3)


def internvl(text: dict[str, Any], layer: int = -1, **vision: Any) -> Row:
    """An InternVL model of a decoder and settings of its tower."""
    vision = {**TOWER, "model_type": "internvl_vision", "image_size": [24, 24], "patch_size": [4, 4], **vision}
    outside = {"image_token_id": IMAGE, "image_seq_length": 9, "vision_feature_layer": layer}
    return Row("InternVL", {**TEXT, **text}, vision, {**outside, "tie_word_embeddings": False}, [(24, 24)] * 3)


def pixtral(kind: str, text: dict[str, Any], **outside: Any) -> Row:
    """A model with a Pixtral tower, and images of different sizes."""
    vision = {**TOWER, "model_type": "pixtral", "image_size": 64, "hidden_act": "silu"}
    sizes = [(16, 24), (40, 16), (8, 8)]
    return Row(
        kind, {**TEXT, **text}, vision, {"image_token_index": IMAGE, "vision_feature_layer": -1, **outside}, sizes
    )


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}
SCALED |= {"rope_theta": 10000.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
MINISTRAL = {"model_type": "ministral3", "pad_token_id": None, "rope_parameters": SCALED}
LLAVA_FULL = {"vision_feature_select_strategy": "full"}
PATCHED = ("Qwen", "Glm4v")
"""The starts of kinds that take patches and their grids."""
TILED = ("Idefics3", "SmolVLM")
"""Kinds that take the tiles of an image as a dim."""
CUT = ("LlavaNext", "LlavaOnevision")
"""Kinds that take the pictures of an image as a dim, with empty ones after them, and its size."""
IN_TURN = {**SECTIONS, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
DEEP: dict[str, Any] = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
DEEP |= {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
GLM_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 2.0,
}
WINDOWS = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
ROWS = {
    "llava-llama-clip": llava({"model_type": "llama"}, "clip_vision_model", "default"),
    "llava-llama-dinov2": llava({"model_type": "llama"}, "dinov2", "default", -1),
    "llava-mistral-siglip": llava({"model_type": "mistral", "sliding_window": 8, "head_dim": 8}, SIGLIP, "full", -1),
    "llava-qwen2-siglip": llava({"model_type": "qwen2", "tie_word_embeddings": False}, SIGLIP, "full", 2),
    "llava_next-llama-clip": llava_next({"model_type": "llama"}, "clip_vision_model", "default"),
    "llava_next-mistral-siglip": llava_next({"model_type": "mistral", "head_dim": 8}, SIGLIP, "full"),
    "llava_onevision": llava_onevision(),
    "qwen2_vl": qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": qwen("Qwen2_5_VL", {**WINDOWS, "fullatt_block_indexes": [1], "tokens_per_second": 2}),
    "qwen3_vl": qwen("Qwen3VL", DEEP, {"head_dim": 8, "rope_parameters": IN_TURN}),
    "qwen3_vl_moe": qwen("Qwen3VLMoe", DEEP, {"head_dim": 8, "rope_parameters": IN_TURN, **EXPERTS}),
    "glm4v": glm("Glm4v"),
    "glm4v_moe": glm("Glm4vMoe", **GLM_EXPERTS),
    "idefics3": idefics("Idefics3"),
    "smolvlm": idefics("SmolVLM"),
    "gemma3": gemma(),
    "llama4": llama4(),
    "paligemma-gemma-siglip": paligemma({"model_type": "gemma"}, vision_use_head=False),
    "paligemma-gemma2-siglip": paligemma({"model_type": "gemma2", "query_pre_attn_scalar": 8, **ALTERNATING}),
    "internvl-qwen2-internvl": internvl({"model_type": "qwen2"}, attention_bias=True),
    "internvl-qwen3-internvl": internvl(
        {"model_type": "qwen3", "head_dim": 8}, -2, norm_type="rms_norm", use_qk_norm=True, use_mask_token=True
    ),
    "llava-mistral-pixtral": pixtral("Llava", {"model_type": "mistral"}, **LLAVA_FULL),
    "mistral3-mistral-pixtral": pixtral("Mistral3", {"model_type": "mistral"}, tie_word_embeddings=False),
    "mistral3-ministral3-pixtral": pixtral("Mistral3", MINISTRAL, spatial_merge_size=2),
}


def build_reference(row: Row) -> Any:
    """A small random model of transformers, with weights far enough from zero that every part shows in the logits."""
    config = getattr(transformers, f"{row.kind}Config")(
        text_config=row.text, vision_config=row.vision, **row.outside, pad_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class CutImage(NamedTuple):
    """An image or video: the pictures that the tower reads (N, 3, H, W), their patches and grids, and the order of
    features."""

    pictures: Tensor
    items: list[tuple[Tensor, Grid]]
    order: FeatureOrder | None
    places: int


def draw_image(row: Row, number: int, shape: TowerShape, generator: torch.Generator | None = None) -> CutImage:
    """Random pixels in place of one of the images of a model."""
    size, side, order = row.images[number], row.vision.get("image_size"), None
    pictures, picture = 1, size
    if shape.canvases is not None:
        canvas, picture = choose_canvas(size, [(height, width) for height, width in shape.canvases]), (side, side)
        rows, columns, own = canvas[0] // side, canvas[1] // side, side // shape.patch
        margins = count_margins(size, (rows * own, columns * own))
        order = order_canvas(rows, columns, own, margins, shape.canvas_tiles)
        pictures = 1 + rows * columns
    pixels = torch.randn(pictures, 3, *picture, generator=generator)
    items = [cut_patches(each[None], shape) for each in pixels]
    return CutImage(pixels, items, order, count_places(items[0][1], shape) if order is None else order.counts[0])


def draw_video(row: Row, shape: TowerShape) -> list[CutImage]:
    """Random frames of a video, if the model reads them."""
    if row.video is None:
        return []
    frames = torch.randn(row.video[0], 3, *row.video[1:])
    item = cut_patches(frames, shape)
    order = order_frames(len(frames), item[1][1], shape.frame_block) if shape.line_break else None
    return [CutImage(frames, [item], order, count_places(item[1], shape) if order is None else order.counts[0])]


def join_images(cut: list[CutImage]) -> Media:
    """Images and videos as the tower reads them."""
    items = [item for image in cut for item in image.items]
    return replace(pack_media(items), order=join_orders([image.order for image in cut]))


class Example(NamedTuple):
    """Two texts with images, and a video if the model reads them, for both libraries."""

    ids_BT: Tensor
    media: Media
    positions: Tensor | None
    prompts_BT: Tensor
    theirs: dict[str, Any]


def build_example(row: Row, shape: TowerShape) -> Example:
    """The first row has two images, the second one and the video; both have the same length."""
    torch.manual_seed(1)
    cut = [draw_image(row, number, shape) for number in range(3)]
    film = draw_video(row, shape)

    def places(number: int) -> list[int]:
        return [IMAGE] * cut[number].places

    first = [5, 6, *places(0), 7, *places(1), 8]
    second = [9, *places(2), 11, *([VIDEO] * sum(each.places for each in film)), 12, 13]
    length = max(len(first), len(second))
    texts = [text + list(range(20, 20 + length - len(text))) for text in (first, second)]
    ids = torch.tensor(texts)
    media = join_images([*cut, *film])
    theirs = build_hf_images(row, cut) | build_hf_videos(row, film)
    positions = None
    prompts = torch.arange(length) < torch.tensor([[len(first) - 1], [len(second)]])
    if row.kind.startswith(PATCHED):
        by_row = [media.grids[:2], media.grids[2:]]
        positions = torch.stack([build_media_positions(shape, *pair) for pair in zip(texts, by_row, strict=True)])
        theirs |= {"position_ids": positions.transpose(0, 1)}
    types = {"Gemma3": ids == IMAGE, "PaliGemma": ~prompts}
    theirs |= {"token_type_ids": types[row.kind].int()} if row.kind in types else {}
    return Example(ids, media, positions, prompts, theirs)


def build_hf_images(row: Row, cut: list[CutImage], numbers: Sequence[int] = range(3)) -> dict[str, Any]:
    """Images as the models of transformers take them.

    Args:
        numbers: of the images in the row.
    """
    if row.kind.startswith(PATCHED):
        items = [item for image in cut for item in image.items]
        grids = torch.tensor([grid for _, grid in items])
        return {"pixel_values": torch.cat([patches for patches, _ in items]), "image_grid_thw": grids}
    sizes = {"image_sizes": torch.tensor([row.images[number] for number in numbers])}
    if row.kind in CUT:
        most = max(len(image.pictures) for image in cut)
        ends = [(*[0] * 7, most - len(image.pictures)) for image in cut]
        padded = [torch.nn.functional.pad(image.pictures, end) for image, end in zip(cut, ends, strict=True)]
        return {"pixel_values": torch.stack(padded), **sizes}
    pixels = pad_images([image.pictures for image in cut])
    return {
        "pixel_values": pixels[None] if row.kind in TILED else pixels,
        **(sizes if row.vision.get("model_type") == "pixtral" else {}),
    }


def build_hf_videos(row: Row, film: list[CutImage]) -> dict[str, Any]:
    """At most one video as the models of transformers take it."""
    if not film:
        return {}
    if not row.kind.startswith(PATCHED):
        return {"pixel_values_videos": film[0].pictures[None]}
    (patches, grid), *_ = film[0].items
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}


def pad_images(images: list[Tensor]) -> Tensor:
    """Images (1, C, H, W) in one batch, with zeros at the right and below."""
    sides = [max(image.shape[dim] for image in images) for dim in (-2, -1)]
    pads = [(0, sides[1] - image.shape[-1], 0, sides[0] - image.shape[-2]) for image in images]
    return torch.cat([torch.nn.functional.pad(image, pad) for image, pad in zip(images, pads, strict=True)])


def compute_logits(model: GPT, example: Example) -> Tensor:
    """Our logits (B, T, V)."""
    prompts = example.prompts_BT
    return model(example.ids_BT, media=example.media, positions_BT=example.positions, prompts_BT=prompts)


def compute_hf_logits(model: Any, example: Example) -> Tensor:
    """The logits (B, T, V) of transformers."""
    return model(input_ids=example.ids_BT, **example.theirs).logits


FAST = ("llava_next-mistral-siglip", "llava_onevision", "llava-llama-dinov2", "llava-qwen2-siglip", "qwen2_5_vl")
FAST += ("qwen3_vl_moe", "glm4v", "idefics3", "gemma3", "llama4")
FAST += ("internvl-qwen3-internvl", "mistral3-ministral3-pixtral", "paligemma-gemma2-siglip")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_tower_family_as_published(name: str, tmp_path: Path) -> None:
    row, source = ROWS[name], tmp_path / "published"
    hf_model = build_reference(row)
    hf_model.save_pretrained(source)
    if name == "qwen3_vl_moe":
        write_experts_as_on_the_hub(source)
    config = Config.from_checkpoint(source)
    family = find_family(config)
    assert family is not None and family.name == name and config.vision is not None
    modules = {name_module(mapping.hf_name) for mapping in list_published_mappings(config).values()}
    assert modules == set(hf_model.state_dict())  # as PEFT names them
    example = build_example(row, TowerShape.from_values(config.vision))

    model = GPT(config).eval()
    load_model(model, source, warn=lambda line: pytest.fail(line))
    expected, actual = compute_hf_logits(hf_model, example), compute_logits(model, example)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    compare_gradients(model, hf_model, actual, expected, config)

    other = example._replace(media=replace(example.media, patches_NP=example.media.patches_NP.flip(0)))
    assert (compute_logits(model, other) - actual).abs().max() > 1e-3

    auto = transformers.AutoModelForImageTextToText
    check_export(model, hf_model, source, auto, lambda loaded: compute_hf_logits(loaded, example), expected)


def name_module(published: str) -> str:
    """The parameter of transformers that a published tensor is in: that of all experts, for one of an expert."""
    stacked = re.sub(r"experts\.\d+\.(gate|up)_proj\.weight", "experts.gate_up_proj", published)
    return re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", stacked)


def write_experts_as_on_the_hub(folder: Path) -> None:
    """Rewrite the experts of a folder, which transformers 5 writes as (out, in) matrices, to (in, out)."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: x.mT.contiguous() if ".experts." in name else x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_experts_in_both_layouts(tmp_path: Path) -> None:
    build_reference(ROWS["qwen3_vl_moe"]).save_pretrained(tmp_path)
    config = Config.from_checkpoint(tmp_path)
    newer = dict(iter_tensors(tmp_path, config))
    assert find_differing(audit_folder(tmp_path, config), config) == []
    write_experts_as_on_the_hub(tmp_path)
    older = dict(iter_tensors(tmp_path, config))
    assert older.keys() == newer.keys() and all(torch.equal(older[name], newer[name]) for name in newer)


GENERATIONS = {
    "llava-qwen2-siglip": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_newer_names_and_older_config(name: str, tmp_path: Path) -> None:
    build_reference(ROWS[name]).save_pretrained(tmp_path)
    config, tensors = Config.from_checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    expected = dict(iter_tensors(tmp_path, config))
    starts = GENERATIONS[name]
    renamed = {
        next((new + key.removeprefix(old) for old, new in starts.items() if key.startswith(old)), key): value
        for key, value in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    if name == "qwen2_5_vl":  # one level, and the kind of scaling that only names sections
        values = json.loads((tmp_path / "config.json").read_text())
        text = values.pop("text_config")
        rope = text.pop("rope_parameters")
        older = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        (tmp_path / "config.json").write_text(json.dumps({**text, **values, **older}))
    assert Config.from_checkpoint(tmp_path) == config
    actual = dict(iter_tensors(tmp_path, config))
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llava-qwen2-siglip", "llava_onevision"])
def test_embeddings_that_the_decoder_ties(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    config = getattr(transformers, f"{row.kind}Config")(text_config=row.text, vision_config=row.vision, **row.outside)
    values = {**config.to_dict(), "architectures": None, "tie_word_embeddings": False}
    values["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    assert transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert Config.from_checkpoint(tmp_path).tie_embeddings


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava-qwen2-siglip", {"text_config": {"model_type": "phi"}}, "text_config.model_type: 'phi'"),
        ("llava-qwen2-siglip", {"vision_config": {"model_type": "swin"}}, "vision_config.model_type: 'swin'"),
        ("llava-qwen2-siglip", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ("llava-qwen2-siglip", {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ("llava-qwen2-siglip", {"vision_config": [1]}, "vision_config"),
        ("internvl-qwen3-internvl", {"vision_config": {"norm_type": "none"}}, "vision_config.norm_type: 'none'"),
        ("internvl-qwen3-internvl", {"vision_config": {"image_size": [24, 28]}}, "vision_config.image_size: [24, 28]"),
        ("internvl-qwen3-internvl", {"vision_config": {"use_mean_pooling": False}}, "vision_config.use_mean_pooling"),
        ("internvl-qwen3-internvl", {"downsample_ratio": 0.25}, "downsample_ratio: 0.25"),
        ("mistral3-mistral-pixtral", {"text_config": {"rms_norm_eps": None}}, "text_config.rms_norm_eps"),
        ("qwen3_vl", {"vision_config": {"num_position_embeddings": 24}}, "vision_config.num_position_embeddings: 24"),
        ("gemma3", {"mm_tokens_per_image": 10}, "mm_tokens_per_image: 10"),
        ("llama4", {"vision_config": {"pixel_shuffle_ratio": 0.25}}, "vision_config.pixel_shuffle_ratio: 0.25"),
        ("llama4", {"vision_config": {"intermediate_size": 48}}, "vision_config.intermediate_size: 48"),
        ("llama4", {"vision_config": {"projector_input_dim": 24}}, "vision_config.projector_input_dim: 24"),
        ("llava_onevision", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio: 'pad'"),
        ("paligemma-gemma-siglip", {"projection_dim": 48}, "projection_dim: 48"),
        (
            "paligemma-gemma-siglip",
            {"text_config": {"use_bidirectional_attention": False}},
            "use_bidirectional_attention: False",
        ),
        ("llava-llama-dinov2", {"vision_config": {"use_swiglu_ffn": True}}, "vision_config.use_swiglu_ffn: True"),
        ("qwen2_5_vl", {"vision_config": {"rope_parameters": "x"}}, "vision_config.rope_parameters"),
        ("qwen2_5_vl", {"vision_config": {"spatial_merge_size": "x"}}, "vision_config.spatial_merge_size"),
        ("qwen2_5_vl", {"vision_config": {"patch_size": [14, 14]}}, "vision_config.patch_size"),
        ("qwen2_5_vl", {"vision_config": {"out_hidden_size": 48}}, "vision_config.out_hidden_size: 48"),
    ],
)
def test_configs_that_are_refused(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = ROWS[name]
    config = getattr(transformers, f"{row.kind}Config")(text_config=row.text, vision_config=row.vision, **row.outside)
    values = {**config.to_dict(), "architectures": None}
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(UserError, match=re.escape(message)):
        Config.from_checkpoint(tmp_path)
