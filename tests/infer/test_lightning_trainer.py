"""`LLM` in a LightningModule: Lightning's Trainer trains it, and its checkpoints are loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from litgpt import LLM
from litgpt.data import SFTDataset, get_sft_collate_fn
from litgpt.errors import UserError
from litgpt.infer.lightning_trainer import load_trainer_weights
from tests.commands.test_finetune import write_base

ROWS = [{"instruction": f"How many are {n}?", "output": "There are many."} for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def build_module(folder: Path, trainer_ckpt: Path | None = None) -> Any:
    """A module of a user, as in LitGPT's documentation of its Python API."""
    import lightning as L

    class Finetuned(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.llm = LLM.load(folder, tokenizer_dir=folder, distribute=None)

        def setup(self, stage: str) -> None:  # noqa: ARG002
            self.llm.trainer_setup(trainer_ckpt=trainer_ckpt)

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            _, loss = self.llm(input_ids=batch["input_ids"], target_ids=batch["labels"])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            _, loss = self.llm(input_ids=batch["input_ids"], target_ids=batch["labels"])
            self.log("validation_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.llm.model.parameters(), lr=0.01, weight_decay=0.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
            return [optimizer], [scheduler]

    return Finetuned()


def fit(module: Any, folder: Path, epochs: int, **settings: Any) -> Any:
    import lightning as L

    data = SFTDataset(ROWS, module.llm.tokenizer, "alpaca", max_seq_length=200)
    loaders = [DataLoader(data, batch_size=4, collate_fn=get_sft_collate_fn(200)) for _ in range(2)]
    trainer = L.Trainer(
        devices=1,
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders, **settings)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightnings_trainer_trains_a_model_and_continues_from_its_checkpoints(base: Path, tmp_path: Path) -> None:
    module = build_module(base)
    before = {name: value.clone() for name, value in module.llm.state_dict().items()}
    trainer = fit(module, tmp_path, 2)
    assert module.llm.training and float(trainer.callback_metrics["validation_loss"]) < 5.5
    trained = module.llm.state_dict()
    assert not any(torch.equal(before[name], trained[name]) for name in before if name.endswith("q.weight"))
    module.llm.model.to(module.llm.preprocessor.device)
    ids = module.llm.preprocessor.encode("There")
    assert module.llm.preprocessor.decode(ids) == "There" and isinstance(module.llm.generate("There"), str)
    checkpoint = tmp_path / "model.ckpt"
    trainer.save_checkpoint(checkpoint)
    other = build_module(base, checkpoint)
    other.setup("fit")
    assert all(torch.equal(value, trained[name]) for name, value in other.llm.state_dict().items())
    fit(module := build_module(base), tmp_path, 3, ckpt_path=checkpoint, weights_only=False)
    assert module.trainer.global_step == 6


def test_weights_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    llm = LLM.load(base, distribute=None)
    state = {f"lit.net.{name}": value for name, value in llm.state_dict().items()}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {name: value + 1 for name, value in state.items()}}, path)
    expected = {name: value + 1 for name, value in llm.state_dict().items()}
    load_trainer_weights(llm.model, path)
    assert all(torch.equal(value, expected[name]) for name, value in llm.state_dict().items())
    for content, message in (
        ({"state_dict": {"other": torch.ones(1)}}, "has no embedding.weight"),
        ({"state_dict": {**state, "lit.net.norm.weight": torch.ones(3)}}, r"has shape \[3\] of norm.weight, which is"),
        ([1], "has no embedding.weight"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            llm.trainer_setup(path)
    with pytest.raises(UserError, match="no such file"):
        llm.trainer_setup(tmp_path / "none.ckpt")
