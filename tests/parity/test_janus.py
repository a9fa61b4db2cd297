"""Janus, which reads images by a tower and draws them by a head of its own, against transformers."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from litgpt import LLM
from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.stream.batch import IGNORE
from litgpt.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.image_head import generate_head_codes, open_image_generator
from litgpt.infer.sampling import Sampling
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_family
from litgpt.model.tower_config import TowerShape
from litgpt.recipe.data import BatchShape
from litgpt.store.adapters.peft_lora import list_published_mappings
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from tests.parity.test_engine import list_ids
from tests.parity.test_vision_families import (
    IMAGE,
    TEXT,
    Row,
    build_example,
    build_reference,
    compute_hf_logits,
    compute_logits,
)
from tests.parity.test_vision_generation import TEXTS, Case
from tests.parity.test_vision_training import process
from tests.parity.test_vq_codecs import JANUS
from tests.parity.tower_gradients import compare_gradients
from tests.vision_model import write_color_rows

TOWER: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
    **{"mlp_ratio": 1.5, "projection_dim": 32, "num_image_tokens": 16, "attention_bias": True},
}
CODES = {**JANUS, "projection_dim": 32, "image_token_embed_dim": 32}
MODEL = Row(
    "Janus",
    {**TEXT, "model_type": "llama"},
    TOWER,
    {"image_token_id": IMAGE, "tie_word_embeddings": False, "vq_config": CODES},
    [(16, 16)] * 3,
)
DRAWN_WITH = re.compile(r"model\.(vqmodel|generation_\w+)\.")


def test_whole_models_as_published(tmp_path: Path) -> None:
    source, export, alone = (tmp_path / name for name in ("published", "export", "alone"))
    hf_model = build_reference(MODEL)
    hf_model.save_pretrained(source)
    config = Config.from_checkpoint(source)
    family = find_family(config)
    assert family is not None and family.name == "janus" and config.vision is not None
    modules = {mapping.hf_name for mapping in list_published_mappings(config).values()}
    assert modules == {name for name in hf_model.state_dict() if not DRAWN_WITH.match(name)}
    example = build_example(MODEL, TowerShape.from_values(config.vision))

    model = GPT(config).eval()
    load_model(model, source, warn=lambda line: pytest.fail(line))
    expected, actual = compute_hf_logits(hf_model, example), compute_logits(model, example)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    trained = [(name, each) for name, each in hf_model.named_parameters() if not DRAWN_WITH.match(name)]
    compare_gradients(model, SimpleNamespace(named_parameters=lambda: trained), actual, expected, config)
    other = example._replace(media=replace(example.media, patches_NP=example.media.patches_NP.flip(0)))
    assert (compute_logits(model, other) - actual).abs().max() > 1e-3

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_model_folder(export, config=config, tensors=tensors, tokenizer_dir=source)
    exported, original = load_file(export / "model.safetensors"), load_file(source / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    loaded, report = transformers.JanusForConditionalGeneration.from_pretrained(
        export, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(compute_hf_logits(loaded.eval(), example), expected)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, export))
    assert before["vq_config"] == after["vq_config"] and after["vision_config"]["num_image_tokens"] == 16
    assert Config.from_checkpoint(export) == config
    save_model_folder(alone, config=config, tensors=tensors)
    assert not (alone / "config.json").exists() and Config.from_checkpoint(alone) == config


def test_images_are_those_of_the_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_reference(MODEL).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    transformers.JanusImageProcessor(size=size).save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--length", "24"]) == 0
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"size": {"height": 16, "width": 24}}))
    assert main(["verify", str(tmp_path), "--length", "24"]) == 1
    assert "use the same height and width" in capsys.readouterr().out.partition("images: FAILED")[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_dim": 48}, "vision_config.projection_dim: 48"),
        ({"depth": 3}, "vision_config.depth: 3"),
        ({"use_qk_norm": True}, "vision_config.use_qk_norm: True"),
        ({"mlp_ratio": None}, "mlp_ratio"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"model_type": "janus", "text_config": {**TEXT, "model_type": "llama"}, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({**values, "vision_config": {**TOWER, **change}}))
    with pytest.raises(UserError, match=re.escape(message)):
        Config.from_checkpoint(tmp_path)


NAMES = ["<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<pad>"]
FIRST = 258  # the tokens of bytes are before these
PLACEHOLDER, BEGIN, _, PADDING = range(FIRST, FIRST + len(NAMES))
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image_placeholder>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>:{% endif %}"
)
"""In the form of the published one, which takes contents as lists only."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with its tokenizer and its processor."""
    path = tmp_path_factory.mktemp("janus") / "model"
    backend = train_tokenizer([], "bytes", FIRST, path.parent / "tokenizer").processor
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in NAMES])
    outside = {**MODEL.outside, "image_token_id": PLACEHOLDER}
    model = build_reference(MODEL._replace(text={**MODEL.text, "vocab_size": 288}, outside=outside))
    model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=PADDING)
    model.save_pretrained(path)
    backend.save(str(path / "tokenizer.json"))
    build_processor(path).save_pretrained(path)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS, "pad_token": "<pad>"}))
    return path


def build_processor(path: Path) -> Any:
    """The processor of transformers, with its own system prompt as published."""
    names = {"image_token": NAMES[0], "boi_token": NAMES[1], "eoi_token": NAMES[2]}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token=BOS, eos_token=EOS, extra_special_tokens=names
    )
    images = transformers.JanusImageProcessor(size={"height": 16, "width": 16})
    return transformers.JanusProcessor(
        images, tokenizer, chat_template=TEMPLATE, num_image_tokens=16, use_default_system_prompt=True
    )


def load_reference(path: Path) -> Any:
    """The model of transformers in a folder, which must have all its tensors and no others."""
    model, report = transformers.JanusForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


def test_rows_are_those_of_the_processor(folder: Path, tmp_path: Path) -> None:
    path, llm, reference = write_color_rows(tmp_path), LLM.load(folder), load_reference(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    data = Conversations(str(path), val_fraction=0.0, num_workers=0, shuffle=False, cache_dir=tmp_path / "cache")
    data.connect(Tokenizer(folder), 1, 512)
    data.prepare_data()
    shape = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=512, rank=0, ranks=1, seed=0)
    processor = build_processor(folder)
    for row, batch in zip(rows, data.train_stream(shape), strict=False):
        inputs = process(processor, row, tmp_path)
        assert batch.ids.tolist() == [[0, *inputs["input_ids"][0].tolist()]]  # the tokenizer adds the first token
        assert batch.labels[batch.labels != IGNORE].tolist()[-1] == 1
        images = {} if batch.media is None else {"pixel_values": inputs["pixel_values"]}
        with torch.no_grad():
            expected, actual = reference(batch.ids, **images).logits, llm.model(batch.ids, media=batch.media)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_texts_after_images_equal_those_of_transformers(tmp_path: Path) -> None:
    case = Case(MODEL, tmp_path)
    expected = [case.generate(text) for text in TEXTS[2:4]]
    assert list_ids(Engine(case.model).run([case.build_request(text) for text in TEXTS[2:4]])) == expected


@pytest.mark.parametrize("guidance", [5.0, 1.5])
def test_drawn_codes_equal_those_of_transformers(guidance: float, folder: Path) -> None:
    llm, reference, processor = LLM.load(folder), load_reference(folder), build_processor(folder)
    generator = open_image_generator(llm.model, llm.tokenizer)
    assert generator is not None
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red dog"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, generation_mode="image", return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    reference.generation_config.generation_kwargs = {"boi_token_id": BEGIN}  # which its files have in older versions
    settings = {"generation_mode": "image", "guidance_scale": guidance, "do_sample": False}
    expected = reference.generate(**inputs, **settings)
    encoder = replace(llm.prompt_encoder(), variables={"generation_mode": "image"})
    prompt = generator.build_prompt(encoder.encode("a red dog", None, None).ids, guidance)
    assert prompt.ids == inputs["input_ids"][0].tolist() and prompt.ids[-1] == BEGIN
    codes = generate_head_codes(llm.model, generator, prompt, sampling=Sampling(0), seed=None)
    assert codes == expected[0].tolist() and len(set(codes)) > 2

    pixels = processor.postprocess(list(reference.decode_image_tokens(expected).float()), return_tensors="pt")
    difference = generator.codec.decode(expected)[0].int() - pixels["pixel_values"][0].int()
    assert difference.abs().max() <= 1  # transformers cuts what is rounded here


def test_images_are_written_by_generate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    words = ["generate", str(folder), "--prompt", "a red dog", "--image_out", str(tmp_path / "a.png")]
    assert main([*words, "--guidance", "5", "--temperature", "0"]) == 0
    assert Image.open(tmp_path / "a.png").size == (16, 16)
    assert main([*words, "--image", str(tmp_path / "a.png")]) == 1
    assert "image: is not supported with image_out by a model that draws by a head" in capsys.readouterr().err
    partial = tmp_path / "partial"
    partial.mkdir()
    for path in folder.iterdir():
        (partial / path.name).symlink_to(path)
    values = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"hidden_act": "mish"}, "vq_config.hidden_act: 'mish' is not supported"),
        ({"hidden_act": ["gelu"]}, "vq_config.hidden_act: ['gelu'] is not supported"),
        ({"num_hidden_layers": 3}, "model.generation_aligner.hidden_layers.1.weight is missing; config.json says"),
        ({"num_hidden_layers": 10**9}, "is missing; config.json says [32, 32]"),
    ):
        (partial / "config.json").unlink()
        (partial / "config.json").write_text(json.dumps({**values, "vq_config": {**values["vq_config"], **change}}))
        assert main([words[0], str(partial), *words[2:]]) == 1 and message in capsys.readouterr().err


def test_parts_that_do_not_fit_each_other(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (tmp_path / path.name).symlink_to(path)
    values, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    codebook, table = "model.vqmodel.quantize.embedding.weight", "model.generation_embeddings.weight"
    less = {**values, "vq_config": {**values["vq_config"], "num_embeddings": 32}}
    for config, changed, message in (
        (less, {codebook: tensors[codebook][:32].clone()}, "64 codes are drawn, and 32 are decoded"),
        (values, {table: tensors[table].flatten()}, f"{table} has the shape [512], not one of codes and width"),
        ({**values, "vq_config": 3}, {}, "vq_config: 3 is not supported; use a mapping of its settings"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({**tensors, **changed}, tmp_path / "model.safetensors", {"format": "pt"})
        words = ["generate", str(tmp_path), "--prompt", "a dog", "--image_out", str(tmp_path / "a.png")]
        assert main(words) == 1 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model_draws_as_before(folder: Path, tmp_path: Path) -> None:
    path = write_color_rows(tmp_path)
    data = ["--data", "Conversations", "--data.sources", str(path), "--data.cache_dir", str(tmp_path / "cache")]
    flags = ["--data.num_workers", "0", "--data.val_fraction", "0", "--precision", "32-true", "--train.max_steps", "1"]
    flags += ["--train.global_batch_size", "2", "--train.micro_batch_size", "2", "--eval.max_new_tokens", "null"]
    flags += ["--train.lr_warmup_steps", "0", "--freeze.vision", "false", "--freeze.aligner", "false"]
    assert main(["finetune_full", str(folder), *data, *flags, "--out_dir", str(tmp_path / "out")]) == 0
    before, after = load_reference(folder).state_dict(), load_reference(tmp_path / "out/final").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == bool(DRAWN_WITH.match(name)), name
    words = ["generate", str(tmp_path / "out/final"), "--prompt", "a dog", "--image_out", str(tmp_path / "a.png")]
    assert main(words) == 0
