"""`litgpt merge_lora`: what comes out computes what base and adapter do, appears whole, and replaces nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import quantization
from litgpt.adapt.layers import disable_adapters
from litgpt.cli import main
from litgpt.commands import merge_lora
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.load import find_format_folder, find_tokenizer_folder, open_model
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import BOFT, IA3, AdapterV2, Bone, FourierFT, LoRA, ReFT, Tuner, VeRA
from litgpt.store import hub
from litgpt.store.save_model import save_model_folder
from tests.adapt.models import IDS, build_adapted, copy_base, perturb, save_adapter
from tests.data.templates import write_tokenizer
from tests.store.models import random_model, small

CPU = torch.device("cpu")
FUSED = {"name": "Phi-3-mini-4k-instruct", "sliding_window_size": None}
EXPERTS = {"name": "Mixtral-8x7B-v0.1", "n_expert": 4, "sliding_window_size": None}
KINDS: dict[str, tuple[Tuner, dict[str, Any]]] = {
    "LoRA": (LoRA(), {}),
    "rsLoRA and DoRA": (LoRA(rslora=True, dora=True), {}),
    "PiSSA": (LoRA(init="pissa", r=4), {}),
    "biases": (LoRA(bias="all"), {"name": "pythia-14m"}),
    "fused layers": (LoRA(target_modules=["q", "v", "up"]), FUSED),
    "tied embedding": (LoRA(target_modules=["embedding", "q"]), {"tie_embeddings": True}),
    "saved modules": (LoRA(modules_to_save=["norm", "head", "norm_1"]), {"tie_embeddings": False}),
    "experts and routers": (LoRA(target_modules=["all-linear", "all-router"]), EXPERTS),
    "stacked experts": (LoRA(), {"name": "gpt-oss-20b", "n_expert": 4}),
    "VeRA": (VeRA(r=8), {}),
    "IA3": (IA3(), {}),
    "BOFT": (BOFT(), {}),
    "FourierFT": (FourierFT(n_frequency=50), {}),
    "Bone": (Bone(r=5, target_modules=["q", "down"]), {}),
}


def write(folder: Path, settings: Tuner, dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    """A base and an adapter that is not at its first values, on disk as `base` and `adapter`."""
    model = build_adapted(settings, **changes).float()
    perturb(model)
    base = copy_base(model)
    save_model_folder(folder / "base", config=model.config, tensors=base, dtype=dtype)
    save_adapter(folder, model, settings)
    return model.eval()


def merge(folder: Path, *flags: str) -> Path:
    assert main(["merge_lora", str(folder / "adapter"), "--output_dir", str(folder / "merged"), *flags]) == 0
    return folder / "merged"


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return open_model(folder, device=CPU, dtype=torch.float32)(IDS)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_computes_what_base_and_adapter_do(kind: str, tmp_path: Path) -> None:
    settings, changes = KINDS[kind]
    model = write(tmp_path, settings, **changes)
    wanted = model(IDS)
    with disable_adapters(model):
        assert (model(IDS) - wanted).abs().max() > 2e-3 * wanted.abs().max()
    assert (logits(tmp_path / "adapter") - wanted).abs().max() < 1e-5 * wanted.abs().max()
    merged = merge(tmp_path)
    assert (logits(merged) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert (theirs(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_base_whose_configuration_was_changed_for_the_training(tmp_path: Path) -> None:
    settings = LoRA(target_modules=["q"])
    model = write(tmp_path, settings)
    as_published = logits(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    save_adapter(tmp_path, model, settings, model_config={"rope_base": 50})
    merged = merge(tmp_path)
    assert (logits(tmp_path / "adapter") - as_published).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged), logits(tmp_path / "adapter"), atol=1e-5, rtol=0)
    assert json.loads((merged / "config.json").read_text())["rope_theta"] == 50


def test_it_is_summed_in_float32_and_cast_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LoRA(target_modules=["q"]), torch.bfloat16)
    base = load_file(tmp_path / "base" / "model.safetensors")
    pair = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = base[name].float() + 4 * pair[f"{start}_B.weight"] @ pair[f"{start}_A.weight"]
    got = load_file(merge(tmp_path) / "model.safetensors")
    assert torch.equal(got[name], exact.bfloat16())
    assert all(torch.equal(got[other], base[other]) for other in base if "q_proj" not in other)
    said = capsys.readouterr().out
    assert 5e-6 < float(said.split("logit gap: ")[1].split()[0]) < 1e-1  # what bfloat16 rounds off
    for number, (flags, wanted) in enumerate(
        [(["--precision", "32-true"], exact), (["--rows", "0"], exact.bfloat16())]
    ):
        output = str(tmp_path / str(number))
        assert main(["merge_lora", str(tmp_path / "adapter"), "--output_dir", output, *flags]) == 0
        torch.testing.assert_close(load_file(Path(output) / "model.safetensors")[name], wanted, atol=0, rtol=1e-6)


@torch.no_grad()
def test_into_a_packed_base_as_training_saw_it_or_into_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LoRA(dropout=0.0)
    model = random_model(small("Qwen2.5-0.5B"))
    save_model_folder(tmp_path / "base", config=model.config, tensors=copy_base(model))
    packed = GPT(model.config)
    quantization.quantize(packed, "bnb.int8-training")
    adapt.attach(packed, settings)
    quantization.load_quantized(packed, list(model.named_parameters()))
    adapt.initialize_adapter(packed, settings, 0)
    perturb(packed)
    save_adapter(tmp_path, packed, settings, dtype="float32", quantize="bnb.int8-training")
    wanted = packed.eval()(IDS)
    assert torch.equal(logits(tmp_path / "adapter"), wanted)
    assert (logits(merge(tmp_path)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    said = capsys.readouterr().out
    assert float(said.split("logit gap: ")[1].split()[0]) < 1e-5 and "error of quantization" not in said
    original = tmp_path / "original"
    flags = ["--quantize", "null", "--output_dir", str(original)]
    assert main(["merge_lora", str(tmp_path / "adapter"), *flags]) == 0
    said = capsys.readouterr().out
    assert float(said.split("logit gap: ")[1].split()[0]) > 1e-4
    assert "trained on the base with bnb.int8-training, and is merged into the base with its original weights" in said
    bias = "model.norm.weight"
    assert torch.equal(load_file(original / "model.safetensors")[bias], model.norm.weight)


def test_beside_the_adapter_unless_told_and_nothing_is_lost(tmp_path: Path) -> None:
    write(tmp_path, LoRA())
    adapter = tmp_path / "adapter"
    (adapter / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    wanted = logits(adapter)
    assert main(["merge_lora", str(adapter)]) == 0
    assert (logits(adapter) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    after = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert {name: after[name] for name in before} == before
    assert {"model.safetensors", "config.json"} <= after.keys() - before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


LAYERS = {"gate": "mlp.fc_1", "up": "mlp.fc_2", "down": "mlp.proj", "out": "attn.proj"}


def write_litgpt(folder: Path, model: GPT) -> None:
    """The adapter of a model (q, v and the layers above) as LitGPT's finetune_lora leaves it; its base stays ours."""
    added, pairs = adapt.get_adapter_parameters(model), {}
    for number in range(model.config.n_layer):
        for half in "ab":
            both = [added[f"blocks.{number}.attention.{part}.lora_{half}"].detach() for part in "qv"]
            pairs[f"transformer.h.{number}.attn.qkv.lora_{half.upper()}"] = torch.cat(both)
            for ours, theirs in LAYERS.items():
                owner = "attention" if ours == "out" else "mlp"
                name = f"transformer.h.{number}.{theirs}.lora_{half.upper()}"
                pairs[name] = added[f"blocks.{number}.{owner}.{ours}.lora_{half}"].detach()
    folder.mkdir()
    torch.save({"model": pairs}, folder / "lit_model.pth.lora")
    switches = {"lora_query": True, "lora_key": False, "lora_value": True, "lora_projection": True, "lora_mlp": True}
    values = {"lora_r": 8, "lora_alpha": 32, **switches, "checkpoint_dir": str(folder.parent / "base")}
    (folder / "hyperparameters.yaml").write_text(json.dumps(values))


@torch.no_grad()
def test_a_folder_of_litgpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path, LoRA(target_modules=["q", "v", "attention.out", "mlp"]))
    write_litgpt(tmp_path / "lora", model)
    wanted = model(IDS)
    assert (logits(tmp_path / "lora") - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert main(["merge_lora", str(tmp_path / "lora")]) == 0
    assert (tmp_path / "lora" / "lit_model.pth.lora").is_file()
    assert (logits(tmp_path / "lora") - wanted).abs().max() < 1e-5 * wanted.abs().max()
    other = tmp_path / "other"
    write_litgpt(other, model)
    settings = other / "hyperparameters.yaml"
    text = settings.read_text()
    changes = {('"lora_key": false', '"lora_key": true'): "do not fit", ('"lora_r"', '"nothing"'): "lora_r is missing"}
    for change, said in changes.items():
        settings.write_text(text.replace(*change))
        capsys.readouterr()
        assert main(["merge_lora", str(other), "--output_dir", str(tmp_path / "merged")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_an_output_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LoRA())
    merged = merge(tmp_path)
    (merged / "model.safetensors").write_bytes(b"mine")
    for flags in (["--output_dir", str(merged)], []):
        main(["merge_lora", str(tmp_path / "adapter"), *flags])
        capsys.readouterr()
        assert main(["merge_lora", str(tmp_path / "adapter"), *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "already" in line
    assert (merged / "model.safetensors").read_bytes() == b"mine"
    assert main(["merge_lora", str(tmp_path / "base")]) == 0
    assert "nothing to merge" in capsys.readouterr().err


def test_nothing_is_there_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, LoRA())
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def broken(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_lora, "compare_logits", broken)  # the last that is done, when all files are written
    for flags in ([], ["--output_dir", str(tmp_path / "merged")]):
        assert main(["merge_lora", str(tmp_path / "adapter"), *flags]) == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_merged_model_stops_where_the_tokenizer_of_the_adapter_says(tmp_path: Path) -> None:
    write(tmp_path, LoRA())
    for folder, kind in (("base", "llama3"), ("adapter", "chatml")):
        write_tokenizer(tmp_path / folder, kind)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "top_k": 5}))
    end = Tokenizer(tmp_path / "adapter").token_to_id("<|im_end|>")
    merged = merge(tmp_path)
    assert Tokenizer(merged).fingerprint() == Tokenizer(tmp_path / "adapter").fingerprint()
    values = transformers.GenerationConfig.from_pretrained(merged)
    assert {3, end} <= set(values.eos_token_id) and values.top_k == 5
    assert set(json.loads((merged / "config.json").read_text())["eos_token_id"]) == set(values.eos_token_id)


@pytest.mark.parametrize("name", ["chat_template.jinja", "prompt_style.yaml"])
def test_an_adapter_with_a_prompt_format_alone_has_the_tokenizer_of_its_base(name: str, tmp_path: Path) -> None:
    write(tmp_path, LoRA())
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tokenizer(base, "llama3")
    for other in ("chat_template.jinja", "prompt_style.yaml"):
        (base / other).write_text("{{ messages[0].content }}" if "chat" in other else "class_path: Alpaca\n")
    (adapter / name).write_text("<{{ messages[0].content }}>" if "chat" in name else "class_path: Default\n")
    assert (find_tokenizer_folder(adapter), find_format_folder(adapter)) == (base, adapter)
    merged = merge(tmp_path)
    assert Tokenizer(merged).fingerprint() == Tokenizer(base).fingerprint()
    assert [path.name for path in merged.iterdir() if path.name in ("chat_template.jinja", "prompt_style.yaml")] == [
        name
    ]
    assert (merged / name).read_text() == (adapter / name).read_text()
    (adapter / name).unlink()
    assert (find_tokenizer_folder(adapter), find_format_folder(adapter)) == (base, base)


def test_a_base_on_the_hub_is_the_one_downloaded_or_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, LoRA())
    wanted = logits(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/tiny"}))
    (tmp_path / "base").rename(tmp_path / "published")
    fetched = []

    def download(repo_id: str, checkpoint_dir: Path, **_: Any) -> Path:
        if fetched:
            raise UserError(f"repo_id: {repo_id}: the hub cannot be reached; check the network")
        fetched.append(repo_id)
        shutil.copytree(tmp_path / "published", checkpoint_dir / repo_id)
        return checkpoint_dir / repo_id

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", download)
    for name in ("first", "second"):
        assert main(["merge_lora", "adapter", "--output_dir", name]) == 0
        assert (logits(tmp_path / name) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    shutil.rmtree(tmp_path / "checkpoints")
    capsys.readouterr()
    for line in (["merge_lora", "adapter", "--output_dir", "third"], ["generate", "adapter"], ["validate", "adapter"]):
        assert main(line) == 1
        output = capsys.readouterr()
        assert "base_model_name_or_path" in output.out + output.err and "cannot be reached" in output.out + output.err
        assert len(output.err.splitlines()) == 1
    assert fetched == ["org/tiny"]


def test_what_cannot_be_merged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, LoRA())
    other = random_model(small("Qwen2.5-0.5B", n_embd=48, head_size=12))
    save_model_folder(tmp_path / "wider", config=other.config, tensors=copy_base(other))
    write(tmp_path / "shifted", AdapterV2(start_layer=1))
    write(tmp_path / "edited", ReFT())
    config = tmp_path / "lost" / "adapter_config.json"
    config.parent.mkdir()
    (tmp_path / "empty").mkdir()
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone")}))
    cases = {
        ("adapter", "--pretrained_checkpoint_dir", str(tmp_path / "wider")): "load its own base",
        ("adapter", "--pretrained_checkpoint_dir", str(tmp_path / "gone")): "pretrained_checkpoint_dir: ",
        ("adapter", "--pretrained_checkpoint_dir", str(tmp_path / "edited/adapter")): "is an adapter too",
        ("shifted/adapter",): "cannot be merged: the layer has no bias",
        ("edited/adapter",): "cannot be merged: edits",
        ("lost",): "base_model_name_or_path: ",
        ("nothing",): "does not exist",
        ("empty",): "holds no adapter",
    }
    for (folder, *flags), said in cases.items():
        output = ["--output_dir", str(tmp_path / "merged")]
        assert main(["merge_lora", str(tmp_path / folder), *flags, *output]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line, line
    assert not (tmp_path / "merged").exists()
