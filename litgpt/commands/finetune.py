"""`litgpt finetune` and its relatives: train a model on conversations, all of its weights or an adapter beside them."""

import sys
from functools import partial
from pathlib import Path

import torch

from litgpt import adapt
from litgpt.commands.pretrain import train
from litgpt.errors import UserError
from litgpt.infer.load import find_folder, inside_run
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import full
from litgpt.parallel.strategy import is_first
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.tuner import Tuner
from litgpt.store import adapters
from litgpt.store.published import save_model
from litgpt.train.origin import Origin, of_finetuning
from litgpt.train.setup import Run


def run(recipe: Finetune) -> None:
    """Find the model, train, publish the finished one and its adapter, and say how it went."""
    folder = inside_run(find_folder(recipe.checkpoint_dir, access_token=recipe.access_token))
    origin = of_finetuning(recipe, folder)
    train(recipe, origin, partial(publish, origin=origin, base=recipe.checkpoint_dir))


def publish(trained: Run, *, origin: Origin, base: Path) -> Path:
    """Write the finished model, with what was adapted folded in, and the adapter alone; every rank takes part."""
    out_dir, core = trained.recipe.out_dir, trained.trainee.core
    assert isinstance(core, GPT)
    save_model(
        out_dir / "final",
        adapt.merged(core),
        config=trained.config,
        tokenizer_dir=trained.tokenizer_dir,
        replace=True,
    )
    if is_first():
        origin.data.mark(out_dir / "final")
    if origin.adapted and origin.tuner:
        save_adapter(out_dir / "adapter", trained, origin.tuner, str(base))
    return out_dir / "final"


@torch.no_grad()
def save_adapter(folder: Path, trained: Run, settings: Tuner, base: str) -> None:
    """Write the adapter as a folder that PEFT loads; where PEFT has no form for it, say so: it is in the model too."""
    core = trained.trainee.core
    assert isinstance(core, GPT)
    tensors = {name: full(one.detach()).to("cpu") for name, one in adapt.adapter_tensors(core).items()}
    if not is_first():
        return
    try:
        adapters.save(folder, tensors, config=trained.config, settings=settings, base=base, replace=True)
    except UserError as error:
        print(f"{folder}: no adapter written ({error}); the finished model has it folded in", file=sys.stderr)
