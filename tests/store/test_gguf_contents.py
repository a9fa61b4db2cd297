"""What is in a GGUF file, as the package `gguf` names and dequantizes it, is the published model and its tokenizer."""

import re
from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from litgpt.cli import main
from litgpt.files import read_json, write_json
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from tests.store.models import random_model, small
from tests.store.test_gguf_files import SIZES, tiny
from tests.store.test_gguf_write import ROWS, TEMPLATE, moe, write_source

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "q8_0": None}
Q8_0_ERROR = 0.5 / 127 + 2**-11
"""The largest error of a number in Q8_0, relative to the largest of its block of 32: half a step, a rounded scale."""


def name_as_llama_cpp(published: dict[str, Tensor], kind: str, layers: int) -> dict[str, Tensor]:
    """Published tensors under the names that the package gives them; experts stacked, and norms of Gemma as factors."""
    table = gguf.get_tensor_name_map(ARCHITECTURES[kind], layers)
    named, experts = {}, defaultdict(list)
    for name, tensor in published.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name):
            experts[match[1] + match[3]].append((int(match[2]), tensor))
        else:
            named[name] = tensor + 1 if kind == "gemma3" and name.endswith("norm.weight") else tensor
    named |= {name: torch.stack([t for _, t in sorted(group, key=lambda x: x[0])]) for name, group in experts.items()}
    renamed = {table.get_name(name, try_suffixes=(".weight", ".bias")): tensor for name, tensor in named.items()}
    assert None not in renamed and len(renamed) == len(named)
    return {str(name): tensor for name, tensor in renamed.items()}


def interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order: rows i and i + S / 2 of a head, which rotate together, are neighbours."""
    rows = torch.arange(len(weight)).reshape(heads, 2, -1)
    return weight[rows.mT.flatten()]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*(("llama", dtype) for dtype in TYPES), *((kind, "q8_0") for kind in ("qwen2", "qwen3", "gemma3", "qwen3moe"))],
)
def test_every_tensor_is_the_published_one(tmp_path: Path, kind: str, dtype: str) -> None:
    model = moe() if kind == "qwen3moe" else tiny(kind)
    config = Config(**{**model.config.to_dict(), "padded_vocab_size": ROWS})
    source = write_source(tmp_path, random_model(config))
    flags = ["--format", "gguf", "--dtype", dtype]
    assert main(["convert_from_litgpt", str(source), str(tmp_path / "out"), *flags]) == 0
    (path,) = (tmp_path / "out").glob("*.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == kind
    expected = name_as_llama_cpp(load_file(source / "model.safetensors"), kind, config.n_layer)
    written = {tensor.name: tensor for tensor in reader.tensors}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        heads = {"attn_q": config.n_head, "attn_k": config.n_query_groups}.get(name.split(".")[-2])
        tensor = interleave_halves(tensor, heads) if heads and kind == "llama" else tensor
        actual = torch.from_numpy(gguf.dequantize(written[name].data, written[name].tensor_type).astype(np.float32))
        assert actual.shape == tensor.shape and written[name].shape.tolist() == list(tensor.shape)[::-1]
        rounded = torch.float32 if tensor.dim() == 1 or "ffn_gate_inp" in name else TYPES[dtype]
        if rounded is not None:
            assert torch.equal(actual, tensor.to(rounded).float()), name
            continue
        blocks, errors = (x.unflatten(-1, (-1, 32)).abs() for x in (tensor, actual - tensor))
        assert bool((errors <= Q8_0_ERROR * blocks.amax(-1, keepdim=True)).all()), name


def test_tokens_template_and_modelfile_are_those_of_the_folder(tmp_path: Path) -> None:
    model: GPT = random_model(small("Llama-2-7b-hf", **{**SIZES, "padded_vocab_size": ROWS}))
    source = write_source(tmp_path, model)
    template = TEMPLATE + '{# "quoted" \\ #}<|user|>'
    (source / "chat_template.jinja").write_text(template)
    content = read_json(source / "tokenizer.json")
    numbers = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    (end, end_id) = next((text, number) for text, number in numbers.items() if text == "<|eos|>")
    quoted = 'say "end" \\'
    content["added_tokens"].append({**content["added_tokens"][0], "id": max(numbers.values()) + 1, "content": quoted})
    write_json(source / "tokenizer.json", content)
    write_json(source / "generation_config.json", {"eos_token_id": [end_id, max(numbers.values()) + 1]})
    assert main(["convert_from_litgpt", str(source), str(tmp_path / "out"), "--format", "gguf"]) == 0
    (path,) = (tmp_path / "out").glob("*.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == ROWS and all(tokens[number] == text for text, number in numbers.items())
    kinds = gguf.TokenType
    assert {number: kinds(kind) for number, kind in enumerate(fields["tokenizer.ggml.token_type"])} == {
        number: kinds.CONTROL
        if any(token["id"] == number for token in content["added_tokens"])
        else kinds.NORMAL
        if number in numbers.values()
        else kinds.UNUSED
        for number in range(ROWS)
    }
    assert [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]] == content["model"]["merges"]
    assert fields["tokenizer.ggml.eos_token_id"] == end_id and tokens[end_id] == end
    assert fields["tokenizer.chat_template"] == template
    lines = [line.partition(" ") for line in (tmp_path / "out" / "Modelfile").read_text().splitlines()]
    assert [value for key, _, value in lines if key == "FROM"] == [f"./{path.name}"]
    assert ("PARAMETER", " ", f"num_ctx {model.config.block_size}") in lines
    stops = [value.removeprefix("stop ") for _, _, value in lines if value.startswith("stop ")]
    assert [unquote(value) for value in stops] == [end, quoted]


def unquote(value: str) -> str:
    """A value of a Modelfile, as Ollama reads it (`parser/parser.go`): without three quotes, or one, on each side."""
    quotes = '"""' if value.startswith('"""') else '"'
    assert value.startswith(quotes) and value.endswith(quotes)
    return value[len(quotes) : -len(quotes)]
