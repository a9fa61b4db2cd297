"""What a run leaves of an adapter computes, once loaded, what the model in training did, cached or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt import LLM
from litgpt.cli import main
from litgpt.parallel.apply import reshard_parameters
from litgpt.parallel.strategy import is_rank_zero
from tests.commands.test_finetune import LORA, base, recipe_of, write_rows
from tests.processes import join_ranks, start_ranks

__all__ = ["base"]
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
SHORT = {"train__max_steps": 4, "train__save_interval": None, "eval__interval": 4, "train__global_batch_size": 4}
LATE = {"init_args": {"start_layer": 1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Adapter": ("finetune_adapter", {"tuner": {"class_path": "Adapter", **LATE}}),
    "AdapterV2": ("finetune_adapter_v2", {"tuner": {"class_path": "AdapterV2", **LATE}}),
    "AdapterV2, packed": (
        "finetune_adapter_v2",
        {"tuner": {"class_path": "AdapterV2", **LATE}, "quantize": "bnb.int8-training"},
    ),
    "ReFT": ("finetune", {"tuner": "ReFT"}),
    "LoRA, packed": ("finetune", {**LORA, "quantize": "bnb.int8-training"}),
}


def trained(*argv: str) -> int:
    """Run a command line that also puts down the logits of the model that it has trained, in `logits.safetensors`."""
    from litgpt.commands import finetune

    publish = finetune.publish

    def publish_with_logits(run: Any, **settings: Any) -> Path:
        with torch.no_grad():
            logits = run.train_state.core.eval()(IDS)
        reshard_parameters(run.train_state.core)  # as a run does when it has looked at its model
        if is_rank_zero():
            save_file({"logits": logits}, "logits.safetensors")
        return publish(run, **settings)

    finetune.publish = publish_with_logits
    return main(argv)


def run(folder: Path, base: Path, command: str, ranks: int = 1, **changes: Any) -> Path:
    """The output of a run that must end well."""
    write_rows(folder)
    recipe_of(folder, base, devices=ranks, **{**SHORT, **changes})
    codes = join_ranks(start_ranks(trained, command, "--config", "recipe.yaml", folder=folder, ranks=ranks))
    assert codes == [0] * ranks, (folder / "rank-0.log").read_text()
    return folder / "out"


@torch.no_grad()
def without_cache(llm: LLM, prompt: str, tokens: int) -> list[int]:
    ids = llm.prompt_tokens(prompt)
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(llm.model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def logits_of(llm: LLM) -> Tensor:
    with torch.no_grad():
        return llm.model(IDS)


@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_what_training_did(base: Path, tmp_path: Path, case: str) -> None:
    command, settings = CASES[case]
    out = run(tmp_path, base, command, ranks=2 if case == "AdapterV2" else 1, **settings)
    wanted = load_file(tmp_path / "logits.safetensors")["logits"]
    merges = (out / "adapter").is_dir()
    assert merges == case.startswith("LoRA") and (out / "final" / "model.safetensors").is_file() == merges
    plain = logits_of(LLM.load(base, distribute=None))
    assert (plain - wanted).abs().max() > 1e-2
    for folder in [out / "final", out, *([out / "adapter"] if merges else [])]:
        llm = LLM.load(folder, distribute=None)
        assert (logits_of(llm) - wanted).abs().max() < 2e-6
        assert type(llm.prompt_style).__name__ == "Alpaca"
        tokens = llm.generate("How many?", max_new_tokens=12, temperature=0, return_as_token_ids=True)
        assert tokens.tolist() == without_cache(llm, "How many?", len(tokens)) and len(tokens) > 5
    asked = "".join(path.read_text() for path in out.glob("samples.jsonl"))
    assert "How many are" in asked


def test_numbers_of_another_type_and_a_whole_model_out_of_an_adapter(base: Path, tmp_path: Path) -> None:
    out = run(tmp_path, base, "finetune", **LORA)
    llm = LLM.load(out / "adapter", distribute=None)
    exact = logits_of(llm)
    llm.save(tmp_path / "saved")
    assert (logits_of(LLM.load(tmp_path / "saved", distribute=None)) - exact).abs().max() < 1e-5
    llm.distribute(accelerator="cpu", precision="bf16-true")
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.bfloat16}
    assert torch.nn.functional.cosine_similarity(logits_of(llm).float().flatten(), exact.flatten(), dim=0) > 0.999
    assert main(["merge_lora", str(out / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    merged, finals = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", out / "final"))
    assert merged.keys() == finals.keys() and all(torch.equal(merged[name], finals[name]) for name in finals)
    assert main(["merge_lora", str(out)]) == 0  # the newest checkpoint, which holds the adapter alone
    (step,) = out.glob("step-*-merged")
    assert all(torch.equal(value, finals[name]) for name, value in load_file(step / "model.safetensors").items())
    for name in ("prompt_style.yaml", "chat_template.jinja"):  # transformers' form of the same prompt style
        texts = [(folder / name).read_text() for folder in (step, out / "final", out / "adapter", tmp_path / "merged")]
        assert len(set(texts)) == 1 and any(word in texts[0] for word in ("Alpaca", "Instruction"))


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("finetune_adapter", {"tuner": "AdapterV2"}, "tuner: AdapterV2 is not supported by this command"),
        ("finetune_adapter_v2", {"tuner": "LoRA"}, "tuner: LoRA is not supported by this command"),
        ("finetune_adapter", {"lora_r": 2}, "lora_r is not a key"),
        ("finetune", {"checkpoint_dir": "adapter"}, "checkpoint_dir: adapter is an adapter"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    base: Path,
    tmp_path: Path,
    command: str,
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    recipe_of(tmp_path, base, **changes)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main([command, "--config", "recipe.yaml"]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
