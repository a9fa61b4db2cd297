"""GGUF files: every quantization, llama.cpp's order of rows undone, shape and tokenizer as transformers has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import build_name_table
from litgpt.model.registry import load_family_files
from litgpt.store.convert import convert_folder
from litgpt.store.gguf_files import GGUFFile
from litgpt.store.gguf_tokenizer import write_tokenizer
from litgpt.store.load_model import iter_tensors, load_config, load_model
from tests.store.models import random_model, small, weights

SIZES = {"n_embd": 256, "head_size": 64, "intermediate_size": 256, "padded_vocab_size": 64}  # blocks of 256 numbers
KINDS = {"llama": "Llama-2-7b-hf", "qwen2": "Qwen2.5-0.5B", "qwen3": "Qwen3-0.6B", "gemma3": "Gemma-3-1b-it"}


def pair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head in the order of llama.cpp: the first of each half, the second of each half, ..."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path, model: GPT, kind: str, quantization: str = "F32", **settings: Any) -> None:
    """A GGUF file of a model; matrices quantized, vectors as float32."""
    config, writer = model.config, GGUFWriter(path, kind)
    keys = {
        "block_count": config.n_layer,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_query_groups,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        **({"attention.sliding_window": config.sliding_window_size} if config.sliding_window_size else {}),
    }
    for key, value in keys.items():
        writer.add_uint32(f"{kind}.{key}", value)  # type: ignore[arg-type]
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32(f"{kind}.rope.freq_base", config.rope_base)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(64)])
    for key, value in settings.items():
        writer.add_tensor(key, value)
    data = load_family_files()["gguf"]
    tensors = weights(model)
    for step in build_name_table("gguf", data["tensors"]).map_names(tensors, config):
        tensor = tensors[step.names[0]]
        if kind == "llama" and ".attn_q." in step.hf_name:
            tensor = pair_rows(tensor, config.n_head)
        if kind == "llama" and ".attn_k." in step.hf_name:
            tensor = pair_rows(tensor, config.n_query_groups or 0)
        if kind.startswith("gemma") and step.hf_name.endswith("norm.weight"):
            tensor = tensor + 1
        code = GGMLQuantizationType[quantization if tensor.dim() > 1 else "F32"]
        values = tensor.numpy().astype(np.float32)
        writer.add_tensor(step.hf_name, values if code.name == "F32" else quantize(values, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny(kind: str) -> GPT:
    more: dict[str, Any] = {"intermediate_size": 512}
    if kind == "qwen3":
        more |= {"head_size": 128}  # transformers takes the number from no key of the file
    if kind == "gemma3":
        # transformers divides scores by 16 whatever the size of a head is
        more |= {"n_query_groups": 1, "n_layer": 6, "head_size": 256}
        more |= {"sliding_window_size": 8, "sliding_window_indices": [1] * 5 + [0], "rope_indices": [1] * 5 + [0]}
    return random_model(small(KINDS[kind], **{**SIZES, **more}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_as_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = tiny(kind)
    write_gguf(tmp_path / "m.gguf", model, kind)
    loaded = GPT(load_config(tmp_path)).eval()
    load_model(loaded, tmp_path)
    assert all(torch.allclose(weights(loaded)[name], tensor, atol=1e-6) for name, tensor in weights(model).items())
    hf_model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ids = torch.arange(20)[None] * 3 % 64
    with torch.no_grad():
        expected = hf_model.eval()(ids).logits
        assert (loaded(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_every_quantization_is_read_as_what_it_stands_for(tmp_path: Path, quantization: str) -> None:
    model = tiny("llama")
    write_gguf(tmp_path / "m.gguf", model, "llama", quantization)
    loaded = dict(iter_tensors(tmp_path / "m.gguf", load_config(tmp_path / "m.gguf")))
    code = GGMLQuantizationType[quantization]
    for name, tensor in weights(model).items():
        if tensor.dim() == 1:
            assert torch.equal(loaded[name], tensor)
            continue
        heads = {"q": model.config.n_head, "k": model.config.n_query_groups}.get(name.split(".")[-2])
        stored = tensor if heads is None else pair_rows(tensor, heads)
        read = torch.from_numpy(dequantize(quantize(stored.numpy(), code), code).copy())
        restored = read if heads is None else read.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(loaded[name].float(), restored), name
        kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(quantization, torch.float32)
        assert loaded[name].dtype == kept


@pytest.mark.parametrize("quantization", ["Q4_K", "Q6_K"])
def test_blocks_of_256_are_read_too(tmp_path: Path, quantization: str) -> None:
    """The package `gguf` reads these and does not write them, so the bytes are random; finite scales are put in."""
    code = GGMLQuantizationType[quantization]
    size = {"Q4_K": 144, "Q6_K": 210}[quantization]
    raw = np.random.default_rng(1).integers(0, 256, (64, size), dtype=np.uint8)
    scales = np.full((64, 2), 0.01, dtype=np.float16).view(np.uint8)
    raw[:, :4] = scales if quantization == "Q4_K" else raw[:, :4]
    raw[:, -2:] = scales[:, :2] if quantization == "Q6_K" else raw[:, -2:]
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUFFile(tmp_path / "m.gguf").read("token_embd.weight")
    assert read.shape == (64, 256) and read.isfinite().all() and read.std() > 0
    assert np.array_equal(read.numpy(), dequantize(raw, code).reshape(64, 256))


def test_converted_it_is_a_folder_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    write_gguf(tmp_path / "m.gguf", model, "llama")
    with pytest.raises(UserError, match=r"tokenizer\.json of this model"):
        convert_folder(tmp_path / "m.gguf", None, None)  # it has tokens, but of no kind that is known
    assert not (tmp_path / "m").exists()
    folder = convert_folder(tmp_path, None, None)
    assert folder == tmp_path and (tmp_path / "notes.txt").read_text() == "mine"
    assert Config.from_checkpoint(folder).rope_base == model.config.rope_base
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert (hf_model.eval()(torch.arange(9)[None]).logits - model(torch.arange(9)[None])).abs().max() < 1e-4


def test_the_scaling_of_llama_3_is_found_by_its_divisors(tmp_path: Path) -> None:
    from litgpt.model.rotary import compute_frequencies

    model = random_model(small("Llama-3.2-1B", **{**SIZES, "block_size": 64}))
    plain = type(model.config)(**{**model.config.to_dict(), "rope_adjustments": None})
    position = torch.tensor([1])
    divisors = (compute_frequencies(plain, position)[0] / compute_frequencies(model.config, position)[0]).numpy()
    write_gguf(tmp_path / "m.gguf", model, "llama", **{"rope_freqs.weight": divisors})
    assert load_config(tmp_path).rope_adjustments == model.config.rope_adjustments
    loaded = GPT(load_config(tmp_path))
    load_model(loaded, tmp_path)
    write_gguf(tmp_path / "m.gguf", model, "llama", **{"rope_freqs.weight": divisors * 1.01})
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        load_config(tmp_path)


def test_what_cannot_be_read_has_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = tiny("llama")
    write_gguf(path, model, "llama")
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"GGUF" + b"\xff" * 40, whole[:300], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.gguf") as caught:
            load_model(GPT(model.config), path)
        assert "\n" not in str(caught.value)
    write_gguf(path, model, "mamba")
    with pytest.raises(UserError, match="'mamba' is not one of llama"):
        load_config(path)
    write_gguf(tmp_path / "n.gguf", model, "llama")
    with pytest.raises(UserError, match=r"2 \.gguf files"):
        load_config(tmp_path)


def test_a_byte_level_tokenizer_is_written_as_it_was(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from litgpt.data.tokenizer import Tokenizer as Ours
    from litgpt.data.tokenizer import train_tokenizer

    train_tokenizer(iter(["the llama eats 12 apples and the alpaca 345 pears"] * 50), "bpe", 300, tmp_path / "source")
    content = json.loads((tmp_path / "source" / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    special = [value["content"] for value in content["added_tokens"]]
    tokens = vocabulary + [token for token in special if token not in vocabulary]
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(special[0]))
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "m.gguf", tmp_path / "out")
    created = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    source = Tokenizer.from_file(str(tmp_path / "source" / "tokenizer.json"))
    for text in ("the llama", f"an apple{special[0]}the pears\n\n", "é 你好 the"):
        local = created.encode(text, add_special_tokens=False).ids
        assert created.decode(local, skip_special_tokens=False) == text
        assert local == source.encode(text, add_special_tokens=False).ids
    model = Ours(tmp_path / "out")
    assert model.use_bos and model.encode("the")[0] == tokens.index(special[0])
    assert len(created.encode("12", add_special_tokens=False).ids) == 2, "digits stand alone"
