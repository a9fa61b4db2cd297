"""The training loop: step, log, evaluate, save, until a limit is reached or a signal arrives."""

import itertools
from collections.abc import Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.files import write_json
from litgpt.model.flops import compute_training_flops
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.parallel.stacks import StackReport
from litgpt.parallel.strategy import is_rank_zero
from litgpt.phases import phase
from litgpt.store.collectives_io import get_rank
from litgpt.store.step_folders import get_step_folder
from litgpt.train.best_metric import BestMetric
from litgpt.train.build_state import is_compiled
from litgpt.train.console import RunConsole, RunSummary, render_validation
from litgpt.train.data_report import DATA_REPORT_FILE
from litgpt.train.evaluate import (
    TaskScorer,
    compute_task_scores,
    compute_validation_metrics,
    list_validation_metrics,
)
from litgpt.train.garbage_collection import GarbageCollection
from litgpt.train.guard import Guard, Interrupts
from litgpt.train.metrics import Meter, get_device_peak, get_peak_memory_gb
from litgpt.train.objective import Objective
from litgpt.train.optimizer import set_learning_rate
from litgpt.train.pace import Pace
from litgpt.train.profiler import StepProfiler
from litgpt.train.run_checkpoints import list_checkpoint_files
from litgpt.train.run_spec import admit_batch
from litgpt.train.samples import SampleWriter
from litgpt.train.schedule import list_step_limits
from litgpt.train.setup import Run
from litgpt.train.step import StepResult, Votes, compute_trained_norm, train_step


class Loop:
    """A run in progress, whose counters are saved in checkpoints."""

    def __init__(
        self, run: Run, objective: Objective, console: RunConsole, score_tasks: TaskScorer | None = None
    ) -> None:
        recipe = run.recipe
        self.score_tasks, self.scored_step = score_tasks, -1
        self.run, self.objective, self.console, self.train = run, objective, console, recipe.train
        self.interrupts = Interrupts(console.print)
        self.samples = SampleWriter(run, console.print)
        self.guard = Guard(recipe.guard)
        self.best = BestMetric(recipe.checkpoint.best, recipe.train.patience)
        self.best.check_metric(list_validation_metrics(objective))
        device = run.train_state.device
        peak = get_device_peak(device, recipe.precision or "bf16-mixed")
        self.meter = Meter(ranks=run.data.ranks, processes=run.ranks, peak=peak)
        self.pace = Pace(self.train.max_time)
        self.trained_shares = run.spec.measure_trained_shares()
        minutes = recipe.parallel.timeout_minutes
        self.stacks = StackReport(recipe.out_dir / "stacks", get_rank(), minutes=minutes, notify=console.print)
        self.last_loss: float | None = None
        self.reason = ""
        self.complete = False  # the run reached its end, so the model can be published
        progress = run.progress
        self.step = self.first_step = progress.get("step", 0)
        self.tokens = self.first_tokens = progress.get("tokens", 0)
        self.spikes = progress.get("spikes", 0)
        self.val_losses: dict[int, float] = {int(step): loss for step, loss in progress.get("val_losses", {}).items()}
        if progress:
            parts: dict[str, Any] = {"guard": self.guard, "meter": self.meter, "pace": self.pace}
            parts["scale"] = run.train_state.scale
            for name in parts.keys() & progress.keys():  # a state that `TrainableModel` has saved has no others
                parts[name].load_state_dict(progress[name])
            self.best.load_state_dict(progress.get("best"))
            run.checkpoints.best_step = self.best.step
        self.last_step = self.pace.estimate_last(self.step, 0.0)  # the same on all ranks, which must have equal rates
        if is_rank_zero():
            self.samples.remove_after(self.step)

    def progress(self) -> dict[str, Any]:
        """The progress of the run for a checkpoint; JSON values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "spikes": self.spikes,
            "val_losses": self.val_losses,
            "guard": self.guard.state_dict(),
            "best": self.best.state_dict(),
            "meter": self.meter.state_dict(),
            "pace": self.pace.state_dict(),
            "scale": self.run.train_state.scale.state_dict(),
            "stream": self.run.data.train.state_dict(),
        }

    def fit(self) -> None:
        """Train until a limit is reached or a signal is received; the last step is always saved."""
        run, recipe = self.run, self.run.recipe
        steps = recipe.profile.steps if is_rank_zero() else None
        profiler = StepProfiler(steps, recipe.out_dir / "profile", run.train_state.device, self.console.print)
        with self.console, GarbageCollection(self.train.gc_interval) as garbage, profiler, self.stacks:
            try:
                if self.is_evaluation_due():
                    self.evaluate()
                batches = iter(run.data.train)
                while not self.is_finished():
                    with self.open_step_phase(), profiler.profile_step(self.step + 1):
                        self.advance(batches)
                    garbage.collect(self.step)
                if self.complete and recipe.eval.final_validation and self.step not in self.val_losses:
                    self.evaluate()
                self.save(is_last=True)
                with self.meter.exclude("saving"), phase("saving"):
                    run.checkpoints.commit()
            except UserError:  # raised on all ranks, so all of them commit a pending checkpoint
                run.checkpoints.commit()
                raise
            finally:
                run.data.train.close()
        for logger in run.loggers:
            logger.finalize("success")

    def open_step_phase(self) -> AbstractContextManager[Any]:
        """A phase for the first step of this process, which may compile; later ones have the progress line."""
        if self.step > self.first_step:
            return nullcontext()
        compiled = is_compiled(self.run.recipe, self.run.train_state.device)
        return phase("the first step, which compiles the model" if compiled else "the first step")

    def is_evaluation_due(self) -> bool:
        """Whether to evaluate before the first step of this process: the run was interrupted instead, or is new."""
        settings = self.run.recipe.eval
        if not self.step:
            return settings.initial_validation and not self.val_losses
        has_validation = self.run.data.validation is not None
        return has_validation and self.step % settings.interval == 0 and self.step not in self.val_losses

    def advance(self, batches: Iterator[Any]) -> None:
        """Take one optimizer step, then log, evaluate and save at their intervals."""
        run = self.run
        rate = run.schedule.at(self.step, last=self.last_step)
        set_learning_rate(run.train_state.optimizers, rate / run.schedule.peak if run.schedule.peak else 0.0)
        run.train_state.begin_step(self.step)
        self.interrupts.activity = f"step {self.step + 1}"
        with self.stacks.limit_time(f"step {self.step + 1}"):
            with run.train_state.measure("data"):
                micro_batches, fault = self.next_batches(batches)
            result = train_step(
                run.train_state,
                micro_batches,
                self.objective,
                max_norm=self.train.max_norm,
                votes=self.cast_votes,
                fault=fault,
            )
        self.step += 1
        self.tokens += result.tokens
        self.record(result)
        votes = result.votes
        self.last_step = votes.last_step
        if run.checkpoints.is_pending and votes.checkpoint_written == run.ranks:
            run.checkpoints.commit()
        is_last = self.step == run.steps or votes.interrupted or votes.out_of_time
        is_logged = self.step % self.train.log_interval == 0 or is_last
        if is_logged:
            self.log(result, rate)
        if self.step % run.recipe.eval.interval == 0 and not votes.interrupted:
            self.evaluate()
            if self.best.is_exhausted and not is_logged:
                self.log(result, rate)
        if votes.interrupted or votes.out_of_time:
            self.reason = self.get_stop_reason(votes)
            self.complete = not votes.interrupted
        elif self.train.save_interval and self.step % self.train.save_interval == 0 and not is_last:
            self.save()  # the last step is saved after its evaluation, which is part of its progress
            self.stop_if_interrupted()

    def cast_votes(self) -> Votes:
        """The votes of this rank at the end of a step; a signal that arrives later ends the next step."""
        interrupted = self.interrupts.received is not None
        if not interrupted and self.step + 1 != self.run.steps:
            self.interrupts.activity = f"step {self.step + 2}"
        last_step = self.estimate_last_step(self.step + 1)
        return Votes(interrupted, self.is_out_of_time, self.run.checkpoints.is_written, last_step)

    def estimate_last_step(self, step: int) -> float:
        """When `train.max_time` will end the run, as the first rank estimates after `step` steps; 0 on the others."""
        return self.pace.estimate_last(step, self.meter.seconds) if is_rank_zero() else 0.0

    def stop_if_interrupted(self) -> None:
        """Stop before the next step if any rank received a signal, of which a step would know at its end only."""
        votes = [self.interrupts.received is not None, self.estimate_last_step(self.step)]
        interrupted, self.last_step = all_reduce_sum(votes, self.run.train_state.device)
        if interrupted and not self.reason:
            self.reason = self.get_stop_reason(Votes(interrupted=int(interrupted)))

    def next_batches(self, batches: Iterator[Any]) -> tuple[list[Batch], UserError | None]:
        """Read the micro-batches of a step; returns none, and the error, if that fails."""
        try:
            micro_batches = list(itertools.islice(batches, self.run.data.micro_batches))
            micro_batches = [admit_batch(batch, self.run.spec) for batch in micro_batches]
        except UserError as error:  # other ranks may have no error, and must stop before the forward pass
            return [], error
        return micro_batches, None

    @property
    def is_out_of_time(self) -> bool:
        """Whether `train.max_time` has passed."""
        return self.train.max_time is not None and self.meter.seconds >= self.train.max_time

    def get_stop_reason(self, votes: Votes) -> str:
        """The reason why the run stops before the last step."""
        if received := self.interrupts.received:
            return f"{received.name} received; set resume: auto to continue"
        if votes.out_of_time:
            return f"train.max_time: {self.train.max_time:g} s have passed"
        return "another rank received a signal"

    def is_finished(self) -> bool:
        """Whether the run has ended, after all its steps or before."""
        steps = self.run.steps
        if not self.reason and steps is not None and self.step >= steps:
            data = self.run.data
            answers = self.run.spec.data.answers_per_sample
            limits = list_step_limits(self.train, data.sequence_length, data.train.samples_per_epoch, answers=answers)
            lowest = min(limits, key=lambda key: limits[key])
            self.reason, self.complete = f"{lowest}: all {steps:,} steps are done", True
        if not self.reason and self.best.is_exhausted:
            self.reason, self.complete = self.best.get_stop_reason(), True
        return bool(self.reason)

    def record(self, result: StepResult) -> None:
        """Update the guard, the loss scale and the meter after a step."""
        run, scale = self.run, self.run.train_state.scale
        if not result.skipped:
            self.last_loss = result.loss
            scale.update(finite=True)
            if spike := self.guard.record(self.step, result.loss):
                self.spikes += 1
                self.console.print(spike)
        elif scale.update(finite=False):
            self.console.print(f"step {self.step} skipped: fp16 overflow; loss scale now {scale.factor:g}")
        else:
            self.console.print(self.guard.skip(self.step, loss=result.loss, gradient_norm=result.gradient_norm))
        samples, tokens = self.train.global_batch_size, result.tokens
        flops = compute_training_flops(
            run.spec.config,
            tokens=tokens,
            sequence_length=tokens // samples,
            trained=self.trained_shares,
            media=result.media,
        )
        ranks, batches = run.data.ranks, run.data.micro_batches
        self.meter.update(samples=samples // ranks, tokens=tokens // ranks, flops=flops / run.ranks, batches=batches)
        self.pace.record(self.meter.seconds)

    def log(self, result: StepResult, rate: float) -> None:
        """Log the metrics of a step, and show them in the progress line."""
        rates = self.meter.rates()
        fraction = self.fraction()
        metrics: dict[str, float] = {
            "loss": result.loss,
            "iter": self.step * self.run.data.micro_batches,
            "step": self.step,
            "epoch": self.run.data.train.epoch,
            "learning_rate": rate,
            "tokens": self.tokens // self.run.data.ranks,
            "total_tokens": self.tokens,
            "grad_norm": result.gradient_norm,
            "skipped_steps": self.guard.skipped,
            "memory_gb": get_peak_memory_gb(self.run.train_state.device),
            **self.meter.totals(),
            **rates,
            **result.metrics,
        }
        if batches_per_sec := rates.get("device/batches_per_sec"):
            metrics["iter_time"] = 1 / batches_per_sec
        steps_left = None if self.run.steps is None else self.run.steps - self.step
        seconds_left = None if self.train.max_time is None else self.train.max_time - self.meter.seconds
        if self.run.train_state.timers is not None:
            metrics |= self.run.train_state.timers.read()
        if self.run.recipe.log.params_norm:
            metrics["params_norm"] = compute_trained_norm(self.run.train_state)
        if (remaining := self.meter.estimate_remaining(steps_left, seconds_left)) is not None:
            metrics["remaining_time"] = remaining
        self.log_metrics(metrics)
        self.console.update(metrics, fraction)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log a row of metrics with every logger."""
        for logger in self.run.loggers:
            logger.log_metrics(metrics, step=self.step)

    def fraction(self) -> float | None:
        """The fraction of the run that is done, by steps or by time, whichever is larger; None without a limit."""
        limits = ((self.step, self.run.steps), (self.meter.seconds, self.train.max_time))
        fractions = [done / limit for done, limit in limits if limit]
        return min(1.0, max(fractions)) if fractions else None

    def evaluate(self) -> None:
        """Compute the validation metrics and generate samples; saves a checkpoint if it is the best so far."""
        run, data, settings, is_best = self.run, self.run.data, self.run.recipe.eval, False
        logged: dict[str, float] = {}
        self.interrupts.activity = f"the evaluation after step {self.step}"
        with self.meter.exclude("evaluation"):
            if data.validation is not None:
                batches = (admit_batch(batch, run.spec) for batch in data.validation)
                size = len(data.validation) if isinstance(data.validation, Sized) else None
                logged = compute_validation_metrics(
                    run.train_state, batches, self.objective, max_iters=settings.max_iters, size=size
                )
                self.val_losses[self.step] = self.console.metrics["val_loss"] = logged["val_loss"]
                is_best = self.best.record(self.step, logged)
            if self.score_tasks is not None and data.tokenizer is not None and self.scored_step != self.step:
                self.scored_step = self.step
                logged |= compute_task_scores(run.train_state, data.tokenizer, self.score_tasks)
            if logged:
                self.log_metrics(logged | {"step": self.step})
                self.console.print(f"step {self.step}: {render_validation(logged)}")
            if settings.sample_prompt is not None and data.tokenizer is not None:
                prompt = data.tokenizer.encode(settings.sample_prompt).tolist()
                self.samples.write_text(self.step, prompt, settings.sample_tokens)
            if data.example_prompt and settings.max_new_tokens:
                self.samples.write_text(self.step, data.example_prompt, settings.max_new_tokens)
            if settings.max_new_tokens:
                self.samples.answer_questions(self.step, settings.max_new_tokens)
        if is_best:
            self.save()
        self.stop_if_interrupted()

    def save(self, *, is_last: bool = False) -> None:
        """Start to save a checkpoint of this step; `is_last` if no other step follows."""
        run = self.run
        self.interrupts.activity = f"the checkpoint of step {self.step}"
        files = list_checkpoint_files(
            run.recipe, run.spec, run.train_state, run.data.tokenizer_dir, run.data.prompt_files
        )
        with self.meter.exclude("saving"), phase("saving"):
            run.checkpoints.save(
                self.step,
                run.train_state.core,
                run.train_state.optimizers,
                self.progress(),
                files,
                is_best=self.best.step == self.step,
                is_last=is_last,
            )
        reports = {DATA_REPORT_FILE: run.data.train.report(), **run.train_state.reports()}  # on every rank
        for name, report in reports.items():
            if report and is_rank_zero():
                write_json(run.recipe.out_dir / name, report)

    def summary(self, final: Path | None, report: Path | None) -> RunSummary:
        """The results of the run; `final` is the folder of the finished model."""
        return RunSummary(
            reason=self.reason,
            steps=self.step,
            steps_run=self.step - self.first_step,
            tokens=self.tokens,
            tokens_run=self.tokens - self.first_tokens,
            tokens_per_sec=self.meter.mean_tokens_per_sec(),
            training_seconds=self.meter.training_seconds,
            other_seconds=self.meter.other_seconds,
            last_loss=self.last_loss,
            val_losses=self.val_losses,
            skipped_steps=self.guard.skipped,
            spikes=self.spikes,
            memory_gb=get_peak_memory_gb(self.run.train_state.device),
            checkpoint=get_step_folder(self.run.recipe.out_dir, self.step),
            best=self.best.describe(self.run.recipe.out_dir),
            uploads=tuple(uploads.describe() for uploads in self.run.checkpoints.uploads),
            final=final,
            report=report,
        )
