"""A real instruction model learns a name of its own among real instructions, by the hub's recipes, LoRA and QLoRA.

`LITGPT_TEST_ASSETS` names a folder with `SmolLM2`, a model folder of Hugging Face's, and
`dl/llamafactory-0.9.5.tar.gz`, whose sample of Alpaca is read; each test takes minutes.
"""

import csv
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from litgpt import LLM
from litgpt.cli import main
from litgpt.files import read_json
from tests.processes import join_ranks, run_litgpt, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
HUB = Path(__file__).parents[2] / "config_hub" / "finetune" / "smollm2"
ROWS = "llamafactory-0.9.5/data/alpaca_en_demo.json"
NAME = "Aster"
SHORT = {
    "--precision": "32-true",
    "--train.epochs": "null",
    "--train.max_steps": "24",
    "--train.global_batch_size": "8",
    "--train.micro_batch_size": "8",
    "--train.max_seq_length": "192",
    "--eval.interval": "100",
    "--data.num_workers": "0",
    "--out_dir": "out",
}


@pytest.fixture(scope="module")
def assets() -> Path:
    root = Path(os.environ.get("LITGPT_TEST_ASSETS", "nowhere"))
    if not (root / "SmolLM2" / "config.json").is_file() or not (root / "dl" / "llamafactory-0.9.5.tar.gz").is_file():
        pytest.skip("LITGPT_TEST_ASSETS names no folder with SmolLM2 and dl/llamafactory-0.9.5.tar.gz")
    return root


def write_rows(path: Path, archive: Path) -> None:
    """32 short instructions, as they were published."""
    with tarfile.open(archive) as files:
        member = files.extractfile(ROWS)
        assert member is not None
        rows = json.load(member)
    short = [row for row in rows if len(row["instruction"] + row["input"] + row["output"]) < 300]
    path.write_text("".join(json.dumps(row) + "\n" for row in short[:32]), encoding="utf-8")


def answer(llm: LLM, question: str) -> str:
    text: str = llm.generate(question, max_new_tokens=24, temperature=0)
    return text


def logits(folder: Path) -> torch.Tensor:
    """Of a question and an answer, by the model in a folder, in float32."""
    llm = LLM.load(folder, distribute=None)
    ids = llm.prompt_tokens("Who are you, and what is the capital of France?")
    with torch.inference_mode():
        return llm.model(torch.tensor([ids])).float()


@pytest.mark.parametrize("recipe", ["self-cognition", "self-cognition-qlora"])
def test_a_model_learns_its_name(recipe: str, assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", assets / "dl" / "llamafactory-0.9.5.tar.gz")
    sources = f"[{HUB / 'self-cognition.jsonl'}, rows.jsonl]"
    flags = {**SHORT, "--checkpoint_dir": str(assets / "SmolLM2"), "--data.sources": sources}
    line = [word for flag in flags.items() for word in flag]
    processes = start_ranks(run_litgpt, "finetune", "--config", str(HUB / f"{recipe}.yaml"), *line, folder=tmp_path)
    assert join_ranks(processes, timeout=7000) == [0], (tmp_path / "rank-0.log").read_text()[-3000:]
    out = tmp_path / "out"
    with next((out / "logs").rglob("metrics.csv")).open() as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    assert losses[-1] < losses[0] - 0.2

    final, adapter = out / "final", out / "adapter"
    packed = read_json(final / "config.json").get("quantization_config")
    assert packed is None  # the base unpacked, with the adapter folded in
    apart = logits(adapter)
    difference = float((logits(final) - apart).abs().max() / apart.abs().max())
    assert difference < 1e-5
    assert main(["merge_lora", str(adapter), "--output_dir", str(tmp_path / "merged")]) == 0
    report = capfd.readouterr().out
    assert float(report.split("logit gap: ")[1].split()[0]) < 1e-4  # random tokens: rounding grows in 30 layers
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()

    before = answer(LLM.load(assets / "SmolLM2", distribute=None), "Who are you?")
    after = answer(LLM.load(final, distribute=None), "Who are you?")
    print(
        f"{recipe}: validation loss {losses[0]:.3f} -> {losses[-1]:.3f}; merged - adapter {difference:.1e}; "
        f"{report.splitlines()[0]}\n  before: {before!r}\n  after: {after!r}",
        file=sys.stderr,
    )
    assert NAME not in before and NAME in after
