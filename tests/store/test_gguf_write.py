"""GGUF files that are written: read back, and read by transformers, they are the model with its tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from litgpt.cli import main
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.files import read_json, write_json
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.gguf_tokenizer import build_sentencepiece_bpe, write_tokenizer
from litgpt.store.gguf_write import is_as_written, write_gguf
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.store.save_model import save_model_folder
from tests.store.models import random_model, small, weights
from tests.store.test_gguf_files import SIZES, tiny

IDS = torch.arange(20)[None] * 3 % 64
TEMPLATE = "{% for m in messages %}<|bos|>{{ m['content'] }}<|eos|>{% endfor %}"
ROWS = 320


def write_source(folder: Path, model: GPT) -> Path:
    """A folder with a model and a byte-level BPE that was trained for it."""
    train_tokenizer(iter(["the llama eats 12 apples and the alpaca 345 pears"] * 50), "bpe", 300, folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    save_model_folder(folder / "model", config=model.config, tensors=weights(model), tokenizer_dir=folder / "tokenizer")
    return folder / "model"


def moe() -> GPT:
    """A model whose experts have the size that transformers takes from no key of the file."""
    return random_model(
        small("Qwen3-30B-A3B", **{**SIZES, "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 768})
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "qwen3moe"])
def test_a_file_is_the_model(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = moe() if kind == "qwen3moe" else tiny(kind)
    model = random_model(Config(**{**model.config.to_dict(), "padded_vocab_size": ROWS}))
    source = write_source(tmp_path, model)
    write_gguf(tmp_path / "m.gguf", source, model.config, tokenizer_dir=source)
    loaded = GPT(load_config(tmp_path / "m.gguf")).eval()
    load_model(loaded, tmp_path / "m.gguf")
    assert all(torch.allclose(weights(loaded)[name], tensor, atol=1e-6) for name, tensor in weights(model).items())
    quantization = GgufConfig(dequantize=True)
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=quantization
    )
    with torch.no_grad():
        for block in hf_model.model.layers if kind == "qwen3moe" else ():
            block.mlp.gate.norm_topk_prob = True  # as llama.cpp has it; the file has no such setting
        expected = hf_model.eval()(IDS).logits
        assert (model(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float16", 16), ("q8_0", 8.5)])
def test_matrices_are_written_in_a_type(tmp_path: Path, dtype: str, bits: float) -> None:
    model = random_model(small("Llama-3.2-1B", **{**SIZES, "padded_vocab_size": ROWS, "block_size": 64}))
    source = write_source(tmp_path, model)
    out = tmp_path / "out"
    assert main(["convert_from_litgpt", str(source), str(out), "--format", "gguf", "--dtype", dtype]) == 0
    (path,) = out.glob("*.gguf")
    reader = GGUFReader(path)
    matrix = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    assert matrix.n_bytes * 8 == bits * matrix.n_elements
    assert reader.fields["tokenizer.chat_template"].contents() == TEMPLATE
    config = load_config(path)
    assert config.rope_adjustments == model.config.rope_adjustments
    read = dict(iter_tensors(path, config))
    assert all(
        (read[name].float() - tensor).abs().max() < 0.02 * tensor.abs().max() for name, tensor in weights(model).items()
    )
    assert (out / "Modelfile").read_text() == f'FROM ./{path.name}\nPARAMETER num_ctx 64\nPARAMETER stop "<|eos|>"\n'


def test_its_tokenizer_encodes_as_the_source_does(tmp_path: Path) -> None:
    model = random_model(small("Llama-2-7b-hf", **{**SIZES, "padded_vocab_size": ROWS}))
    source = write_source(tmp_path, model)
    write_gguf(tmp_path / "m.gguf", source, model.config, tokenizer_dir=source)
    (tmp_path / "back").mkdir()
    write_tokenizer(tmp_path / "m.gguf", tmp_path / "back")
    ours, back = Tokenizer(source), Tokenizer(tmp_path / "back")
    for text in ("the llama", "an apple<|eos|>the pears\n\n", "é 你好 the 345"):
        assert ours.encode(text).tolist() == back.encode(text).tolist()
    assert (ours.bos_id, ours.eos_id, ours.use_bos) == (back.bos_id, back.eos_id, back.use_bos)


def test_a_sentencepiece_tokenizer_comes_back(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab", "▁a"]
    content = build_sentencepiece_bpe(tokens, [0.0] * 262 + [-1.0, -2.0, -3.0], add_prefix_space=True)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": number, "content": tokens[number], **special} for number in range(3)]
    model = random_model(small("Llama-2-7b-hf", **{**SIZES, "padded_vocab_size": ROWS}))
    save_model_folder(tmp_path / "model", config=model.config, tensors=weights(model))
    write_json(tmp_path / "model" / "tokenizer.json", content)
    write_json(tmp_path / "model" / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    write_gguf(tmp_path / "m.gguf", tmp_path / "model", model.config, tokenizer_dir=tmp_path / "model")
    (tmp_path / "back").mkdir()
    write_tokenizer(tmp_path / "m.gguf", tmp_path / "back")
    back = read_json(tmp_path / "back" / "tokenizer.json")["model"]
    assert back["merges"] == content["model"]["merges"]
    assert {token: back["vocab"][token] for token in tokens} == content["model"]["vocab"]


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(folder: Path, *flags: str) -> str:
        arguments = ["convert_from_litgpt", str(folder), str(tmp_path / "out"), *flags]
        assert main(arguments) in (1, 2) and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    model = random_model(small("pythia-14m"))
    assert "no architecture of llama, " in refuse(write_source(tmp_path / "neox", model), "--format", "gguf")
    source = write_source(tmp_path, random_model(small("Llama-2-7b-hf", **{**SIZES, "padded_vocab_size": ROWS})))
    assert "dtype: q8_0 is not supported with format: huggingface" in refuse(source, "--dtype", "q8_0")
    assert "max_shard_size: 2.0 has no effect with format: gguf" in refuse(
        source, "--format", "gguf", "--max_shard_size", "2"
    )
    content = read_json(source / "tokenizer.json")
    for changes, words in {
        json.dumps({"pre_tokenizer": {"type": "Whitespace"}}): "splits text in none of the ways gpt-2, ",
        json.dumps({"model": {"type": "Unigram"}}): "no tokenizer.json with a BPE",
    }.items():
        write_json(source / "tokenizer.json", {**content, **json.loads(changes)})
        with pytest.raises(UserError, match=words):
            write_gguf(tmp_path / "m.gguf", source, load_config(source), tokenizer_dir=source)


def test_a_file_that_differs_is_noticed() -> None:
    tensor = torch.randn(2, 64)
    changed = tensor.clone()
    changed[1, 3] += 0.1
    for kind, dtype in {"F32": torch.float32, "BF16": torch.bfloat16, "Q8_0": torch.float32}.items():
        assert is_as_written(tensor.to(dtype), tensor, kind) and not is_as_written(changed.to(dtype), tensor, kind)
