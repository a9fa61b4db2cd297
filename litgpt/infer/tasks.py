"""Tasks of lm-eval: find them, and run them at the evaluations of training."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.evaluation_page import list_scores
from litgpt.model.gpt import GPT
from litgpt.recipe.commands import import_object
from litgpt.recipe.train import EvalArgs

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def open_tasks(names: Sequence[str], include_path: Path | None, prefix: str = "") -> "TaskManager":
    """The tasks of lm-eval with those of the user; only the latter if they are all that is needed, which is faster.

    Args:
        include_path: the folder of the user's tasks.
        prefix: what the key of the tasks begins with, for messages.

    Raises:
        UserError: if lm-eval is not installed, or a task or the user's folder is not found.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            f"{prefix}tasks: need lm-eval, which is not installed; run pip install 'litgpt[evaluate]'"
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include_path: {include_path} is not a folder; set one with YAML files of tasks")
    custom = TaskManager(include_path=include_path, include_defaults=False) if include_path and names else None
    if custom is not None and set(names) <= set(custom.all_tasks):
        return custom
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(
            f"{prefix}tasks: {unknown[0]} is not a task of lm-eval; litgpt evaluate FOLDER prints the names of all"
        )
    return manager


def build_task_scorer(settings: EvalArgs) -> Callable[[GPT, Tokenizer], dict[str, float]] | None:
    """A function that scores a model on the tasks of a recipe, None for a recipe without tasks.

    Raises:
        UserError: as `open_tasks`.
    """
    if settings.tasks is None:
        return None
    tasks = open_tasks(settings.task_names, settings.task_path, "eval.")
    return partial(score_tasks, settings, tasks)


def score_tasks(settings: EvalArgs, tasks: "TaskManager", model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    """The scores of a model that is being trained, by `task/metric`; without a chat template."""
    from lm_eval import simple_evaluate

    model_class = import_object("litgpt.infer.harness:HarnessModel")
    results = simple_evaluate(
        model=model_class(model, tokenizer, None, reorder=False),
        tasks=tasks.match_tasks(settings.task_names),
        limit=settings.task_limit,
        task_manager=tasks,
        log_samples=False,
        random_seed=None,  # generators that training uses stay as they are
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=1234,
    )
    scores = list_scores(results or {})
    return {f"{score.task}/{score.metric}": score.value for score in scores if isinstance(score.value, float)}
