"""`litgpt finetune` and its variants: finetune a model on conversations, its own weights or an adapter."""

from pathlib import Path

import torch

from litgpt import adapt
from litgpt.errors import UserError
from litgpt.finetune_spec import find_spec
from litgpt.infer.tasks import build_task_scorer
from litgpt.messages import print_message
from litgpt.parallel.apply import full_tensor
from litgpt.parallel.strategy import is_rank_zero
from litgpt.recipe.finetune import Finetune
from litgpt.store.adapters.folder import save_adapter_folder
from litgpt.store.save_model import gather_stages, save_model
from litgpt.train.run import train
from litgpt.train.setup import Run


def run(recipe: Finetune) -> None:
    """Find the model, finetune it, and save it and its adapter."""
    train(recipe, find_spec(recipe), publish, build_task_scorer(recipe.eval))


def publish(trained: Run) -> Path:
    """Write the finished model with the adapter merged, and the adapter separately; called on every rank.

    If the adapter cannot be merged, its folder, which names the base, is written as the finished model.
    """
    final, spec, core = trained.recipe.out_dir / "final", trained.spec, trained.train_state.core
    if spec.tuner is None or spec.tuner.merges:
        save_model(
            final,
            core,
            tensors=adapt.merge_adapter(core),
            config=spec.config,
            tokenizer_dir=trained.data.tokenizer_dir,
            prompt_files=trained.data.prompt_files,
            replace=True,
        )
    if spec.tuner is not None and spec.adapted:
        save_adapter(trained.recipe.out_dir / "adapter" if spec.tuner.merges else final, trained)
    return final


@torch.no_grad()
def save_adapter(folder: Path, trained: Run) -> None:
    """Write the adapter as a folder that PEFT loads; without a format in PEFT it is only in the merged model."""
    spec, core = trained.spec, trained.train_state.core
    assert spec.tuner is not None
    local = ((name, full_tensor(tensor.detach())) for name, tensor in adapt.get_adapter_parameters(core).items())
    tensors = {name: tensor.to("cpu") for name, tensor in gather_stages(core, local)}
    if not is_rank_zero():
        return
    try:
        save_adapter_folder(
            folder,
            tensors,
            config=spec.config,
            settings=spec.tuner,
            base=spec.base,
            base_settings=spec.base_settings,
            changes=spec.base_changes,
            tokenizer_dir=trained.data.tokenizer_dir,
            prompt_files=trained.data.prompt_files,
            replace=True,
        )
    except UserError as error:
        if not spec.tuner.merges:
            raise
        print_message(f"{folder}: adapter not written ({error}); the finished model has it merged")
