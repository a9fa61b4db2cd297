"""Every field of a recipe has an effect: an unusual value changes a short run in the way named here, or is refused.

A new field without a row fails `test_every_field_has_a_row`. Fields of a layout over several processes are refused, or
warned of, on one process; that they take effect on several is tested in `tests/layouts`.
"""

import contextlib
import csv
import functools
import gc
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt import cli, finetune_spec
from litgpt.errors import UserError
from litgpt.parallel import processes
from litgpt.recipe.finetune import FinetuneAdapter, FinetuneFull, FinetuneLora
from litgpt.recipe.keys import find_choice_base, find_group, list_keys, list_settings
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.train import GuardArgs
from litgpt.train.garbage_collection import GarbageCollection
from litgpt.train.guard import Guard
from tests.runs import write_recipe, write_text

pytestmark = pytest.mark.slow

TOY: dict[str, Any] = {
    "model_config__block_size": 256,
    "train__max_seq_length": 32,
    "train__max_steps": 3,
    "train__global_batch_size": 4,
    "train__lr_warmup_steps": 1,
    "train__save_interval": None,
    "train__max_norm": None,
    "eval__interval": 2,
    "eval__sample_prompt": "word1",
    "eval__sample_tokens": 4,
}
TUNED = [
    *("--train.max_steps", "3", "--train.global_batch_size", "4", "--train.lr_warmup_steps", "1"),
    *("--train.save_interval", "null", "--train.max_seq_length", "256", "--eval.max_new_tokens", "4"),
    *("--precision", "32-true", "--optimizer.lr", "1e-2", "--data", "JSON", "--data.json_path", "rows.json"),
    *("--data.val_split_fraction", "0.2", "--data.num_workers", "0", "--lora_mlp", "true"),
]


class Row(NamedTuple):
    """What a field changes.

    Attributes:
        value: its unusual value, with other flags behind it.
        fact: the fact of a run that changes; or `refused` or `says`.
        text: what a refusal, or the output, contains.
        given: flags of the run that it is compared with as well.
    """

    value: str
    fact: str
    text: str = ""
    given: str = ""


SPLIT = "does not divide devices x num_nodes = 1"
SHAPE_OF_EXPERTS = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "router_correction": True}
EXPERTS = " ".join(f"--model_config.{name} {json.dumps(value)}" for name, value in SHAPE_OF_EXPERTS.items())
LIMITED = f"{EXPERTS} --moe.expert_capacity_factor 0.5"
RESUMED = "--resume BASE/out/step-00000003 --train.max_steps 5"
WIDE = "--precision bf16-mixed --model_config.n_embd 32 --model_config.intermediate_size 48"
ROWS: dict[str, Row] = {
    "model_name": Row("other", "config"),
    "model_config": Row("{n_layer: 1}", "losses"),
    "initial_checkpoint_dir": Row("BASE/out/final", "losses"),
    "tokenizer_dir": Row("BASE/out/final --tokenizer null", "files"),
    "tokenizer.kind": Row("bpe --tokenizer.vocab_size 300", "losses"),
    "tokenizer.vocab_size": Row("512", "refused", "no effect with tokenizer.kind: bytes"),
    "out_dir": Row("elsewhere", "losses"),  # nothing is written in the usual folder
    "precision": Row("bf16-true", "losses"),
    "resume": Row("true", "refused", "resume"),
    "add_version": Row("true", "files"),
    "train.save_interval": Row("1", "files"),
    "train.log_interval": Row("2", "losses"),
    "train.global_batch_size": Row("8", "losses"),
    "train.micro_batch_size": Row("1", "micro_batches"),
    "train.lr_warmup_steps": Row("3", "rates"),
    "train.lr_warmup_fraction": Row("1.0 --train.lr_warmup_steps null", "rates"),
    "train.epochs": Row("1 --train.max_steps null", "losses"),
    "train.max_tokens": Row("256", "losses"),
    "train.max_steps": Row("2", "losses"),
    "train.max_time": Row("1e-9", "says", "train.max_time"),
    "train.patience": Row(
        "1", "losses", given="--checkpoint.best.metric val_loss --checkpoint.best.mode max --eval.interval 1"
    ),
    "train.max_seq_length": Row("16", "losses"),
    "train.tie_embeddings": Row("true", "losses"),
    "train.max_norm": Row("0.01", "losses"),
    "train.min_lr": Row("5e-3", "rates"),
    "train.lr_decay_style": Row("constant", "rates"),
    "train.lr_decay_steps": Row("2", "rates"),
    "train.wsd_decay_steps": Row("2", "rates", given="--train.lr_decay_style wsd"),
    "train.wsd_decay_style": Row(
        "minus-sqrt", "rates", given="--train.lr_decay_style wsd --train.wsd_decay_steps 2 --train.min_lr 0"
    ),
    "train.gc_interval": Row("1", "collections"),
    "eval.interval": Row("1", "validation"),
    "eval.max_new_tokens": Row("4", "refused", "not supported for pretraining"),
    "eval.max_iters": Row("1", "validation"),
    "eval.initial_validation": Row("true", "validation"),
    "eval.final_validation": Row("false", "validation"),
    "eval.evaluate_example": Row("random", "refused", "not supported for pretraining"),
    "eval.sample_prompt": Row("word2", "samples"),
    "eval.sample_tokens": Row("6", "samples"),
    "eval.tasks": Row("lines --eval.task_path BASE/tasks", "scores"),
    "eval.task_path": Row("none", "refused", "eval.task_path: none is not a folder", given="--eval.tasks lines"),
    "eval.task_limit": Row("1", "scores", given="--eval.tasks lines --eval.task_path BASE/tasks"),
    "log.project": Row("p", "says", "log.project: p has no effect with logger_name: csv"),
    "log.run": Row("r", "says", "log.run: r has no effect"),
    "log.group": Row("g", "says", "log.group: g has no effect"),
    "log.save_dir": Row("d", "says", "log.save_dir: d has no effect with logger_name: csv"),
    "log.tensorboard_queue_size": Row("1", "says", "log.tensorboard_queue_size: 1 has no effect with logger_name: csv"),
    "log.params_norm": Row("true", "columns"),
    "log.timers": Row("true", "columns"),
    "log.teamspace": Row("t", "refused", "litlogger"),
    "log.metadata": Row("{a: b}", "refused", "litlogger"),
    "log.log_model": Row("true", "refused", "litlogger"),
    "log.save_logs": Row("false", "refused", "litlogger"),
    "log.checkpoint_name": Row("c", "refused", "litlogger"),
    "devices": Row("3", "refused", "not divisible"),
    "num_nodes": Row("3", "refused", "not divisible"),
    "logger_name": Row("tensorboard", "files"),
    "seed": Row("7", "losses"),
    "compile": Row("true --recompute.offload true", "refused", "mutually exclusive"),
    "deterministic": Row("true", "deterministic"),
    "attention": Row("math", "operations"),
    "parallel.data_replicate": Row("2", "refused", SPLIT),
    "parallel.data_shard": Row("2", "refused", "devices x num_nodes is 1"),
    "parallel.reshard_after_forward": Row("false", "says", "parallel.reshard_after_forward: false has no effect"),
    "parallel.zero": Row("2", "says", "parallel.zero: 2 has no effect"),
    "parallel.cpu_offload": Row("true", "refused", "needs devices to shard over"),
    "parallel.reduce_dtype": Row("bf16", "says", "parallel.reduce_dtype: bf16 has no effect with 1 data rank"),
    "parallel.prefetch": Row("2", "says", "parallel.prefetch: 2 has no effect"),
    "parallel.tensor": Row("2", "refused", SPLIT),
    "parallel.sequence": Row("false", "refused", "no effect with parallel.tensor: 1"),
    "parallel.context": Row("2", "refused", SPLIT),
    "parallel.context_method": Row("ring", "refused", "no effect with parallel.context: 1"),
    "parallel.pipeline": Row("2", "refused", SPLIT),
    "parallel.pipeline_schedule": Row("zbv", "refused", "no effect with parallel.pipeline: 1"),
    "parallel.pipeline_layers": Row("[2]", "refused", "no effect with parallel.pipeline: 1"),
    "parallel.expert": Row("2", "refused", "does not divide data_shard"),
    "parallel.expert_tensor": Row("2", "refused", "does not divide data_shard"),
    "parallel.expert_dispatch": Row("all-gather", "refused", "no effect with parallel.expert: 1"),
    "parallel.timeout_minutes": Row("5", "timeout"),
    "recompute.granularity": Row("full", "operations"),
    "recompute.method": Row("block", "operations", given="--recompute.granularity full"),
    "recompute.num_layers": Row("2", "operations", given="--recompute.granularity full --recompute.method block"),
    "recompute.modules": Row("[mlp]", "operations", given="--recompute.granularity selective"),
    "recompute.offload": Row("true --compile true", "refused", "mutually exclusive"),
    "loss.type": Row("dft", "losses"),
    "loss.normalize": Row("sample", "operations"),
    "loss.impl": Row("plain", "operations"),
    "loss.chunk_rows": Row("7", "operations"),
    "loss.modalities": Row("[image]", "refused", "needs a model that writes images"),
    "loss.prediction_weight": Row("0.5", "losses", given="--model_config.n_prediction_layers 1"),
    "moe.router_load_balancing_type": Row("seq_aux_loss", "losses", given=f"{EXPERTS} --moe.aux_loss_coeff 0.5"),
    "moe.aux_loss_coeff": Row("0.5", "losses", given=EXPERTS),
    "moe.z_loss_coeff": Row("0.5", "losses", given=EXPERTS),
    "moe.router_bias_update_rate": Row("0.5", "losses", given=EXPERTS),
    "moe.router_dtype": Row("fp64", "operations", given=EXPERTS),
    "moe.expert_capacity_factor": Row("0.5", "losses", given=EXPERTS),
    "moe.token_drop_policy": Row("position", "losses", given=LIMITED),
    "moe.pad_expert_input_to_capacity": Row("true", "operations", given=LIMITED),
    "fp8.recipe": Row("rowwise", "losses", given=WIDE),
    "fp8.format": Row("e4m3", "losses", given=f"{WIDE} --fp8.recipe tensorwise"),
    "fp8.amax_history_len": Row("1", "checkpoint_files", given=f"{WIDE} --fp8.recipe delayed"),
    "fp8.amax_compute_algo": Row("most_recent", "losses", given=f"{WIDE} --fp8.recipe delayed --train.max_steps 6"),
    "fp8.param_gather": Row("true", "says", "no effect with 1 shard", given=f"{WIDE} --fp8.recipe tensorwise"),
    "fp8.exclude": Row("[mlp]", "losses", given=f"{WIDE} --fp8.recipe tensorwise"),
    "fp8.num_layers_at_start_in_bf16": Row("1", "losses", given=f"{WIDE} --fp8.recipe tensorwise"),
    "fp8.num_layers_at_end_in_bf16": Row("1", "losses", given=f"{WIDE} --fp8.recipe tensorwise"),
    "profile.steps": Row("[2, 3]", "files"),
    "checkpoint.keep": Row("1", "files", given="--train.save_interval 1"),
    "checkpoint.asynchronous": Row("false", "operations", given="--train.save_interval 1"),  # not of the last one
    "checkpoint.on_error": Row("sometimes", "refused", "use stop or continue"),
    "checkpoint.save_rng": Row("false", "checkpoint"),
    "checkpoint.save_optimizer": Row("false", "checkpoint"),
    "checkpoint.load_optimizer": Row("false", "losses", given=RESUMED),
    "checkpoint.load_rng": Row("false", "losses", given=f"{RESUMED} --seed 7 --model_config.dropout 0.5"),
    "checkpoint.best.metric": Row("val_ppl", "says", "Best val_ppl"),
    "checkpoint.best.mode": Row("max", "says", "at step 2: out/step-00000002"),
    # that they take effect is tested in tests/faults/test_killed_uploads.py and tests/train/test_run_uploads.py
    "checkpoint.upload_to": Row("bucket/run", "refused", "is not valid; use a URL such as s3://bucket/run"),
    "checkpoint.push_to_hub": Row("model", "refused", "is not org/name"),
}
FINETUNE_ROWS: dict[str, Row] = {
    "checkpoint_dir": Row("BASE/other/out/final", "losses"),
    "access_token": Row("secret", "token"),
    "model_config": Row("{dropout: 0.5}", "losses"),
    # that they take effect is tested in tests/train/test_vision_training.py
    "freeze.llm": Row("true", "refused", "freeze.llm: true has no effect with a model without a tower"),
    "freeze.vision": Row("false", "refused", "has no effect with a model without a vision tower"),
    "freeze.audio": Row("false", "refused", "has no effect with a model without an audio tower"),
    "freeze.aligner": Row("false", "refused", "has no effect with a model without a tower"),
    "rates.vision": Row("0", "refused", "rates.vision: 0.0 has no effect with freeze.vision: true"),
    "rates.audio": Row("0 --freeze.audio false", "refused", "with a model without an audio tower"),
    "rates.aligner": Row("1e-3 --freeze.aligner false", "refused", "with a model without a tower"),
    "neftune_alpha": Row("5", "losses"),
    "quantize": Row("torchao.nf4", "losses"),
    "tuner": Row("IA3 --lora_mlp false", "losses"),
    "initial_adapter_dir": Row("BASE/tuned/out/adapter --lora_mlp false", "losses"),
    "lora_r": Row("3", "losses"),
    "lora_alpha": Row("50", "losses"),
    "lora_dropout": Row("0.5", "losses"),
    **{f"lora_{name}": Row("false", "losses") for name in ("query", "value", "mlp")},
    **{f"lora_{name}": Row("true", "losses") for name in ("key", "projection", "head")},
    "eval.max_new_tokens": Row("8", "samples"),
    "eval.evaluate_example": Row("3", "samples"),
    "train.tie_embeddings": Row("true", "refused", "not supported by finetuning"),
    "out_dir": Row("elsewhere", "losses"),
    "devices": Row("3", "refused", "not divisible"),
    "seed": Row("7", "losses"),
}
CLASSES = {"data", "optimizer", "tuner"}  # the settings of each class are tested with it
GUARD = {"max_skipped": 1, "spike_window": 4, "spike_sigma": 0.1}


def list_leaves(recipe: type) -> set[str]:
    """The keys of a recipe that are no groups and no choices of a class."""
    groups = {key for key in list_keys(recipe) if any(other.startswith(f"{key}.") for other in list_keys(recipe))}
    choices = {name for name, (hint, _) in list_settings(recipe).items() if find_choice_base(hint)}
    empty = {name for name, (hint, _) in list_settings(recipe).items() if find_group(hint) and name not in groups}
    return set(list_keys(recipe)) - groups - choices - empty


def test_every_field_has_a_row() -> None:
    guard = {f"guard.{name}" for name in GUARD}
    assert list_leaves(Pretrain) == ROWS.keys() | guard
    tuned = list_leaves(FinetuneLora) | list_leaves(FinetuneFull) | list_leaves(FinetuneAdapter)
    assert tuned <= FINETUNE_ROWS.keys() | ROWS.keys() | guard and FINETUNE_ROWS.keys() <= tuned | CLASSES
    assert {
        key for key, row in {**ROWS, **FINETUNE_ROWS}.items() if row.fact in ("refused", "says") and not row.text
    } == set()


class CountOperations(TorchDispatchMode):
    """Counts the operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def train(folder: Path, *argv: str) -> dict[str, Any]:
    """The facts of a run in this process, in a folder that holds its data."""
    timeouts, tokens, output = [], [], io.StringIO()
    deterministic, collections = [], []
    strategy, find = processes.MeshStrategy, finetune_spec.find_folder

    def record_strategy(*args: Any, **settings: Any) -> Any:
        timeouts.append(settings["timeout"])
        deterministic.append(torch.are_deterministic_algorithms_enabled())
        return strategy(*args, **settings)

    def record_token(path: Path, *, access_token: str | None = None) -> Path:
        tokens.append(access_token)
        return find(path, access_token=access_token)

    def collect(self: GarbageCollection, step: int) -> None:
        collections.append(not gc.isenabled() and step % (self.interval or step + 1) == 0)

    with (
        contextlib.chdir(folder),
        mock.patch.object(GarbageCollection, "collect", collect),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(processes, "MeshStrategy", record_strategy),
        mock.patch.object(finetune_spec, "find_folder", record_token),
        CountOperations() as operations,
    ):
        code = cli.main([*argv])
    text, out = output.getvalue(), folder / "out"
    logs = sorted(out.glob("logs/csv/*/metrics.csv"))
    rows = list(csv.DictReader(logs[0].open())) if logs else []
    steps = [row for row in rows if row["loss"]]
    files = {re.sub(r"tfevents.*", "tfevents", str(path.relative_to(out))) for path in out.rglob("*")}
    return {
        "code": code,
        "text": " ".join(text.split()),
        "losses": [row["loss"] for row in steps],
        "rates": [row["learning_rate"] for row in steps],
        "micro_batches": [row["iter"] for row in steps],
        "validation": [row["val_loss"] for row in rows if row.get("val_loss")],
        "samples": [path.read_text() for path in out.glob("samples.jsonl")],
        "scores": [{name: value for name, value in row.items() if name.startswith("tasks/")} for row in rows],
        "config": [path.read_text() for path in out.glob("final/model_config.yaml")],
        "files": files,
        "checkpoint_files": [path.read_text() for path in out.glob("step-*/fp8_amax_history.json")],
        "checkpoint": [sorted(load_file(path)) for path in out.glob("step-*/*.safetensors")],
        "operations": operations.count,
        "timeout": timeouts,
        "token": tokens,
        "deterministic": deterministic,
        "collections": collections,
        "columns": sorted(rows[0]) if rows else [],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pretrained models of three steps and of two, and a finetuned one."""
    folder = tmp_path_factory.mktemp("base")
    for facts in (pretrain(folder), pretrain(folder / "other", "--seed", "9"), tune(folder / "tuned", folder)):
        assert facts["code"] == 0, facts["text"]
    write_task(folder / "tasks")
    return folder


def write_task(folder: Path) -> None:
    """A task of lm-eval, `lines`: the bits per byte of two texts."""
    folder.mkdir()
    (folder / "lines.jsonl").write_text('{"text": "word1 word2"}\n{"text": "other"}\n')
    task = {
        "task": "lines",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}},
    }
    task |= {
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    }
    (folder / "lines.yaml").write_text(json.dumps(task | {"metric_list": [{"metric": "bits_per_byte"}]}))


def pretrain(folder: Path, *flags: str) -> dict[str, Any]:
    write_text(folder)
    write_recipe(folder, **TOY)
    return train(folder, "pretrain", "--config", "recipe.yaml", *flags)


def tune(folder: Path, base: Path, *flags: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": f"How many {n}?", "output": "There are many. " * (n % 3 + 1)} for n in range(20)]
    (folder / "rows.json").write_text(json.dumps(rows))
    given = [] if "--checkpoint_dir" in flags else ["--checkpoint_dir", str(base / "out/final")]
    return train(folder, "finetune_lora", "--out_dir", "out", *given, *TUNED, *flags)


@functools.cache
def usual_facts(base: Path, folder: Path, command: str, given: str) -> dict[str, Any]:
    """The facts of the run that a row is compared with."""
    flags = given.split()
    return pretrain(folder, *flags) if command == "pretrain" else tune(folder, base, *flags)


@pytest.mark.parametrize(
    ("command", "key"), [*(("pretrain", key) for key in ROWS), *(("finetune_lora", key) for key in FINETUNE_ROWS)]
)
def test_a_field_has_an_effect(command: str, key: str, base: Path, tmp_path: Path) -> None:
    row = (ROWS if command == "pretrain" else FINETUNE_ROWS)[key]
    value, *others = re.split(r" (?=--)", row.value.replace("BASE", str(base)))
    given = row.given.replace("BASE", str(base))
    flags = [*given.split(), f"--{key}", value, *" ".join(others).split()]
    facts = pretrain(tmp_path, *flags) if command == "pretrain" else tune(tmp_path, base, *flags)
    if row.fact == "refused":
        assert facts["code"] and re.match(f"litgpt: error: .*{re.escape(row.text)}", facts["text"]), facts["text"]
        return
    assert facts["code"] == 0, facts["text"]
    if row.fact == "says":
        assert row.text in facts["text"]
        return
    name = re.sub(r"\W", "", f"{command}{row.given}")
    usual = usual_facts(base, base / "usual" / name, command, given)
    assert usual["code"] == 0 and facts[row.fact] != usual[row.fact]


@pytest.mark.parametrize("name", GUARD)
def test_a_field_of_the_guard_has_an_effect(name: str) -> None:
    def watch(settings: GuardArgs) -> list[Any]:
        guard, told = Guard(settings), []
        losses = [2.0, 1.0] * 60 + [1.0, 1.01] * 6 + [1.5]
        told += [guard.record(step, loss) for step, loss in enumerate(losses)]
        with pytest.raises(UserError) as error:
            told += [guard.skip(step, loss=float("nan"), gradient_norm=1.0) for step in range(9)]
        return [*told, str(error.value)]

    assert watch(GuardArgs()) != watch(GuardArgs(**{name: GUARD[name]}))
