"""Write a model as a GGUF file (llama.cpp) with its tokenizer, and read it back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.model.config import Config
from litgpt.model.registry import (
    Family,
    is_equivalent,
    load_families,
    load_family_files,
    load_format_table,
    normalize_config,
)
from litgpt.model.rotary import compute_frequencies, compute_plain_frequencies
from litgpt.store.gguf_files import GGUFFile
from litgpt.store.gguf_tokenizer import collect_tokenizer_fields
from litgpt.store.load_model import iter_tensors, load_saved_config, read_dtypes
from litgpt.store.published_tensor import list_parameters
from litgpt.store.save_model import join_tensors

MATRIX_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
Q8_0_BLOCK = 32
"""The numbers of a block of Q8_0: 8-bit integers with one float16 scale (llama.cpp, `block_q8_0`)."""
Q8_0_ERROR = 0.5 / 127 + 2**-11
"""The largest error of a number in Q8_0, relative to the largest of its block: half a step, and a rounded scale."""


@dataclass(frozen=True)
class GGUFArchitecture:
    """An architecture of llama.cpp, the published architecture that it is, and the table's entry for both."""

    name: str
    family: Family
    entry: Mapping[str, Any]


def find_architecture(config: Config) -> GGUFArchitecture:
    """Find an architecture of llama.cpp that computes what a model of this shape does.

    Raises:
        UserError: if there is none.
    """
    families = {family.model_type: family for family in load_families().values()}
    architectures: Mapping[str, Any] = load_family_files()["gguf"]["architectures"]
    for name, entry in architectures.items():
        family = families[entry["model_type"]]
        if config.output == "score" or not family.can_express(config):
            continue
        values = family.config_json(config)
        if not any(values[entry["settings"][key]] in unlike for key, unlike in entry.get("unlike", {}).items()):
            return GGUFArchitecture(name, family, entry)
    raise UserError(
        f"format: gguf: no architecture of {', '.join(architectures)} computes what {config.name} does; "
        "use format: huggingface"
    )


def write_gguf(
    path: Path,
    source: Path,
    config: Config,
    *,
    tokenizer_dir: Path,
    dtype: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a GGUF file, a tensor at a time, and compare what is read back with the source.

    Args:
        source: the folder of the model.
        tokenizer_dir: the folder of its tokenizer.
        dtype: of the matrices, a key of `MATRIX_TYPES`; None for that of the source. Vectors and routers are float32,
            as are matrices whose rows q8_0 cannot divide into blocks.

    Raises:
        UserError: if the package `gguf` is missing, llama.cpp has no such architecture or tokenizer, or what is read
            back differs.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGUFWriter
    except ImportError:
        raise UserError("format: gguf: the package gguf is not installed: pip install 'litgpt[gguf]'") from None
    architecture = find_architecture(config)
    matrix_type = MATRIX_TYPES[dtype or find_dtype(source, config)]
    writer = GGUFWriter(path, architecture.name)
    assert config.padded_vocab_size is not None
    fields = collect_model_fields(architecture, config)
    fields |= collect_tokenizer_fields(tokenizer_dir, config.padded_vocab_size)
    if chat_template:
        fields["tokenizer.chat_template"] = chat_template
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, tensor in iter_gguf_tensors(architecture, source, config):
        code = choose_tensor_type(name, tensor, matrix_type)
        block_size, block_bytes = GGML_QUANT_SIZES[code]
        size = tensor.numel() // block_size * block_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in iter_gguf_tensors(architecture, source, config):
        writer.write_tensor_data(encode(tensor, choose_tensor_type(name, tensor, matrix_type)))
    writer.close()
    check_gguf(path, architecture, source, config)


def find_dtype(source: Path, config: Config) -> str:
    """The type of the matrices of a model; float32 if they have several."""
    dtypes = {str(dtype).removeprefix("torch.") for dtype in read_dtypes(source, config).values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def choose_tensor_type(name: str, tensor: Tensor, matrix_type: str) -> Any:
    """The type of a tensor in the file (`gguf.GGMLQuantizationType`)."""
    from gguf import GGMLQuantizationType

    is_plain = tensor.dim() == 1 or "ffn_gate_inp" in name or (matrix_type == "Q8_0" and tensor.shape[-1] % Q8_0_BLOCK)
    return GGMLQuantizationType["F32" if is_plain else matrix_type]


def encode(tensor: Tensor, code: Any) -> np.ndarray[Any, Any]:
    """The values of a tensor in a type of GGUF."""
    from gguf import quantize

    return quantize(np.ascontiguousarray(tensor.float().numpy()), code)


def add_field(writer: Any, key: str, value: Any) -> None:
    """Add a field with the type of its value: text, truth value, 32-bit number, or list."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def collect_model_fields(architecture: GGUFArchitecture, config: Config) -> dict[str, Any]:
    """The settings of a model under llama.cpp's keys."""
    values = architecture.family.config_json(config)
    named = {key: values.get(hf_key) for key, hf_key in architecture.entry["settings"].items()}
    named |= {"attention.value_length": config.head_size, "vocab_size": config.padded_vocab_size}
    scaling = values.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        named |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
        named["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings")
    fields = {f"{architecture.name}.{key}": value for key, value in named.items() if value is not None}
    return {"general.name": config.name, "general.quantization_version": 2, **fields}


def iter_gguf_tensors(architecture: GGUFArchitecture, source: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model under llama.cpp's names and in its layout."""
    parameters = list_parameters(config)
    mappings = load_format_table("gguf").map_names(parameters, config)
    for name, tensor in join_tensors(mappings, iter_tensors(source, config), parameters, config):
        yield name, to_gguf_layout(architecture.entry, name, tensor, config)
    if config.rope_kind == "llama3":
        yield "rope_freqs.weight", compute_llama3_divisors(config)


def to_gguf_layout(entry: Mapping[str, Any], name: str, tensor: Tensor, config: Config) -> Tensor:
    """Apply llama.cpp's changes to a weight: the rows of q and k in pairs, and the offset added to norms."""
    part = name.split(".")[-2]
    if entry.get("paired") and part in ("attn_q", "attn_k"):
        heads = config.n_head if part == "attn_q" else config.n_query_groups
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return tensor + 1 if entry.get("norm_offset") and part.endswith("norm") else tensor


def compute_llama3_divisors(config: Config) -> Tensor:
    """The factors that Llama 3's scaling divides rotary frequencies by, (S / 2,)."""
    assert config.rope_adjustments is not None
    position = torch.zeros(1)
    plain = compute_plain_frequencies(config, config.rope_base, position.device)
    return plain / compute_frequencies(config, position)[0]


def check_gguf(path: Path, architecture: GGUFArchitecture, source: Path, config: Config) -> None:
    """Read a file back and compare settings and tensors with the source.

    Raises:
        UserError: naming a setting or tensor that differs.
    """
    unused = architecture.family.unused
    expected, actual = (normalize_config(shape, unused) for shape in (config, load_saved_config(path)))
    differing = [key for key in expected if not is_equivalent(actual[key], expected[key])]
    if differing:
        raise UserError(
            f"format: gguf: {differing[0]}: {expected[differing[0]]!r} of {config.name} has no place in a GGUF file; "
            "use format: huggingface"
        )
    written = GGUFFile(path)
    for name, tensor in iter_gguf_tensors(architecture, source, config):
        if not is_as_written(written.read_stored(name), tensor, written.get_type(name)):
            raise UserError(f"{path}: {name}: read back, it differs from what was written; check the disk")


def is_as_written(stored: Tensor, tensor: Tensor, type_name: str) -> bool:
    """Whether what a file holds is a tensor, rounded to the type of the file."""
    if type_name != "Q8_0":
        return torch.equal(stored, tensor.to(stored.dtype))
    blocks, differences = (x.unflatten(-1, (-1, Q8_0_BLOCK)) for x in (tensor.float(), stored - tensor.float()))
    return bool((differences.abs() <= blocks.abs().amax(-1, keepdim=True) * Q8_0_ERROR).all())


def write_modelfile(path: Path, gguf_name: str, stops: Iterable[str], context: int) -> None:
    """Write a Modelfile, with which Ollama makes a model of a GGUF file in the same folder; it has the chat template.

    Args:
        stops: texts that end an answer.
        context: the model's context length in tokens.
    """
    quotes = {stop: '"""' if '"' in stop else '"' for stop in stops}  # a Modelfile has no escapes
    parameters = [f"PARAMETER stop {quote}{stop}{quote}" for stop, quote in quotes.items()]
    lines = [f"FROM ./{gguf_name}", f"PARAMETER num_ctx {context}", *parameters]
    write_text(path, "\n".join(lines) + "\n")
