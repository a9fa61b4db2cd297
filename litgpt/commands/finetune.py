"""`litgpt finetune` and its relatives: train a model on conversations, all of its weights or an adapter beside them."""

import sys
from functools import partial
from pathlib import Path

import torch

from litgpt import adapt
from litgpt.errors import UserError
from litgpt.infer.load import find_folder, resolve_model_folder
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import full_tensor
from litgpt.parallel.strategy import is_rank_zero
from litgpt.recipe.finetune import Finetune
from litgpt.store.adapters.folder import save_adapter_folder
from litgpt.store.save_model import gather_stages, save_model
from litgpt.train.run import train
from litgpt.train.run_spec import RunSpec, build_finetune_spec
from litgpt.train.setup import Run


def run(recipe: Finetune) -> None:
    """Find the model, train, publish the finished one and its adapter, and say how it went."""
    found = find_folder(recipe.checkpoint_dir, access_token=recipe.access_token)
    folder = resolve_model_folder(found)
    base = str(recipe.checkpoint_dir if folder == found else folder)
    spec = build_finetune_spec(recipe, folder, base, adapter=adapter_for(recipe))
    train(recipe, spec, partial(publish, spec=spec))


def adapter_for(recipe: Finetune) -> Path | None:
    """The folder of the adapter whose training goes on: of a run, its newest one."""
    if recipe.initial_adapter is None:
        return None
    try:
        return resolve_model_folder(find_folder(recipe.initial_adapter, access_token=recipe.access_token))
    except UserError as error:
        raise UserError(f"initial_adapter_dir: {error.detail}") from None


def publish(trained: Run, *, spec: RunSpec) -> Path:
    """Write the finished model, with what was adapted folded in, and the adapter alone; every rank takes part.

    What cannot be folded in is the finished model by itself: an adapter's folder, which names its base.
    """
    final, core = trained.recipe.out_dir / "final", trained.train_state.core
    assert isinstance(core, GPT)
    if spec.tuner is None or spec.tuner.merges:
        tensors, texts = adapt.merge_adapter(core), trained.tokenizer_dir
        save_model(final, core, tensors=tensors, config=trained.config, tokenizer_dir=texts, replace=True)
        if is_rank_zero():
            spec.data.save_prompt_format(final)
    if spec.tuner is not None and spec.adapted:
        save_adapter(trained.recipe.out_dir / "adapter" if spec.tuner.merges else final, trained, spec)
    return final


@torch.no_grad()
def save_adapter(folder: Path, trained: Run, spec: RunSpec) -> None:
    """Write the adapter as a folder that PEFT loads; where PEFT has no form for it, say so: it is in the model too."""
    core = trained.train_state.core
    assert isinstance(core, GPT) and spec.tuner is not None
    own = ((name, full_tensor(one.detach())) for name, one in adapt.get_adapter_parameters(core).items())
    tensors = {name: one.to("cpu") for name, one in gather_stages(core, own)}
    if not is_rank_zero():
        return
    about = {"config": trained.config, "settings": spec.tuner, "base": spec.base, "base_precision": spec.base_precision}
    try:
        save_adapter_folder(folder, tensors, **about, tokenizer_dir=trained.tokenizer_dir, replace=True)  # type: ignore
        spec.data.save_prompt_format(folder)
    except UserError as error:
        if not spec.tuner.merges:
            raise
        print(f"{folder}: no adapter written ({error}); the finished model has it folded in", file=sys.stderr)
