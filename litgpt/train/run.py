"""Run training from a spec to the finished model."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from litgpt.code_pages import return_code_pages
from litgpt.host_allocator import return_freed_memory
from litgpt.parallel.heartbeat import report_lost_ranks
from litgpt.parallel.strategy import exit_process, is_rank_zero
from litgpt.phases import phase, show_phases
from litgpt.recipe.align import Align
from litgpt.recipe.training import Training
from litgpt.train.answer_scores import AnswerScorer
from litgpt.train.console import RunConsole, render_summary
from litgpt.train.evaluate import TaskScorer
from litgpt.train.gradient_init import initialize_by_gradient
from litgpt.train.loop import Loop
from litgpt.train.objectives import build_objective
from litgpt.train.reference_pass import store_reference_scores
from litgpt.train.report import list_metrics_files, write_report
from litgpt.train.run_record import record_run
from litgpt.train.run_spec import RunSpec
from litgpt.train.setup import Run, build
from litgpt.train.torch_backends import select_backends


def store_scores(trained: Run) -> None:
    """Compute the scores of the reference before the first step, if the settings say so."""
    if trained.spec.scores_ahead:
        recipe = cast(Align, trained.recipe)
        store_reference_scores(trained, AnswerScorer(recipe.loss, recipe.preference.ld_alpha))


def train(
    recipe: Training, spec: RunSpec, publish: Callable[[Run], Path], score_tasks: TaskScorer | None = None
) -> None:
    """Train with the objective of the recipe, and print a summary; on failure all processes of the run stop.

    Args:
        publish: writes the finished model and returns its folder; called on every rank.
        score_tasks: the scores of `eval.tasks`; None for none.
    """
    console = RunConsole(enabled=is_rank_zero())
    backends = select_backends(deterministic=recipe.deterministic, attention=recipe.attention)
    with report_lost_ranks(), show_phases(console.show_phase), backends, ExitStack() as ends:
        trained = build(recipe, spec, console.print, ends)
        console.total_steps = trained.steps
        store_scores(trained)
        objective = build_objective(recipe, spec, trained.data.train.channels)
        initialize_by_gradient(trained, objective)
        loop = Loop(trained, objective, console, score_tasks)
        return_freed_memory()  # that of reading the data
        return_code_pages()
        with loop.interrupts.handle_signals():
            with record_run(trained, loop):
                loop.fit()
            return_freed_memory()
            loop.interrupts.activity = "the final model" if loop.complete else "the report"
            loop.interrupts.outcome = "ending"
            final = publish(trained) if loop.complete else None
            if console.enabled:
                out_dir = trained.recipe.out_dir
                with phase("writing the report"):  # a run that was downloaded, and takes no step, has no metrics
                    report = write_report(out_dir) if list_metrics_files(out_dir) else None
            loop.interrupts.activity = "the uploads"
            trained.checkpoints.finish_uploads()
            loop.interrupts.is_over = True
            if console.enabled:
                console.print(render_summary(loop.summary(final, report)))
    exit_process(0)
