"""`litgpt pretrain`: train a model on text, from scratch or from the weights of another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from litgpt.commands.report import write_report
from litgpt.parallel.strategy import is_first, leave
from litgpt.parallel.watch import naming_the_lost
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.training import Training
from litgpt.store.published import save_model
from litgpt.train.live import Live, end_report
from litgpt.train.loop import Loop
from litgpt.train.objective import next_token
from litgpt.train.origin import Origin, of_pretraining
from litgpt.train.setup import Run, build


def run(recipe: Pretrain) -> None:
    """Build the run, train, publish the finished model, and say how it went."""
    train(recipe, of_pretraining(recipe), publish)


def train(recipe: Training, origin: Origin, publish: Callable[[Run], Path]) -> None:
    """Train from an origin by next tokens; `publish` writes the finished model and names its folder."""
    live = Live()
    with naming_the_lost():
        trained = build(recipe, origin, next_token(recipe.loss), live.say)
        live.enabled = is_first()
        live.total_steps = trained.steps if trained.steps < 2**62 else None
        loop = Loop(trained, live)
        loop.fit()
        final = publish(trained) if loop.complete else None
    if is_first():
        report = write_report(recipe.out_dir)
        live.say(end_report(replace(loop.outcome(final), report=report)))
    leave(0)


def publish(trained: Run) -> Path:
    """Write the finished model as a folder that transformers loads; every rank takes part."""
    folder = trained.recipe.out_dir / "final"
    save_model(folder, trained.trainee.core, config=trained.config, tokenizer_dir=trained.tokenizer_dir, replace=True)
    return folder
