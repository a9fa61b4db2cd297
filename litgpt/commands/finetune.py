"""`litgpt finetune` and its relatives: train a model on conversations, all of its weights or an adapter beside them."""

from functools import partial
from pathlib import Path

import torch

from litgpt import adapt
from litgpt.commands.pretrain import train
from litgpt.infer.load import find_folder
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import full
from litgpt.parallel.strategy import is_first
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.tuner import LoRA, Tuner
from litgpt.store import adapters
from litgpt.store.published import save_model
from litgpt.train.origin import of_finetuning
from litgpt.train.setup import Run


def run(recipe: Finetune) -> None:
    """Find the model, train, publish the finished one and its adapter, and say how it went."""
    folder = find_folder(recipe.checkpoint_dir, access_token=recipe.access_token)
    train(recipe, of_finetuning(recipe, folder), partial(publish, tuner=recipe.tuned, base=recipe.checkpoint_dir))


def publish(trained: Run, *, tuner: Tuner, base: Path) -> Path:
    """Write the finished model, with what was adapted folded in, and LoRA's own numbers; every rank takes part."""
    out_dir, core = trained.recipe.out_dir, trained.trainee.core
    assert isinstance(core, GPT)
    if isinstance(tuner, LoRA):
        save_adapter(out_dir / "adapter", trained, tuner, str(base))
    save_model(
        out_dir / "final",
        adapt.merged(core),
        config=trained.config,
        tokenizer_dir=trained.tokenizer_dir,
        replace=True,
    )
    return out_dir / "final"


@torch.no_grad()
def save_adapter(folder: Path, trained: Run, settings: LoRA, base: str) -> None:
    """Write the adapter as a folder that PEFT loads."""
    core = trained.trainee.core
    assert isinstance(core, GPT)
    tensors = {name: full(one.detach()).to("cpu") for name, one in adapt.adapter_tensors(core).items()}
    if is_first():
        adapters.save(folder, tensors, config=trained.config, settings=settings, base=base, replace=True)
