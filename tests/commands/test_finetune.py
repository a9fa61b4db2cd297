"""Finetuning from the command line: adapters and whole models, packed or not, on one rank or two, broken off or not."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt.data.tokenizer import train_tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.store.save_model import save_model_folder
from tests.commands import resume_worker
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import SHAPE, read_losses

LORA = {"lora_r": 4, "lora_dropout": 0.0, "lora_mlp": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of bytes."""
    return write_base(tmp_path_factory.mktemp("base"))


def write_base(folder: Path, **changes: Any) -> Path:
    train_tokenizer(["a"], "bytes", 0, folder / "tokenizer")
    shape = Config(**{**SHAPE, "name": "toy", "block_size": 256, "n_embd": 32, "intermediate_size": 48, **changes})
    model = GPT(shape)
    initialize(model, 0)
    tensors = dict(model.named_parameters())
    save_model_folder(folder / "model", config=shape, tensors=tensors, tokenizer_dir=folder / "tokenizer")
    return folder / "model"


def write_rows(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"instruction": f"How many are {number} things?", "output": "There are many. " * (number % 5)}
        for number in range(1, 41)
        if number % 5
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def recipe_of(folder: Path, base: Path, **changes: Any) -> Path:
    data = {"json_path": "rows.json", "val_split_fraction": 0.1, "num_workers": 0, "mask_prompt": True}
    recipe: dict[str, Any] = {
        "checkpoint_dir": str(base),
        "out_dir": "out",
        "precision": "32-true",
        "data": {"class_path": "JSON", "init_args": data},
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_steps": 10,
            "epochs": None,
            "lr_warmup_steps": 2,
            "save_interval": 5,
            "min_lr": 0,
        },
        "eval": {"interval": 100},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 2e-2, "weight_decay": 0.0}},
    }
    for key, value in changes.items():
        group = recipe
        *parents, last = key.split("__")
        for parent in parents:
            group = group[parent]
        group[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def run(folder: Path, base: Path, command: str = "finetune_lora", ranks: int = 1, **changes: Any) -> dict[int, float]:
    """The losses of a run that must end well."""
    write_rows(folder)
    recipe_of(folder, base, devices=ranks, **changes)
    codes = join_ranks(start_ranks(run_litgpt, command, "--config", "recipe.yaml", folder=folder, ranks=ranks))
    assert codes == [0] * ranks, "".join(path.read_text() for path in sorted(folder.glob("rank-*.log")))
    return read_losses(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """The output and the losses of a run with LoRA."""
    folder = tmp_path_factory.mktemp("plain")
    losses = run(folder, base, **LORA)
    return folder / "out", losses


def test_an_adapter_is_trained_and_folded_into_the_final_model(
    base: Path, plain: tuple[Path, dict[int, float]]
) -> None:
    out, got = plain
    before = weights(base)
    assert got[10] < got[1] - 0.3
    after, adapter = weights(out / "final"), load_file(out / "adapter" / "adapter_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in before if any(target in name for target in targets)}
    layer = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
    folded = before[f"{layer}.weight"] + 16 / 4 * b @ a
    torch.testing.assert_close(after[f"{layer}.weight"], folded, atol=1e-6, rtol=1e-5)
    assert "prompts.Alpaca" in (out / "final" / "prompt_style.yaml").read_text()
    (told,) = json.loads((out / "data_report.json").read_text()).values()
    assert told["rows"] == 32 and told["reasons"] == {}


def test_an_example_is_answered_at_each_validation(base: Path, tmp_path: Path) -> None:
    run(tmp_path, base, **LORA, eval={"interval": 5, "max_new_tokens": 6, "evaluate_example": 2})
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    asked = "How many are 3 things?"
    assert all(asked in line["prompt"] and len(line["prompt"]) <= len(line["text"]) for line in lines)


@pytest.mark.slow
def test_losses_are_logged_by_channel(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": f"{name}.jsonl", "channel": name} for name in ("a", "b")]
    data = {"sources": sources, "prompt_style": "alpaca", "num_workers": 0, "on_overlong": "truncate_right"}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run(
            folder,
            base,
            ranks=ranks,
            **LORA,
            data={
                "class_path": "Conversations",
                "init_args": {**data, "sources": [{**one, "path": str(tmp_path / one["path"])} for one in sources]},
            },
        )
    told = [list(csv.DictReader((tmp_path / ranks / "out/logs/csv/version_0/metrics.csv").open())) for ranks in "12"]
    for alone, shared in zip(*told, strict=True):
        for column in ("loss_a", "loss_b"):
            assert bool(alone[column]) == bool(shared[column])
            if alone[column]:
                assert float(alone[column]) == pytest.approx(float(shared[column]), abs=1e-5)
    assert any(row["loss_a"] for row in told[0]) and any(row["loss_b"] for row in told[0])


def test_full_finetuning_leaves_alone_what_it_is_told_to(base: Path, tmp_path: Path) -> None:
    tuner = {"class_path": "Full", "init_args": {"freeze_parameters": ["embedding", "blocks.0"]}}
    got = run(tmp_path, base, "finetune_full", tuner=tuner, optimizer__init_args__lr=1e-2)
    assert got[10] < got[1] - 0.3
    before, after = weights(base), weights(tmp_path / "out" / "final")
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {name for name in before if "layers.0." in name or "embed_tokens" in name}


LAYOUTS: dict[str, dict[str, Any]] = {
    "map": {},
    "packed": {"packing": {"enabled": True, "length": 256}},
    "lazy": {"tokenize": "lazy"},
    "streaming": {"streaming": True, "shuffle_buffer": 8, "val_rows": 2, "num_workers": 1},
    "streaming packed": {"streaming": True, "shuffle_buffer": 8, "packing": {"enabled": True}},
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_broken_off_and_resumed_ends_as_if_it_had_not_been(
    base: Path, tmp_path: Path, ranks: int
) -> None:
    """20 steps are 10, and 10 more from the checkpoint there: every loss and weight to the bit."""
    settings: dict[str, Any] = {**LORA, "lora_dropout": 0.1, "eval": {"interval": 100, "final_validation": False}}
    settings |= {"train__micro_batch_size": 1, "train__global_batch_size": 2, "train__max_steps": 20}
    data = {"sources": ["rows.json"], "prompt_style": "default", "num_workers": 0}
    for layout, changes in LAYOUTS.items():
        for name in (layout, f"{layout}-resumed"):
            write_rows(tmp_path / name)
            chosen = {"class_path": "Conversations", "init_args": {**data, **changes}}
            recipe_of(tmp_path / name, base, devices=ranks, **settings, data=chosen, train__save_interval=10)
    folders = [tmp_path / layout for layout in LAYOUTS]
    codes = join_ranks(start_ranks(resume_worker.worker, folders, folder=tmp_path, ranks=ranks), timeout=500)
    assert codes == [0] * ranks, "".join(path.read_text() for path in sorted(tmp_path.glob("rank-*.log")))
    for folder in folders:
        resumed = folder.with_name(f"{folder.name}-resumed")
        whole, rest = read_losses(folder), read_losses(resumed)
        assert len(whole) == 20 and len(set(whole.values())) == 20
        assert {step: loss for step, loss in rest.items() if step > 10} == {s: whole[s] for s in range(11, 21)}, folder
        for name in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
            ours, theirs = load_file(resumed / "out" / name), load_file(folder / "out" / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), (folder, name)
        if "streaming" in folder.name:
            assert (resumed / "out/data_report.json").read_text() == (folder / "out/data_report.json").read_text()


def test_two_ranks_have_the_losses_of_one(base: Path, plain: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    _, alone = plain
    shared = run(tmp_path / "shared", base, ranks=2, **LORA)
    replicated = run(tmp_path / "replicated", base, ranks=2, parallel={"data_replicate": 2, "data_shard": 1}, **LORA)
    assert shared == pytest.approx(alone, abs=1e-5) and replicated == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_packed_base_is_trained_beside_and_resumed(
    base: Path, plain: tuple[Path, dict[int, float]], tmp_path: Path, ranks: int
) -> None:
    settings = {**LORA, "quantize": "bnb.int8-training"}
    _, unpacked = plain
    whole = run(tmp_path / "whole", base, ranks=ranks, **settings)
    assert whole[10] < whole[1] - 0.3 and whole == pytest.approx(unpacked, abs=0.05) and whole != unpacked
    folder = tmp_path / "broken"
    run(folder, base, ranks=ranks, **settings, train__max_steps=5, train__lr_decay_steps=10)
    second = run(folder, base, ranks=ranks, **settings, resume=True, train__lr_decay_steps=10)
    assert {step: second[step] for step in range(6, 11)} == {step: whole[step] for step in range(6, 11)}


def test_checkpoints_of_an_adapter_hold_no_base(plain: tuple[Path, dict[int, float]]) -> None:
    out, _ = plain
    (shard,) = (out / "step-00000010").glob("shard-*.safetensors")
    names = [name for name in load_file(shard) if name.startswith("model.")]
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("finetune_lora", {"lora_query": False, "lora_value": False}, "lora_query"),
        ("finetune_lora", {"tuner": "IA3", "lora_r": 2}, "lora_r: not supported with tuner"),
        ("finetune_full", {"tuner": "LoRA"}, "tuner: LoRA"),
        ("finetune_lora", {"tuner": "AdapterV2"}, "tuner.start_layer: 2 leaves none of 2 blocks"),
        ("finetune_lora", {"tuner": "Full", "quantize": "bnb.nf4"}, "quantize: bnb.nf4"),
        ("finetune_full", {"quantize": "bnb.nf4"}, "quantize"),
        ("finetune_lora", {"eval": {"max_new_tokens": 4, "evaluate_example": 99}}, "eval.evaluate_example: 99 of 32"),
        ("finetune_lora", {"train__epochs": None, "train__max_steps": None}, "train.epochs"),
        ("finetune_lora", {"checkpoint_dir": "nowhere/at/all"}, "checkpoint_dir: nowhere/at/all"),
        ("finetune_lora", {"data__init_args__json_path": "gone.json"}, "gone.json"),
        ("finetune_lora", {"tuner": {"class_path": "LoRA", "init_args": {"target_modules": ["kuh"]}}}, "kuh"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    base: Path, tmp_path: Path, command: str, changes: dict[str, Any], words: str
) -> None:
    write_rows(tmp_path)
    recipe_of(tmp_path, base, **changes)
    assert join_ranks(start_ranks(run_litgpt, command, "--config", "recipe.yaml", folder=tmp_path)) != [0]
    said = (tmp_path / "rank-0.log").read_text().strip().splitlines()
    assert words in said[-1] and not any("Traceback" in line for line in said)
