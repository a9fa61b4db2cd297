"""Runs of a DeepSeek V3 folder with a prediction layer: trained, left as it is, or refused."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.finetune import FinetuneLora
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.train import LossArgs
from litgpt.train.early_checks import check_predictions
from tests.commands.test_finetune import run, weights, write_base
from tests.train.test_runs import trained

DEEPSEEK: dict[str, Any] = {
    "mlp_class_name": "LLaMAMoE",
    "n_expert": 4,
    "n_expert_per_token": 2,
    "moe_intermediate_size": 16,
    "n_shared_expert": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "router_score": "sigmoid",
    "router_correction": True,
    "norm_eps": 1e-6,
    "rope_interleave": True,
    "n_prediction_layers": 1,
    "latent_attention": {
        "q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
SHORT = {"train__max_steps": 2, "train__save_interval": None, "train__global_batch_size": 4}
LORA = {"class_path": "LoRA", "init_args": {"r": 4, "target_modules": ["all-linear"], "modules_to_save": ["embedding"]}}
LAYER = "model.layers.2."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of bytes and a prediction layer."""
    return write_base(tmp_path_factory.mktemp("base"), **DEEPSEEK)


def read_rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("out/logs/csv/*/metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def list_changed(base: Path, folder: Path) -> set[str]:
    """The tensors of the final model that differ from the base; all of its tensors are there."""
    before, after = weights(base), weights(folder / "out/final")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_layer_is_trained_by_a_loss_of_its_own(base: Path, tmp_path: Path) -> None:
    run(tmp_path, base, "finetune_full", **SHORT, eval__max_new_tokens=4)
    changed = list_changed(base, tmp_path)
    own = {name for name in weights(base) if name.startswith(LAYER)}
    kept = {name for name in own if "correction" in name}
    assert own - kept <= changed and len(own) > 20
    rows = read_rows(tmp_path)
    assert all(float(row["prediction_loss/1"]) > 1 for row in rows if row["loss"])
    assert [float(row["val_prediction_loss/1"]) > 1 for row in rows if row["val_loss"]] == [True]


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("finetune_full", {"loss": {"prediction_weight": 0.0}}),
        pytest.param("finetune_lora", {"tuner": LORA}, marks=pytest.mark.slow),
    ],
)
def test_the_layer_is_saved_as_it_was(base: Path, tmp_path: Path, command: str, settings: dict[str, Any]) -> None:
    run(tmp_path, base, command, **SHORT, **settings)
    changed = list_changed(base, tmp_path)
    copies = {f"{LAYER}embed_tokens.weight", f"{LAYER}shared_head.head.weight"}  # of what is trained
    assert len(changed) > 3 and not {name for name in changed - copies if name.startswith(LAYER)}
    assert not [name for name in read_rows(tmp_path)[0] if "prediction" in name]
    told = "n_prediction_layers: 1 of the model are not trained here, and saved as they are"
    assert (told in (tmp_path / "rank-0.log").read_text()) == (command == "finetune_lora")


@pytest.mark.slow
def test_a_run_broken_off_and_resumed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings: dict[str, Any] = {f"model_config__{key}": value for key, value in DEEPSEEK.items()}
    settings |= {"train__lr_decay_steps": 20, "train__save_interval": 10, "moe__router_bias_update_rate": 0.01}
    whole = trained(tmp_path / "whole", **settings, train__max_steps=20)
    trained(tmp_path / "broken", **settings, train__max_steps=10)
    rest = trained(tmp_path / "broken", **settings, train__max_steps=20, resume=True)
    assert {step: whole[step] for step in range(11, 21)} == {step: rest[step] for step in range(11, 21)}
    first, second = (weights(tmp_path / name / "out/final") for name in ("whole", "broken"))
    assert first.keys() == second.keys() and f"{LAYER}eh_proj.weight" in first
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_without_effect_are_refused() -> None:
    with_layer, without = Config(n_prediction_layers=1), Config()
    weight = LossArgs(prediction_weight=0.3)
    with pytest.raises(UserError, match=r"weight: 0\.3 has no effect with a model without prediction layers"):
        check_predictions(Pretrain("pythia-14m", loss=weight), without, adapted=False)
    with pytest.raises(UserError, match=r"prediction_weight: 0\.3 has no effect with an adapter, which leaves"):
        check_predictions(FinetuneLora(Path("x"), loss=weight), with_layer, adapted=True)
    with pytest.raises(UserError, match=r"random initial values; set model_config\.n_prediction_layers: 0"):
        check_predictions(Pretrain("pythia-14m", loss=LossArgs(prediction_weight=0)), with_layer, adapted=False)
    check_predictions(Pretrain("pythia-14m", loss=weight), with_layer, adapted=False)
