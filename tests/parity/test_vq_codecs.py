"""Published codecs of images against transformers: latents, codes and pixels, and folders that load in both."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor

from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.media.codes import open_code_reader
from litgpt.data.read.media import Medium
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.model.code_tokens import GridConstraint
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.image_codec import load_codec, save_codec
from litgpt.model.vq_codec import VQCodec
from litgpt.recipe.data import BatchShape
from litgpt.store.load_model import load_model
from tests.code_model import TEMPLATE, build_row, draw_noise, write_codec_folder, write_text_model
from tests.vision_model import write_rows

EMU3 = {
    **{"codebook_size": 64, "base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1},
    **{"attn_resolutions": [2], "hidden_size": 64, "num_attention_heads": 2, "embed_dim": 4, "latent_channels": 4},
}
JANUS = {
    **{"num_embeddings": 64, "base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1},
    **{"num_patches": 8, "latent_channels": 16, "embed_dim": 8},
}
CHAMELEON = {
    **{"num_embeddings": 64, "base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1},
    **{"resolution": 32, "attn_resolutions": [16], "latent_channels": 16, "embed_dim": 8},
}
SIZE, SIDE = 32, 8
MODELS = {
    "emu3": (EMU3, "Emu3VQVAE"),
    "janus": (JANUS, "JanusVQVAE"),
    "chameleon": (CHAMELEON, "ChameleonVQVAE"),
}


@torch.no_grad()
def write_model(folder: Path, kind: str) -> Any:
    """Write a small model of transformers with random weights, and statistics and codes as after training."""
    torch.manual_seed(0)
    settings, name = MODELS[kind]
    module = getattr(transformers.models, kind)
    config = getattr(getattr(module, f"configuration_{kind}"), f"{name}Config")(**settings)
    model = getattr(getattr(module, f"modeling_{kind}"), name)(config).eval()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            around = 1.0 if key.endswith("running_var") or ("norm" in key and key.endswith("weight")) else 0.0
            tensor.copy_(around + 0.2 * (torch.rand_like(tensor) - 0.5))
    latents, _ = encode(model, kind, torch.randn(1, 3, SIZE, SIZE))
    model.quantize.embedding.weight.copy_(latents[0].flatten(1).T[:64])  # so that other images have many of the codes
    model.save_pretrained(folder)
    return model


def encode(model: Any, kind: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The latents before the codebook, and the codes (B, N), by transformers."""
    if kind != "emu3":
        output = model.encode(pixels)
        return model.quant_conv(output.last_hidden_state), output.image_tokens.view(len(pixels), -1)
    output = model.encode(pixels, image_sizes=torch.tensor([[SIZE, SIZE]] * len(pixels)))
    latents = model.quant_conv(output.last_hidden_state.transpose(1, 2))[:, :, 0]
    return latents, torch.stack([codes.flatten() for codes in output.image_tokens])


def normalize(kind: str, images: Tensor) -> Tensor:
    """Images uint8 as the processor of a model normalizes them."""
    return images * 0.0078 - 1 if kind == "chameleon" else (images / 255 - 0.5) / 0.5


@pytest.mark.parametrize("kind", MODELS)
def test_codes_and_pixels_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", kind)
    codec = load_codec(tmp_path / "model", size=SIZE if kind == "emu3" else None)
    assert isinstance(codec, VQCodec) and (codec.shape.side, codec.shape.codes) == (SIDE, 64)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        latents, codes = encode(model, kind, pixels)
        torch.testing.assert_close(codec.embed_pixels(pixels), latents, atol=1e-5, rtol=1e-5)
        assert torch.equal(codec.find_codes(codec.embed_pixels(pixels)), codes) and len(codes.unique()) > 5
        if codec.can_draw:
            expected = model.decode(codes.view(2, SIDE, SIDE) if kind == "emu3" else codes)
            torch.testing.assert_close(codec.decode_pixels(codes), expected, atol=1e-5, rtol=1e-5)
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        _, codes = encode(model, kind, normalize(kind, images))
    assert torch.equal(codec.encode(images), codes) and codec.can_draw == (kind != "chameleon")
    if codec.can_draw:
        decoded = codec.decode(codes)
        assert decoded.dtype == torch.uint8 and decoded.shape == images.shape and decoded.float().std() > 1

    (tmp_path / "saved").mkdir()
    save_codec(tmp_path / "saved", codec)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(encode(again.eval(), kind, pixels)[1], encode(model, kind, pixels)[1])
    assert load_codec(tmp_path / "saved").shape == codec.shape


def test_a_codec_within_a_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "alone", "emu3")
    folder = tmp_path / "whole"
    folder.mkdir()
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "emu3", "vq_config": config}))
    colors = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Emu3ImageProcessor", **colors})
    )
    tensors = {f"model.vqmodel.{name}": tensor for name, tensor in model.state_dict().items()}
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    rest = {name: tensors[name] for name in names[1::2]} | {"model.text_model.norm.weight": torch.ones(3)}
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    codec, alone = load_codec(folder, size=SIZE), load_codec(tmp_path / "alone", size=SIZE)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(codec.state_dict()[name], tensor)
    assert codec.shape.mean == (0.4, 0.5, 0.6) and codec.shape.std == (0.2, 0.3, 0.4)
    image = torch.randint(256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    mean, std = (torch.tensor(colors[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        assert torch.equal(codec.encode(image), encode(model, "emu3", (image / 255 - mean) / std)[1])


WRONG: list[tuple[dict[str, Any], int | None, str]] = [
    ({"base_channels": 33}, SIZE, "base_channels: 33 is not a multiple of 32"),
    ({"codebook_size": -1}, SIZE, "codebook_size: -1 is not a number of a codec"),
    ({"channel_multiplier": []}, SIZE, r"channel_multiplier: \[\] is not a list of a few numbers"),
    ({"in_channels": 1}, SIZE, "in_channels: 1 is not supported; use 3"),
    ({"temporal_downsample_factor": 3}, SIZE, "temporal_downsample_factor: 3 is not a power of two"),
    ({"embed_dim": 8}, SIZE, "not the weights of config.json"),
    ({"num_res_blocks": 2}, SIZE, "not the weights of config.json"),
    ({"model_type": "llama_vqgan"}, SIZE, "not the config of image codes; use a folder of"),
    ({}, 30, "size: 30 is not a multiple of 4, the pixels of a code"),
]


@pytest.mark.parametrize(("changes", "size", "message"), WRONG)
def test_wrong_folders_are_one_line(changes: dict[str, Any], size: int | None, message: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "emu3")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message) as raised:
        load_codec(tmp_path / "model", size=size)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["janus", "chameleon"])
def test_a_codec_of_one_size_has_no_other(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", kind)
    with pytest.raises(UserError, match=f"size: 64 is not supported by {kind}_vqgan, whose images have 32; leave it"):
        load_codec(tmp_path / "model", size=64)


@torch.no_grad()
def test_codes_with_and_without_a_decoder(tmp_path: Path) -> None:
    alone, drawing = tmp_path / "alone", tmp_path / "drawing"
    write_model(alone, "chameleon")
    codes = torch.randint(64, (1, SIDE**2))
    with pytest.raises(UserError, match="chameleon_vqgan: published without the decoder that draws images"):
        load_codec(alone).decode(codes)

    janus = write_model(tmp_path / "janus", "janus")
    entries = torch.nn.functional.normalize(janus.quantize.embedding.weight, dim=-1)  # which Janus decodes in any case
    janus.quantize.embedding.weight.copy_(entries)
    config = json.loads((alone / "config.json").read_text()) | {"attn_resolutions": [8]}
    drawing.mkdir()
    (drawing / "config.json").write_text(json.dumps(config))
    save_file(janus.state_dict(), drawing / "model.safetensors")
    codec = load_codec(drawing)
    assert isinstance(codec, VQCodec) and codec.can_draw
    torch.testing.assert_close(codec.decode_pixels(codes), janus.decode(codes), atol=1e-5, rtol=1e-5)


def test_sizes_that_codes_do_not_fill_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "chameleon")
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"resolution": 30}, "resolution: 30 is not a multiple of 4, the pixels of a code; use 512"),
        ({"attn_type": "linear"}, "attn_type: linear is not supported; use vanilla"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=message):
            load_codec(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize: false is not supported; use true"),
        ("preprocessor_config.json", {"rescale_factor": 0}, "rescale_factor: 0 is not supported; use e.g. 0.0039"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "image_mean: 0.5 is not supported; use three numbers"),
        ("processor_config.json", {"image_processor": {"image_std": [0, 1, 1]}}, "image_std: .* use three numbers"),
        ("processor_config.json", {"image_processor": ["janus"]}, "image_processor: .* download the file again"),
        ("config.json", {"image_mean": "gray"}, "image_mean: gray is not supported; use three numbers"),
        ("config.json", {"model_type": ["janus_vqgan"]}, "not the config of image codes"),
    ],
)
def test_colors_of_wrong_types(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_model(tmp_path, "janus")
    values = json.loads((tmp_path / "config.json").read_text()) if name == "config.json" else {}
    (tmp_path / name).write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=message):
        load_codec(tmp_path)


def test_a_model_is_extended_by_published_codes(tmp_path: Path) -> None:
    write_model(tmp_path / "codec", "emu3")
    text = write_text_model(tmp_path / "text")
    flags = ["tokenizer", "extend", str(text), str(tmp_path / "codec"), str(tmp_path / "model"), "--size", "16"]
    assert main(flags) == 0
    reader = open_code_reader(Tokenizer(tmp_path / "model"))
    assert reader is not None and isinstance(reader.codec, VQCodec)
    draw_noise(tmp_path / "a.png", 1)
    tokens = reader.read(Medium(path=str(tmp_path / "a.png")))
    (codes,) = reader.tokens.find_images(tokens)
    assert len(codes) == 16 and reader.draw(codes).size == (16, 16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size >= 258 + 2 + 64


def test_trained_codes_have_one_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size: 16 has no effect with codes that were trained for 8; leave it out"):
        load_codec(write_codec_folder(tmp_path / "codec"), size=16)


TOKENS = ["<image>", "<|image start|>", "<|image end|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>"]


def write_emu3(folder: Path) -> Any:
    """Write a small model of Emu3 with a tokenizer of bytes and its tokens of images."""
    source = folder.parent / "tokenizer"
    backend = train_tokenizer([], "bytes", 258, source).processor
    names = [*TOKENS, *(f"<|visual token {code:06d}|>" for code in range(64))]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    text = {
        **{"vocab_size": 336, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
    }
    ids = {name: backend.token_to_id(name) for name in names}
    config = transformers.Emu3Config(
        vq_config=EMU3, text_config=text, vocabulary_map=ids, image_token_id=ids["<image>"], tie_word_embeddings=False
    )
    model = transformers.Emu3ForConditionalGeneration(config).eval()
    codec = write_model(folder.parent / "codec", "emu3")
    model.model.vqmodel.load_state_dict(codec.state_dict())
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model


@torch.no_grad()
def test_images_of_emu3_are_its_tokens(tmp_path: Path) -> None:
    model = write_emu3(tmp_path / "emu3")
    flags = ["tokenizer", "extend", str(tmp_path / "emu3"), str(tmp_path / "emu3"), str(tmp_path / "model")]
    assert main([*flags, "--size", str(SIZE)]) == 0
    tokenizer = Tokenizer(tmp_path / "model")
    reader = open_code_reader(tokenizer)
    assert reader is not None
    image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    run = reader.tokens.write(reader.encode(image))
    names = tokenizer.processor.decode(run, skip_special_tokens=False)
    row = r"(<\|visual token \d{6}\|>){8}<\|extra_200\|>"
    start, end = r"<\|image start\|>8\*8<\|image token\|>", r"<\|extra_201\|><\|image end\|>"
    assert re.fullmatch(f"{start}({row}){{8}}{end}", names.replace("> <", "><")), names

    ids = [0, *tokenizer.encode("a red dog", bos=False).tolist(), *run, 1]
    places = [model.config.image_token_id if token in run[5:-2] else token for token in ids]
    pixels = (image[None] / 255 - 0.5) / 0.5
    sizes = torch.tensor([[SIZE, SIZE]])
    expected = model(input_ids=torch.tensor([places]), pixel_values=pixels, image_sizes=sizes).logits
    ours = GPT(Config.from_checkpoint(tmp_path / "model"))
    load_model(ours, tmp_path / "model")
    torch.testing.assert_close(ours(torch.tensor([ids])), expected, atol=1e-5, rtol=1e-5)
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(written(torch.tensor([ids])).logits, expected, atol=1e-5, rtol=1e-5)

    constraint, written = GridConstraint(reader.tokens, 336, image_first=True), list[int]()
    for token in run:
        assert constraint.allowed()[token] and constraint.allowed().sum() in (1, 64)
        constraint.accept(token)
        written.append(token)
    assert reader.tokens.find_images([5, *written, 6]) == [reader.encode(image)] and not constraint.allowed()[run[-1]]


def test_rows_of_emu3(tmp_path: Path) -> None:
    write_emu3(tmp_path / "emu3")
    flags = ["tokenizer", "extend", str(tmp_path / "emu3"), str(tmp_path / "codec"), str(tmp_path / "model")]
    assert main([*flags, "--size", "16"]) == 0
    draw_noise(tmp_path / "a.png", 1)
    write_rows(tmp_path, [build_row(["dog"], [{"type": "image", "image": "a.png"}])])
    data = Conversations(str(tmp_path / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=tmp_path / "cache")
    data.connect(Tokenizer(tmp_path / "model"), 1, 128)
    data.prepare_data()
    shape = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=128, rank=0, ranks=1, seed=0)
    batch = next(iter(data.train_stream(shape)))
    reader = open_code_reader(data.tokenizer)
    assert reader is not None
    run = reader.read(Medium(path=str(tmp_path / "a.png")))
    trained = batch.labels[batch.labels >= 0].tolist()
    assert trained[: len(run)] == run and reader.tokens.find_images(batch.ids[0].tolist()) != []
