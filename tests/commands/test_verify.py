"""litgpt verify: it passes what is right, and fails on every way in which our reading of a folder could be wrong."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from litgpt.cli import main
from litgpt.commands import verify
from litgpt.data.tokenizer import train_tokenizer
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import NameRule
from litgpt.store import load_model
from litgpt.store.save_model import save_model_folder
from tests.store.models import random_model, small, weights

SQUARE = {"n_query_groups": 4, "intermediate_size": 32, "padded_vocab_size": 300}  # so that k, v and out are square
LINES = ("tensors", "round trip", "settings", "logits", "tokenizer")


def folder_of(place: Path, config: Config, tokenizer: Path | None = None) -> Path:
    """A model folder as transformers writes it: no model_config.yaml."""
    save_model_folder(place, config=config, tensors=weights(random_model(config)), tokenizer_dir=tokenizer)
    (place / "model_config.yaml").unlink()
    return place


def outcome(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, str]]:
    """The exit code of a verification, and what it said of each check."""
    capsys.readouterr()
    code = main(["verify", str(folder), "--length", "24", *more])
    said = capsys.readouterr().out.splitlines()
    return code, {line.split(": ")[0]: line.split(": ")[1] for line in said if line.split(": ")[0] in LINES}


def mutate(
    monkeypatch: pytest.MonkeyPatch, family: str, change: Callable[[NameRule], NameRule], **entries: Any
) -> None:
    """Read a family's folders by a table with changed rules."""
    before = registry.load_families()
    rules = tuple(change(rule) for rule in before[family].tensors.rules)
    modified = replace(before[family], tensors=replace(before[family].tensors, rules=rules, **entries))
    monkeypatch.setattr(registry, "load_families", lambda: {**before, family: modified})


def test_a_right_folder_passes_and_the_report_accounts_for_every_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(iter(["the llama eats, and then it sleeps 12 hours"] * 50), "bpe", 290, tmp_path / "tokenizer")
    folder = folder_of(tmp_path / "m", small("Llama-3.2-1B", padded_vocab_size=300), tmp_path / "tokenizer")
    code, said = outcome(folder, capsys, "--report", str(tmp_path / "report.json"))
    assert code == 0 and said == dict.fromkeys(LINES, "passed")
    report = json.loads((tmp_path / "report.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert report["passed"] and list(checks) == list(LINES) and report["settings"]["strings"] == 200
    assert checks["tensors"]["figures"]["read"].keys() == load_file(folder / "model.safetensors").keys()
    lengths = [place["lengths"] for place in checks["logits"]["figures"]["places"]]
    assert lengths == [[24, 21, 18]] * 2, "rows are padded, at the first and the last positions"
    assert checks["logits"]["figures"]["share"] < 1e-5


def swap_q_and_k(rule: NameRule) -> NameRule:
    names = {"blocks.<i>.attention.q": "blocks.<i>.attention.k", "blocks.<i>.attention.k": "blocks.<i>.attention.q"}
    return replace(rule, names=tuple(names.get(name, name) for name in rule.names))


def transpose_out(rule: NameRule) -> NameRule:
    return replace(rule, transposed=True) if rule.names == ("blocks.<i>.attention.out",) else rule


@pytest.mark.parametrize("change", [swap_q_and_k, transpose_out])
def test_wrong_rules_are_found(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[NameRule], NameRule],
) -> None:
    folder = folder_of(tmp_path / "m", small("Llama-2-7b-hf", **SQUARE))
    assert outcome(folder, capsys)[0] == 0
    mutate(monkeypatch, "llama", change)
    code, said = outcome(folder, capsys)
    assert code == 1 and said["logits"] == "FAILED" and said["tensors"] == "passed", said


@pytest.mark.parametrize(
    "change",
    [
        {"rope_adjustments": None},
        {"norm_eps": 1e-2},
        {"rope_base": 10_000},
        {"norm_class_name": "LayerNorm", "bias": False},
        {"mlp_class_name": "GemmaMLP"},
    ],
    ids=str,
)
def test_a_shape_read_otherwise_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any) -> None:
    config = small("Llama-3.2-1B", **SQUARE, block_size=4096)
    adjustments = {**config.rope_adjustments, "original_max_seq_len": 16}  # type: ignore[dict-item]
    config = Config(**{**config.to_dict(), "rope_adjustments": adjustments})
    folder = folder_of(tmp_path / "m", config)
    assert outcome(folder, capsys)[0] == 0
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict() | change))
    code, said = outcome(folder, capsys)
    assert code == 1 and said["logits"] == "FAILED", said


def test_a_dropped_bias_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("Qwen2.5-0.5B", **SQUARE)
    folder = folder_of(tmp_path / "m", config)
    assert outcome(folder, capsys)[0] == 0
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict() | {"attn_bias": False}))
    code, said = outcome(folder, capsys)
    assert code == 1 and said["tensors"] == "FAILED", said
    mutate(monkeypatch, "qwen2", lambda rule: rule, ignored=(r".*\.bias",))  # left out without a word
    code, said = outcome(folder, capsys)
    assert code == 1 and said["tensors"] == "passed" and said["logits"] == "FAILED", said


def test_a_shifted_router_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "vocab_size": 90}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    hf_model = Glm4MoeForCausalLM(
        Glm4MoeConfig(**sizes, **experts, first_k_dense_replace=1, max_position_embeddings=64)
    )
    for name, tensor in [*hf_model.named_parameters(), *hf_model.named_buffers()]:
        if tensor.is_floating_point() and "inv_freq" not in name:
            tensor.data.normal_(std=0.2)
    hf_model.save_pretrained(tmp_path / "m")
    code, said = outcome(tmp_path / "m", capsys)
    assert code == 0, said
    load = load_model.load_model

    def shifted(model: GPT, folder: Path) -> None:
        load(model, folder)
        with torch.no_grad():
            model.get_parameter("blocks.1.mlp.router.correction")[3] += 1.0

    monkeypatch.setattr(verify, "load_model", shifted)
    code, said = outcome(tmp_path / "m", capsys)
    assert code == 1 and said["logits"] == "FAILED", said


def test_what_does_not_come_back_to_the_bit_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litgpt.model.names import TensorMapping

    folder = folder_of(tmp_path / "m", small("pythia-14m"))
    join_parts = TensorMapping.join_parts

    def rounded(self: TensorMapping, tensors: Any, config: Config) -> torch.Tensor:
        joined = join_parts(self, tensors, config)
        return joined.bfloat16().float() if "layers.1.attention.dense.weight" in self.hf_name else joined

    monkeypatch.setattr(TensorMapping, "join_parts", rounded)
    code, said = outcome(folder, capsys)
    assert code == 1 and said["round trip"] == "FAILED" and said["logits"] == "passed", said


def test_a_tensor_without_a_rule_or_a_place_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "m", small("Llama-2-7b-hf"))
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.layers.0.extra.weight": torch.ones(2)}, folder / "model.safetensors")
    code, said = outcome(folder, capsys)
    assert code == 1 and said["tensors"] == "FAILED" == said["round trip"], said


def test_a_tokenizer_read_otherwise_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litgpt.data.tokenizer import Tokenizer

    train_tokenizer(iter(["the llama eats, and then it sleeps 12 hours"] * 50), "bpe", 290, tmp_path / "tokenizer")
    folder = folder_of(tmp_path / "m", small("Llama-2-7b-hf", padded_vocab_size=300), tmp_path / "tokenizer")
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **more: encode(self, text.replace("½", ""), **more))
    code, said = outcome(folder, capsys)
    assert code == 1 and said["tokenizer"] == "FAILED" and said["logits"] == "passed", said


def test_without_transformers_one_line_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "m", small("Llama-2-7b-hf"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", str(folder)]) == 1
    assert "pip install 'litgpt[verify]'" in capsys.readouterr().err


def test_the_texts_are_many_and_the_same_each_time() -> None:
    texts = verify.draw_texts(200, 42)
    assert texts == verify.draw_texts(200, 42) != verify.draw_texts(200, 43) and len(set(texts)) > 190
    assert any("🦙" in text for text in texts) and any("\r\n" in text for text in texts)
