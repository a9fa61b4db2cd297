"""Names, paths, layouts and tokenizers are checked before torch is imported and before processes start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from litgpt import cli
from litgpt.recipe.commands import COMMANDS, import_object
from litgpt.store import hub

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 128, "num_key_value_heads": 2}
LLAVA = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model"}}
PRETRAIN = ["pretrain", "pythia-14m", "--data=TextFiles", "--data.train_data_path=texts", "--tokenizer_dir=small"]
FINETUNE = ["finetune_full", "model", "--data=JSON", "--data.json_path=rows.json"]
CASES = [
    (["pretrain", "pythia-14x"], "model 'pythia-14x' is not known; did you mean pythia-14m"),
    ([*PRETRAIN, "--model_config.n_layr=3"], "model_config.n_layr: unknown field; did you mean n_layer?"),
    (
        [*PRETRAIN, "--devices=7", "--parallel.pipeline=7"],
        "parallel.pipeline: 7 makes 7 stages, but the model has 6 layers",
    ),
    (
        [*PRETRAIN, "--devices=3", "--parallel.tensor=3"],
        "parallel.tensor: 3 does not divide the model's n_head: 4; set 2",
    ),
    ([*PRETRAIN, "--devices=2", "--parallel.expert=2"], "parallel.expert: 2 does not divide the model's n_expert: 0"),
    (
        [*PRETRAIN, "--devices=8", "--parallel.context=8", "--parallel.context_method=ulysses"],
        "parallel.context: 8 does not divide the 4 heads of a device",
    ),
    ([*PRETRAIN, "--train.max_seq_length=999"], "train.max_seq_length: 999 is more than the model's block_size"),
    (
        [*PRETRAIN, "--train.max_tokens=100_000"],
        "train.max_tokens: 100000 is less than one step of global_batch_size x max_seq_length = 262144 tokens; "
        "set train.max_tokens: 262144, or train.global_batch_size: 192",
    ),
    ([*PRETRAIN, "--resume=true"], "resume: true, but out/pretrain holds no checkpoint; use resume: auto"),
    ([*PRETRAIN, "--out_dir=old"], "out_dir: old holds a run already (step-00000002); set resume: auto"),
    ([*PRETRAIN, "--initial_checkpoint_dir=none"], "initial_checkpoint_dir: none is not a folder"),
    ([*PRETRAIN, "--initial_checkpoint_dir=model"], "set model_config.padded_vocab_size: 64"),
    (
        [*PRETRAIN, "--tokenizer_dir=none"],
        "none: has neither tokenizer.json nor tokenizer.model; use the folder of a model, get one",
    ),
    (PRETRAIN[:-1], "tokenizer_dir: missing, but data: TextFiles is text"),
    ([*PRETRAIN, "--data.train_data_path=none"], "data.train_data_path: none is not a folder of text files"),
    ([*PRETRAIN, "--model_config.padded_vocab_size=3"], "small: the tokenizer has 4 tokens, but the model has 3 rows"),
    (["finetune", "some/wrong/path"], "checkpoint_dir: some/wrong/path is not a folder"),
    (["finetune", "none"], "checkpoint_dir: none is not a folder; set a model's folder or its org/name on the hub"),
    (["finetune", "model", "--initial_adapter_dir=none"], "initial_adapter_dir: none is not a folder"),
    ([*FINETUNE, "--data.json_path=none.json"], "data.json_path: none.json is not a .json or .jsonl file"),
    (["finetune", "model", "--data=Conversations", "--data.sources=[a/b/c]"], "data.sources: a/b/c: no such file"),
    ([*FINETUNE, "--devices=4", "--parallel.pipeline=4"], "parallel.pipeline: 4 makes 4 stages, but the model has 3"),
    ([*FINETUNE, "--out_dir=old"], "out_dir: old holds a run already"),
    *[
        ([command, "none", *output], "checkpoint_dir: none does not exist; set the folder of a model or of a run")
        for command, output in {
            "validate": [],
            "verify": [],
            "convert_to_litgpt": [],
            "convert_from_litgpt": ["new"],
            "convert_pretrained_checkpoint": ["new"],
            "merge_lora": [],
        }.items()
    ],
    (["data", "inspect", *PRETRAIN[2:4]], "tokenizer_dir: missing, but data: TextFiles is text"),
    (
        ["data", "prepare", *FINETUNE[2:3], "--data.json_path=no.json", "--tokenizer_dir=small"],
        "data.json_path: no.json",
    ),
    (["generate", "none"], "checkpoint_dir: none is not a folder"),
    (["generate_full", "model"], "finetuned_path: out/finetune/full/final is not a folder"),
    (["generate_adapter_v2", "model"], "adapter_path: out/finetune/adapter-v2/final is not a folder"),
    (["generate_speculatively", "model", "none"], "target_model_checkpoint_dir: none is not a folder"),
    ([*PRETRAIN, "--moe.aux_loss_coeff=0.1"], "moe.aux_loss_coeff: 0.1 has no effect with a model without experts"),
    (
        ["finetune", "seeing", *FINETUNE[2:], "--devices=8", "--parallel.pipeline=8"],
        "parallel.pipeline: 8 makes 8 stages, but the model has",
    ),
    ([*FINETUNE, "--freeze.llm=true"], "freeze.llm: true has no effect with a model without a tower"),
    ([*FINETUNE, "--moe.z_loss_coeff=0.1"], "moe.z_loss_coeff: 0.1 has no effect with a model without experts"),
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small tokenizer, texts, rows, the config of a model, and an old run."""
    for name in ("small", "texts", "model", "seeing", "old/step-00000002"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "texts/a.txt").write_text("a")
    (tmp_path / "texts/b.txt").write_text("b")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "model/config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "seeing/config.json").write_text(json.dumps(LLAVA))
    for folder in ("small", "model", "seeing"):
        Tokenizer(BPE({"a": 0, "b": 1, "c": 2, "d": 3}, [])).save(str(tmp_path / folder / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("argv", "message"), CASES, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_an_early_error(argv, message, folders, capsys):
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (folders / "out").exists()


def test_early_errors_import_no_torch(folders):
    code = "import json, sys; from litgpt import cli\nfor argv in json.loads(sys.argv[1]): assert cli.main(argv) == 1\n"
    code += "sys.exit(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)) or 0)"
    argv = [sys.executable, "-c", code, json.dumps([argv for argv, _ in CASES])]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folders)
    assert done.returncode == 0, done.stderr[-2000:]


PRO = ["--tuner=LLaMAPro", "--tuner.new_blocks=1", "--devices=4", "--parallel.pipeline=4"]
LONG = ["--train.max_seq_length=256", "--model_config.block_size=256"]


@pytest.mark.parametrize(
    "argv",
    [PRETRAIN, FINETUNE, [*FINETUNE, *PRO], [*FINETUNE, *LONG], ["generate", "model"], ["finetune", "pythia-14m"]],
)
def test_correct_settings_pass(argv, folders, litgpt, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(hub, "check_hub_connection", lambda: None)
    import_object(f"litgpt.train.early_checks:{COMMANDS[argv[0]].check}")(litgpt(*argv).recipe)
