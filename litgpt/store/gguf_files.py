"""Read GGUF files (llama.cpp): dequantize their weights, and convert their settings to those of a config.json."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import DamagedFileError
from litgpt.model.names import NameTable
from litgpt.model.registry import load_family_files, load_format_table

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file that `folder` is, or the only one in it; None without one.

    Raises:
        UserError: if there are several.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    paths = sorted(folder.glob("*.gguf"))
    if len(paths) > 1:
        raise UserError(f"{folder}: holds {len(paths)} .gguf files; name one, such as {paths[0].name}")
    return paths[0] if paths else None


class GGUFFile:
    """A GGUF file: settings, tensors, tokenizer. Quantized weights are dequantized to float32."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            UserError: if the package `gguf` is missing, or the file is damaged or of an unknown architecture.
        """
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(f"{path}: the package gguf is not installed: pip install 'litgpt[gguf]'") from None
        self.path = path
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise DamagedFileError(f"{path}: not a whole GGUF file ({error})") from None
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self.get_value("general.architecture")
        architectures = load_family_files()["gguf"]["architectures"]
        if architecture not in architectures:
            raise UserError(f"{path}: general.architecture: {architecture!r} is not one of {', '.join(architectures)}")
        self.architecture = str(architecture)
        self.entry: dict[str, Any] = architectures[self.architecture]
        for key, values in self.entry.get("unlike", {}).items():
            if (value := self.get_model_value(key)) in values:
                raise UserError(
                    f"{path}: {self.architecture}.{key}: {value}; the file does not say how llama.cpp scales the "
                    "attention; use the safetensors of this model"
                )

    def get_value(self, key: str) -> Any:
        """The value of a key; None if the file lacks it. Float32 numbers are rounded to their shortest decimal form."""
        if key not in self._fields:
            return None
        value = self._fields[key].contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def get_model_value(self, key: str) -> Any:
        """The value of a key of this architecture; None if the file lacks it."""
        return self.get_value(f"{self.architecture}.{key}")

    @property
    def names(self) -> list[str]:
        """The names of the tensors in the file."""
        return list(self._tensors)

    @property
    def name_table(self) -> NameTable:
        """The table of the file's names and ours."""
        return load_format_table("gguf")

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """The settings in the format of the config.json of the published architecture."""
        settings: Mapping[str, str] = self.entry["settings"]
        values = {hf_key: self.get_model_value(key) for key, hf_key in settings.items()}
        values = {key: value for key, value in values.items() if value is not None}
        lists = [key for key, value in values.items() if isinstance(value, list)]
        if lists:
            raise UserError(f"{self.path}: {lists[0]}: differs between layers, which is not supported")
        values.setdefault("head_dim", values.get("hidden_size", 0) // max(1, values.get("num_attention_heads", 1)))
        if "token_embd.weight" in self._tensors:
            values["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        values |= {hf_key: values["head_dim"] for hf_key in self.entry.get("head_dims", ())}
        return {
            "model_type": self.entry["model_type"],
            **self.entry.get("constants", {}),
            **values,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "rope_scaling": self._rope_scaling(),
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self.get_model_value("rope.scaling.type")
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling()
        if kind in (None, "none"):
            return None
        scaling = {"rope_type": kind, "factor": self.get_model_value("rope.scaling.factor")}
        original = self.get_model_value("rope.scaling.original_context_length")
        return scaling | ({} if original is None else {"original_max_position_embeddings": original})

    def _llama3_scaling(self) -> dict[str, Any]:
        """Llama 3's scaling, recovered from the divisors of the frequencies, because the file has no other settings.

        Raises:
            UserError: if the divisors are not those of a released Llama.
        """
        divisors = self.read("rope_freqs.weight").double()
        base = self.get_model_value("rope.freq_base") or 10000.0
        plain = base ** (-torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
        turns = LLAMA3["original_max_position_embeddings"] * plain / (2 * math.pi)
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        factor = round(float(divisors.max()), 3)
        if not torch.allclose(1 / ((1 - share) / factor + share), divisors, rtol=1e-4):
            raise UserError(
                f"{self.path}: rope_freqs.weight: not the frequency scaling of a released Llama; use its safetensors"
            )
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}

    def read_meta(self, name: str) -> Tensor:
        """The shape of a tensor and the type in which it is read, on the meta device."""
        tensor = self._tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        return torch.empty(shape, dtype=PLAIN.get(tensor.tensor_type.name, torch.float32), device="meta")

    def get_type(self, name: str) -> str:
        """The type of a tensor, such as F32 or Q8_0."""
        return str(self._tensors[name].tensor_type.name)

    def read(self, name: str) -> Tensor:
        """Read a tensor in the layout of the published architecture; raises as `read_stored`."""
        return self._as_published(name, self.read_stored(name))

    def read_stored(self, name: str) -> Tensor:
        """Read a tensor in the layout of the file.

        Raises:
            UserError: if it is quantized in a way that the package `gguf` does not support.
        """
        from gguf import dequantize

        tensor, meta = self._tensors[name], self.read_meta(name)
        if tensor.tensor_type.name in PLAIN:
            raw = torch.from_numpy(np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1).copy())
            return raw.view(meta.dtype).view(meta.shape)
        try:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(meta.shape)
        except (NotImplementedError, ValueError) as error:  # raised by gguf for types that it does not dequantize
            raise UserError(f"{self.path}: {name}: {tensor.tensor_type.name} cannot be read ({error})") from None

    def _as_published(self, name: str, values: Tensor) -> Tensor:
        """Undo llama.cpp's changes to weights: the rows of q and k in pairs, and the offset added to norms."""
        part = name.split(".")[-2]
        if self.entry.get("paired") and part in ("attn_q", "attn_k"):
            heads = self.get_model_value("attention.head_count" + ("_kv" * (part == "attn_k")))
            heads = heads or self.get_model_value("attention.head_count")
            return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return values - 1 if self.entry.get("norm_offset") and part.endswith("norm") else values
