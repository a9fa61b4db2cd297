"""Chameleon, whose images are tokens of its vocabulary, against transformers."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor

from litgpt import LLM
from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.media import codes
from litgpt.data.media.codes import CodeReader, open_code_reader
from litgpt.data.media.errors import MediumError
from litgpt.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.infer.constraint import build_text_constraint
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_family
from litgpt.model.vq_codec import VQCodec
from litgpt.recipe.data import BatchShape
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from tests.code_model import build_row, draw_noise
from tests.parity.test_engine import list_ids
from tests.parity.test_vq_codecs import CHAMELEON, SIDE, SIZE, normalize, write_model
from tests.parity.tower_gradients import compare_gradients
from tests.vision_model import write_rows

CODES = 64
ORDER = random.Random(0).sample(range(CODES), CODES)  # of the tokens of codes in the vocabulary
DECODER: dict[str, Any] = {
    **{"vocab_size": 336, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-3},
    **{"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1},
}


def name_code(code: int) -> str:
    """The token of a code, as Chameleon calls it."""
    return f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z"


NAMES = ["<image>", "<racm3:break>", "<eoss>", "<sep>", *map(name_code, ORDER)]
FIRST = 258  # the tokens of bytes are before these
IDS = {name: FIRST + number for number, name in enumerate(NAMES)}


@torch.no_grad()
def write_chameleon(folder: Path, *, swin_norm: bool = False) -> Any:
    """Write a small model of Chameleon with random weights, and codes as after training."""
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(**DECODER, vq_config=CHAMELEON, vocabulary_map=IDS, swin_norm=swin_norm)
    model = transformers.ChameleonForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "vqmodel" not in name:  # with small embeddings, norms after layers make gradients large
            parameter.add_(torch.randn_like(parameter) * (0.5 if "embed_tokens" in name else 0.1))
    codec = write_model(folder.parent / "codec", "chameleon")
    model.model.vqmodel.load_state_dict(codec.state_dict())
    model.save_pretrained(folder)
    return model


def add_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes with the tokens of images into a folder."""
    backend = train_tokenizer([], "bytes", FIRST, folder.parent / "tokenizer").processor
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in NAMES])
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "sep_token": "<sep>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_folder(folder: Path) -> tuple[Any, CodeReader]:
    """Write a small model with its tokenizer; returns it, and the reader of its images."""
    model = write_chameleon(folder)
    add_tokenizer(folder)
    reader = open_code_reader(Tokenizer(folder))
    assert reader is not None
    return model, reader


def drop_codes(logits: Tensor) -> Tensor:
    """Logits without those of codes, which transformers never writes."""
    return torch.cat([logits[..., : IDS[name_code(ORDER[0])]], logits[..., IDS[name_code(ORDER[-1])] + 1 :]], -1)


def load_chameleon(folder: Path) -> Any:
    """The model in a folder, which must have all tensors of transformers and no others."""
    model, report = transformers.ChameleonForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("swin_norm", [False, True])
def test_chameleon_as_published(swin_norm: bool, tmp_path: Path) -> None:
    source, alone = tmp_path / "chameleon", tmp_path / "alone"
    hf_model = write_chameleon(source, swin_norm=swin_norm)
    config = Config.from_checkpoint(source)
    family = find_family(config)
    assert family is not None and family.name == "chameleon"
    assert (config.norm_1, config.post_mlp_norm) == (not swin_norm, swin_norm)
    model = GPT(config).eval()
    load_model(model, source, warn=lambda line: pytest.fail(line))
    ids = torch.randint(FIRST + CODES, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, actual = drop_codes(hf_model(ids).logits), drop_codes(model(ids))
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    decoder = [(name, each) for name, each in hf_model.named_parameters() if "vqmodel" not in name]
    compare_gradients(model, SimpleNamespace(named_parameters=lambda: decoder), actual, expected, config)
    assert main(["verify", str(source), "--length", "24"]) == 0

    lines = list[str]()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_model_folder(alone, config=config, tensors=tensors, warn=lines.append)
    assert "the other parts of one are missing" in lines[0] and not (alone / "config.json").exists()
    assert Config.from_checkpoint(alone) == config


@torch.no_grad()
def test_images_of_chameleon_are_its_tokens(tmp_path: Path) -> None:
    hf_model, reader = write_folder(tmp_path / "chameleon")
    tokenizer, images = Tokenizer(tmp_path / "chameleon"), torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    (run, other), pixels = (reader.tokens.write(reader.encode(each)) for each in images), normalize("chameleon", images)
    assert [run[1:-1], other[1:-1]] == hf_model.get_image_tokens(pixels).tolist() and len({*run, *other}) > 4
    assert (run[0], run[-1], len(run)) == (IDS["<racm3:break>"], IDS["<eoss>"], SIDE**2 + 2)

    words, more = [0, *tokenizer.encode("a red dog", bos=False).tolist()], tokenizer.encode("or", bos=False).tolist()
    ids = torch.tensor([[*words, *run, *more, *other, 1]])
    place = [run[0], *[IDS["<image>"]] * SIDE**2, run[-1]]
    places = torch.tensor([[*words, *place, *more, *place, 1]])
    expected = hf_model(input_ids=places, pixel_values=pixels).logits
    model = GPT(Config.from_checkpoint(tmp_path / "chameleon")).eval()
    load_model(model, tmp_path / "chameleon")
    logits = model(ids)
    torch.testing.assert_close(drop_codes(logits), drop_codes(expected), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(logits).all() and logits.abs().max() < 1e3
    swapped = hf_model(input_ids=places, pixel_values=pixels.flip(0)).logits
    assert (drop_codes(swapped) - drop_codes(expected)).abs().max() > 1e-3

    prompt, inputs = places[:, :-1], {"pixel_values": pixels, "max_new_tokens": 12, "do_sample": False}
    continued = hf_model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **inputs)[0]
    request = Request(tuple(ids[0, :-1].tolist()), 12, Sampling(0), constraint=build_text_constraint(tokenizer, 336))
    assert list_ids(Engine(model).run([request]))[0] == continued[prompt.shape[1] :].tolist()
    free = list_ids(Engine(model).run([replace(request, constraint=None)]))[0]
    assert reader.tokens.is_image(torch.tensor(free)).any()
    settings = {"max_new_tokens": 12, "temperature": 0.0, "return_as_token_ids": True, "chat_template": False}
    text = LLM.load(tmp_path / "chameleon").generate("a red dog", **settings)
    assert not reader.tokens.is_image(text).any()


def test_codes_are_numbered_in_the_order_of_tokens_once(tmp_path: Path) -> None:
    source, first, second = (tmp_path / name for name in ("chameleon", "first", "second"))
    hf_model, reader = write_folder(source)
    assert main(["tokenizer", "extend", str(source), str(source), str(first)]) == 0
    assert main(["tokenizer", "extend", str(source), str(first / "image_codes"), str(second)]) == 0
    published, *both = (
        load_file(folder / "model.safetensors")["quantize.embedding.weight"]
        for folder in (tmp_path / "codec", first / "image_codes", second / "image_codes")
    )
    assert all(torch.equal(entries, published[torch.tensor(ORDER)]) for entries in both)
    extended, written = open_code_reader(Tokenizer(second)), load_chameleon(second)
    assert extended is not None and extended.tokens == reader.tokens
    assert extended.fingerprint_parts()[1] == reader.fingerprint_parts()[1]
    assert written.config.vocabulary_map == IDS
    before, after = hf_model.state_dict(), written.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_trained_model_is_a_whole_one(tmp_path: Path) -> None:
    hf_model, _ = write_folder(tmp_path / "chameleon")
    image = {"type": "image", "image": draw_noise(tmp_path / "a.png", 1)}
    write_rows(tmp_path, [build_row(["Which?", image], ["a dog"]), build_row(["a dog"], [image])])
    data = ["--data.sources", str(tmp_path / "rows.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]
    flags = ["--data.num_workers", "0", "--data.val_fraction", "0", "--precision", "32-true", "--train.max_steps", "1"]
    flags += ["--train.global_batch_size", "2", "--train.micro_batch_size", "2", "--eval.max_new_tokens", "null"]
    flags += ["--train.lr_warmup_steps", "0", "--train.max_seq_length", "160", "--loss.modalities", "[image]"]
    words = ["finetune_full", str(tmp_path / "chameleon"), "--data", "Conversations", *data, *flags]
    assert main([*words, "--out_dir", str(tmp_path / "out")]) == 0
    before, after = hf_model.state_dict(), load_chameleon(tmp_path / "out/final").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("model.vqmodel."), name
    assert open_code_reader(Tokenizer(tmp_path / "out/final")) is not None


def test_a_vocabulary_without_all_codes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "chameleon"
    write_chameleon(folder)
    add_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace(name_code(7), "IMGIMGKZ"))
    assert main(["tokenizer", "extend", str(folder), str(folder), str(tmp_path / "model")]) == 1
    assert "the tokenizer does not have the 64 tokens of image_codes" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_images_of_chameleon_are_resized_as_by_its_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder = tmp_path / "chameleon"
    write_chameleon(folder)
    add_tokenizer(folder)
    crop = {"height": SIZE, "width": SIZE}
    processor = transformers.ChameleonImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    processor.save_pretrained(folder)
    reader = open_code_reader(Tokenizer(folder))
    assert reader is not None
    for size in ((45, 70), (90, 33), (20, 31), (32, 32)):
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        expected = processor(images=[Image.fromarray(image.permute(1, 2, 0).numpy())], return_tensors="pt")
        actual = normalize("chameleon", reader.resize(image))
        torch.testing.assert_close(actual, expected["pixel_values"][0], atol=1e-5, rtol=1e-5)
    assert isinstance(reader.codec, VQCodec)
    for color in (reader.codec.shape.mean, reader.codec.shape.std):
        assert color == pytest.approx((1 / (255 * 0.0078),) * 3)
    with pytest.raises(MediumError, match="image that is too narrow"):
        reader.resize(torch.zeros(3, 1, 100_000, dtype=torch.uint8))
    assert main(["verify", str(folder), "--length", "24"]) == 0
    assert "codes: passed: 0 of the 128 codes of 2 images differ" in capsys.readouterr().out
    monkeypatch.setitem(codes.INTERPOLATION_OF_FITS, "short_side", "bilinear")
    assert main(["verify", str(folder), "--length", "24"]) == 1
    assert "codes: FAILED" in capsys.readouterr().out


def test_a_processor_that_resizes_otherwise_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    crop = {"height": SIZE, "width": SIZE}
    processor = transformers.ChameleonImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    processor.save_pretrained(tmp_path / "model")
    path, tokenizer = tmp_path / "model/preprocessor_config.json", Tokenizer(tmp_path / "model")
    values = json.loads(path.read_text())
    assert open_code_reader(tokenizer) is not None
    for change, message in (
        ({"size": {"shortest_edge": 16}}, 'size: .* is not supported by this codec; use {"shortest_edge": 32}'),
        ({"crop_size": {"height": 32, "width": 16}}, "crop_size: .* is not supported by this codec"),
        ({"do_center_crop": False}, "do_center_crop: False is not supported by this codec; use true"),
        ({"resample": 3}, "resample: 3 is not supported by this codec; use 1"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message):
            open_code_reader(tokenizer)


def test_rows_of_chameleon(tmp_path: Path) -> None:
    from PIL import Image

    _, reader = write_folder(tmp_path / "model")
    images = [{"type": "image", "image": draw_noise(tmp_path / f"{seed}.png", seed)} for seed in (1, 2)]
    write_rows(tmp_path, [build_row(["Which?", images[0], " or ", images[1]], ["a dog"])])
    data = Conversations(str(tmp_path / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=tmp_path / "cache")
    data.connect(Tokenizer(tmp_path / "model"), 1, 256)
    data.prepare_data()
    shape = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=256, rank=0, ranks=1, seed=0)
    batch = next(iter(data.train_stream(shape)))
    ids = batch.ids[0].tolist()
    assert len(reader.tokens.find_images(ids)) == 2
    answer = [*data.tokenizer.encode("a dog", bos=False).tolist(), 1]
    assert batch.labels[batch.labels >= 0].tolist() == answer

    crop = {"height": SIZE, "width": SIZE}
    resize = transformers.ChameleonImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "model/tokenizer.json"), sep_token="<sep>"
    )
    processor = transformers.ChameleonProcessor(resize, tokenizer, image_seq_length=SIDE**2)
    given = [Image.open(tmp_path / str(image["image"])) for image in images]
    prompt = processor(text="Which?<image> or <image>", images=given, return_tensors="pt")["input_ids"][0].tolist()
    is_code = (batch.ids >= reader.tokens.first) & (batch.ids < reader.tokens.first + CODES)
    places = batch.ids.masked_fill(is_code, IDS["<image>"])[0].tolist()
    assert places[: len(prompt)] == prompt


def test_images_that_no_decoder_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "model")
    flags = ["generate", str(tmp_path / "model"), "--prompt", "a dog", "--image_out", str(tmp_path / "a.png")]
    assert main(flags) != 0
    assert "have no decoder of images; leave it out" in capsys.readouterr().err
