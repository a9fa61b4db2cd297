"""`litgpt pretrain`: train a model on text, from scratch or from the weights of another."""

from pathlib import Path

from litgpt.infer.tasks import build_task_scorer
from litgpt.recipe.pretrain import Pretrain
from litgpt.store.save_model import save_model
from litgpt.train.run import train
from litgpt.train.run_spec import build_pretrain_spec
from litgpt.train.setup import Run


def run(recipe: Pretrain) -> None:
    """Train a model and save it."""
    train(recipe, build_pretrain_spec(recipe), publish, build_task_scorer(recipe.eval))


def publish(trained: Run) -> Path:
    """Write the finished model as a folder that transformers loads; called on every rank."""
    folder, core = trained.recipe.out_dir / "final", trained.train_state.core
    save_model(folder, core, config=trained.spec.config, tokenizer_dir=trained.data.tokenizer_dir, replace=True)
    return folder
