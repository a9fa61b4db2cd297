"""Adapters with PEFT's options are merged, generated with and trained further as in PEFT, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import config as peft_config
from torch import Tensor

from litgpt.cli import main
from litgpt.data.modules.instruction_sets import JSON
from litgpt.data.tokenizer import train_tokenizer
from litgpt.errors import UserError
from litgpt.infer.load import open_model
from litgpt.model.gpt import GPT
from litgpt.recipe.finetune import FinetuneLora
from litgpt.store.adapters.folder import load_adapter_folder
from litgpt.store.adapters.peft_tuners import convert_tuner_from_peft
from litgpt.store.load_model import load_config
from litgpt.store.save_model import save_model_folder
from litgpt.train.build_state import build_train_state
from litgpt.train.run_spec import build_finetune_spec
from tests.adapt.models import IDS
from tests.store.models import random_model, small

CPU = torch.device("cpu")
ROWS, NEW_ROWS = 264, 270
Q = ["q_proj"]
BOTH = ["embed_tokens", "lm_head"]
TIED, RESIZED = {"tie_embeddings": True}, {"rows": NEW_ROWS}
# By name: options of LoraConfig, the base and its vocabulary in training, and why it is not trained further.
SUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "target_modules by regex": ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, {}, ""),
    "all-linear, exclude_modules": ({"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, {}, ""),
    "layers_to_transform": ({"layers_to_transform": [1], "layers_pattern": "layers"}, {}, ""),
    "bias: lora_only": ({"bias": "lora_only"}, {}, ""),
    "use_dora, use_rslora": ({"use_dora": True, "use_rslora": True}, {}, ""),
    "init: gaussian": ({"init_lora_weights": "gaussian"}, {}, ""),
    "init: orthogonal": ({"init_lora_weights": "orthogonal"}, {}, ""),
    "init: mica": ({"init_lora_weights": "mica"}, {}, "init_lora_weights: mica trains A alone"),
    "velora_config": ({"velora_config": peft_config.VeloraConfig()}, {}, "velora_config: it approximates"),
    "saved embedding, tied": ({"modules_to_save": ["embed_tokens"]}, TIED, ""),
    "saved head, tied": ({"modules_to_save": ["lm_head"]}, TIED, ""),
    "saved both, tied": ({"modules_to_save": BOTH}, TIED, ""),
    "saved embedding, ensured": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED, ""),
    "LoRA on both": ({"target_modules": Q + BOTH}, {}, ""),
    "LoRA on the embedding, tied": ({"target_modules": [*Q, "embed_tokens"]}, TIED, ""),
    "LoRA on the head, tied": ({"target_modules": [*Q, "lm_head"]}, TIED, ""),
    "LoRA on the embedding, ensured": (
        {"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True},
        TIED,
        "",
    ),
    "trainable tokens": ({"trainable_token_indices": [3, 5]}, {}, "trainable_token_indices: it trains rows"),
    "trainable tokens, tied": ({"trainable_token_indices": [3, 5]}, TIED, "trainable_token_indices: it trains rows"),
    "trainable tokens of both": (
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 7]}},
        {},
        "trainable_token_indices: it trains rows",
    ),
    "resized, saved": ({"modules_to_save": BOTH}, RESIZED, ""),
    "fewer rows, saved": ({"modules_to_save": BOTH}, {"rows": ROWS - 8}, ""),
    "resized, saved embedding": ({"modules_to_save": ["embed_tokens"]}, RESIZED, "head.weight is not trained, but"),
    "resized, tied": ({}, {**TIED, **RESIZED}, "embedding.weight is not trained, but"),
    "resized, saved embedding, tied": (
        {"modules_to_save": ["embed_tokens"]},
        {**TIED, **RESIZED},
        r"head.weight is not trained, but differs from the base's \(\[270, 32\] in the adapter, \[264, 32\] in the",
    ),
    "resized, LoRA, tied": (
        {"target_modules": [*Q, "embed_tokens"]},
        {**TIED, **RESIZED},
        "weight is not trained, but",
    ),
    "resized, LoRA": ({"target_modules": Q + BOTH}, RESIZED, "weight is not trained, but"),
    "resized, trainable tokens": ({"trainable_token_indices": [265, 266]}, RESIZED, "trainable_token_indices"),
}


def write_base(folder: Path, *, tie_embeddings: bool = False) -> Path:
    base = random_model(
        small("Qwen2.5-0.5B", tie_embeddings=tie_embeddings, vocab_size=ROWS, padded_vocab_size=ROWS, block_size=64)
    )
    save_model_folder(folder / "base", config=base.config, tensors=dict(base.named_parameters()))
    return folder / "base"


@torch.no_grad()
def train_in_peft(
    folder: Path, options: dict[str, Any], base: dict[str, Any], *, config: Any = peft.LoraConfig, **saving: Any
) -> Any:
    """Write `base` and `adapter`, whose trained parameters are not at their first values; returns PEFT's model."""
    rows = base.get("rows", ROWS)
    path = write_base(folder, tie_embeddings=base.get("tie_embeddings", False))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    targets = {"target_modules": Q} if config is peft.LoraConfig else {}
    settings = {"task_type": "CAUSAL_LM", **targets, **options}
    model = peft.get_peft_model(model, config(**settings))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter", **saving)
    return model.eval()


@torch.no_grad()
def merged_logits(folder: Path) -> Tensor:
    """Of transformers, with the weights that were merged."""
    adapter, output = str(folder / "adapter"), str(folder / "merged")
    assert main(["merge_lora", adapter, "--output_dir", output]) == 0
    return transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(IDS).logits


def start_further_training(folder: Path) -> GPT:
    """The model of a run that trains the adapter further, with its first weights."""
    recipe = FinetuneLora(
        folder / "base",
        initial_adapter_dir=folder / "adapter",
        precision="32-true",
        compile=False,
        data=JSON(folder / "rows.json"),
    )
    spec = build_finetune_spec(recipe, folder / "base", str(folder / "base"), adapter=folder / "adapter")
    return build_train_state(recipe, spec, None, CPU, resumed=False).core.eval()


def count_trained(model: Any) -> int:
    """The number of trained values; those of tied parameters once."""
    trained = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters() if p.requires_grad}
    return sum(trained.values())


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_options_give_what_they_give_in_peft(name: str, tmp_path: Path) -> None:
    options, base, training_error = SUPPORTED[name]
    theirs = train_in_peft(tmp_path, {"r": 4, "lora_alpha": 12, **options}, base)
    wanted, trained = theirs(IDS).logits, count_trained(theirs)
    tolerance = 2e-5 * wanted.abs().max()
    assert (open_model(tmp_path / "adapter", device=CPU)(IDS) - wanted).abs().max() < tolerance
    assert (merged_logits(tmp_path) - wanted).abs().max() < tolerance
    if training_error:
        with pytest.raises(UserError, match=training_error) as error:
            start_further_training(tmp_path)
        assert "initial_adapter_dir: " in str(error.value) and "\n" not in str(error.value)
        return
    model = start_further_training(tmp_path)
    assert (model(IDS) - wanted).abs().max() < tolerance
    assert count_trained(model) == trained


# Values in adapter_config.json that change what LoRA computes; the file's tensors may be the same as without them.
REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "init_lora_weights": "pissa_niter_4",
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"num_samples": 8},
    "task_type": "TOKEN_CLS",
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter of PEFT on its queries."""
    folder = tmp_path_factory.mktemp("plain")
    train_in_peft(folder, {}, {})
    return folder


def copy_adapter(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with other values in its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize("option", [*REFUSED, "corda", "lora_ga", "loftq", "olora"])
def test_options_that_change_more_are_refused_by_name(option: str, plain: Path, tmp_path: Path) -> None:
    changes = {option: REFUSED[option]} if option in REFUSED else {"init_lora_weights": option}
    adapter = copy_adapter(plain / "adapter", tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=f"{next(iter(changes))}: ") as error:
        load_adapter_folder(adapter, load_config(plain / "base"))
    assert "\n" not in str(error.value)


OTHERS = {
    "IA3": (peft.IA3Config, {"feedforward_modules": [], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "VeRA": (peft.VeraConfig, {"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "VeRA, bias": (peft.VeraConfig, {"r": 4, "bias": "all"}, "bias: all"),
    "VeRA without projection": (peft.VeraConfig, {"r": 4, "save_projection": False}, "save_projection: true"),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4, "boft_block_num": 0, "bias": "all"}, "bias: all"),
    "BOFT, blocks": (
        peft.BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 4, "target_modules": ["q_proj", "down_proj"]},
        "boft_block_num: blocks of sizes 8, 12",
    ),
    "LoHa": (peft.LoHaConfig, {"r": 4}, "peft_type: 'LOHA' is not one of LORA, ADALORA, IA3, "),
    "FourierFT": (
        peft.FourierFTConfig,
        {"n_frequency": 9, "n_frequency_pattern": {"q_proj": 8}},
        "n_frequency_pattern: {'q_proj': 8} is not supported; merge",
    ),
    "Bone": (peft.MissConfig, {"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}, "peft_type: 'PREFIX_TUNING'"),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}, "peft_type: 'PROMPT_TUNING'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tuners_are_refused_by_name(name: str, tmp_path: Path) -> None:
    config, options, words = OTHERS[name]
    targets = {} if "PREFIX" in words or "PROMPT" in words else {"target_modules": Q}
    train_in_peft(tmp_path, {**targets, **options}, {}, config=config)
    with pytest.raises(UserError, match=words):
        load_adapter_folder(tmp_path / "adapter", load_config(tmp_path / "base"))


def test_other_tuners_in_fused_layers_are_refused() -> None:
    tensors = {"model.layers.0.self_attn.qkv_proj.ia3_l": torch.ones(64, 1)}
    with pytest.raises(UserError, match=r"target_modules: IA3 on .*qkv_proj is not supported"):
        convert_tuner_from_peft(tensors, {"peft_type": "IA3"}, small("Phi-3-mini-4k-instruct"))


@torch.no_grad()
def test_bin_files_are_read(tmp_path: Path) -> None:
    theirs = train_in_peft(tmp_path, {"r": 4}, {}, safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file()
    wanted = theirs(IDS).logits
    assert (open_model(tmp_path / "adapter", device=CPU)(IDS) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_a_folder_of_several_adapters_lists_them(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        shutil.copytree(plain / "adapter", tmp_path / "several" / name)
    several = str(tmp_path / "several")
    for arguments in (
        ["merge_lora", several],
        ["generate", several, "--prompt", "x"],
        ["finetune", str(plain / "base"), "--initial_adapter_dir", several],
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "has adapters in subfolders; give one of them: first, second" in said, said


def test_a_resized_vocabulary_without_its_rows_is_refused(tmp_path: Path) -> None:
    train_in_peft(tmp_path, {"target_modules": [*Q, "lm_head"]}, RESIZED, save_embedding_layers=False)
    words = "resized from 264 to 270 rows, and embedding.weight with the new rows is not in the file"
    with pytest.raises(UserError, match=words):
        load_adapter_folder(tmp_path / "adapter", load_config(tmp_path / "base"))


def test_a_revision_of_the_base_is_refused(plain: Path, tmp_path: Path) -> None:
    changes = {"base_model_name_or_path": "org/name", "revision": "v2"}
    adapter = copy_adapter(plain / "adapter", tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match="revision: v2 of org/name is not downloaded"):
        open_model(adapter, device=CPU)


@pytest.mark.parametrize("rows", [ROWS, NEW_ROWS])
def test_further_training_keeps_what_changed_of_the_base(rows: int, tmp_path: Path) -> None:
    modules = ["embed_tokens"] if rows == ROWS else BOTH
    train_in_peft(tmp_path, {"modules_to_save": modules}, {**TIED, "rows": rows})
    train_tokenizer(["a"], "bytes", 0, tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "adapter", dirs_exist_ok=True)
    if rows == ROWS:
        shutil.copytree(tmp_path / "tokenizer", tmp_path / "base", dirs_exist_ok=True)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 8)
    base, out = str(tmp_path / "base"), tmp_path / "out"
    flags = {
        "initial_adapter_dir": tmp_path / "adapter",
        "out_dir": out,
        "precision": "32-true",
        "data": "JSON",
        "data.json_path": tmp_path / "rows.jsonl",
        "data.val_split_fraction": "0.5",
        "train.max_steps": "2",
        "train.lr_warmup_steps": "1",
        "train.global_batch_size": "2",
        "train.save_interval": "1",
        "eval.max_new_tokens": "1",
    }
    assert main(["finetune", base, *(f"--{key}={value}" for key, value in flags.items())]) == 0
    with torch.no_grad():
        models = [
            open_model(out / name, device=CPU, dtype=torch.float32) for name in ("final", "adapter", "step-00000002")
        ]
        final, adapter, step = (model(IDS) for model in models)
        before = open_model(tmp_path / "adapter", device=CPU)(IDS)
    assert [(model.config.tie_embeddings, model.config.padded_vocab_size) for model in models] == [(False, rows)] * 3
    assert (adapter - final).abs().max() < 1e-4 and torch.equal(adapter, step)
    assert not torch.allclose(before, final, atol=1e-5)
    assert (out / "final" / "tokenizer.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows != ROWS:
        theirs.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter").eval()(IDS).logits
    assert (theirs - adapter).abs().max() < 2e-5 * theirs.abs().max()
