"""The one loop: step, log, evaluate, save, and leave when it is time."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from litgpt.data.render.prompt_styles import PROMPT_STYLE_FILE as STYLE
from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.files import write_json, write_text
from litgpt.model.flops import compute_training_flops
from litgpt.parallel.strategy import is_rank_zero
from litgpt.recipe.to_yaml import dump_recipe
from litgpt.store.tokenizer_files import find_tokenizer_files
from litgpt.train.console import RunConsole, RunSummary
from litgpt.train.evaluate import generate_sample, validation_loss
from litgpt.train.guard import Guard, Interrupts, perplexity
from litgpt.train.metrics import Meter, device_peak, memory_gb
from litgpt.train.optimizer import set_learning_rate
from litgpt.train.setup import Run
from litgpt.train.step import StepResult, train_step


def drop_samples_after(path: Path, step: int) -> None:
    """Forget texts that the model wrote after `step`, in a run that goes on from there or starts anew."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and step and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))


def refuse_unknown_tokens(batches: list[Batch], rows: int) -> None:
    """Refuse tokens that the embedding has no row for, as another tokenizer's data may hold.

    Raises:
        UserError: naming the largest token.
    """
    largest = max(int(max(batch.ids.max(), batch.labels.max())) for batch in batches)
    if largest >= rows:
        raise UserError(
            f"data: holds token {largest}, but the model has {rows} rows; use the tokenizer that the data was made "
            f"with, or set model_config.padded_vocab_size: {largest + 1} or more"
        )


class Loop:
    """The state of a run in progress, as far as a checkpoint must know it."""

    def __init__(self, run: Run, console: RunConsole) -> None:
        recipe = run.recipe
        self.run, self.console, self.train = run, console, recipe.train
        self.interrupts = Interrupts()
        self.guard = Guard(recipe.guard)
        device = run.train_state.device
        self.meter = Meter(ranks=run.data_ranks, peak=device_peak(device, recipe.precision or "bf16-mixed"))
        self.step = self.first_step = 0
        self.tokens = self.first_tokens = 0
        self.spikes = 0
        self.last_loss: float | None = None
        self.val_losses: dict[int, float] = {}
        self.reason = ""
        self.complete = False  # ended by itself, so that the model can be published
        self._restore(run.progress)
        if is_rank_zero():
            drop_samples_after(recipe.out_dir / "samples.jsonl", self.step)

    def _restore(self, progress: dict[str, Any]) -> None:
        if not progress:
            return
        self.step = self.first_step = progress["step"]
        self.tokens = self.first_tokens = progress["tokens"]
        self.spikes = progress["spikes"]
        self.val_losses = {int(step): loss for step, loss in progress["val_losses"].items()}
        self.guard.load_state_dict(progress["guard"])
        self.meter.load_state_dict(progress["meter"])
        self.run.train_state.scale.load_state_dict(progress["scale"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights, moments and random generators."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "spikes": self.spikes,
            "val_losses": self.val_losses,
            "guard": self.guard.state_dict(),
            "meter": self.meter.state_dict(),
            "scale": self.run.train_state.scale.state_dict(),
            "stream": self.run.stream.state_dict(),
        }

    def fit(self) -> None:
        """Train until a limit is reached or someone asks to leave; the last step is always saved."""
        run, recipe = self.run, self.run.recipe
        with self.interrupts.watched(), self.console:
            try:
                if recipe.eval.initial_validation and not self.step:
                    self.evaluate()
                batches = iter(run.stream)
                while not self.finished():
                    self.advance(batches)
                if self.complete and recipe.eval.final_validation and self.step not in self.val_losses:
                    self.evaluate()
                with self.meter.apart("saving"):
                    self.save()
                    run.checkpoints.commit()
            except UserError:  # raised on all ranks alike, so that all can bring an open checkpoint to its end
                run.checkpoints.commit()
                raise
            finally:
                run.stream.close()
        for logger in run.loggers:
            logger.finalize("success")

    def advance(self, batches: Iterator[Any]) -> None:
        """One optimizer step and what is due after it."""
        run = self.run
        rate = run.schedule.at(self.step)
        set_learning_rate(run.train_state.optimizers, rate / run.schedule.peak if run.schedule.peak else 0.0)
        run.train_state.set_active(self.step)
        taken, fault = self.next_batches(batches)
        result = train_step(
            run.train_state,
            taken,
            run.objective,
            max_norm=self.train.max_norm,
            flags=(self.interrupts.received is not None, self.late(), run.checkpoints.is_written),
            channels=len(run.channels),
            fault=fault,
        )
        self.step += 1
        self.tokens += result.tokens
        self.count(result)
        interrupted, late, written = result.asked
        if run.checkpoints.is_pending and written == run.ranks:
            run.checkpoints.commit()
        if self.step % self.train.log_interval == 0:
            self.log(result, rate)
        if self.step % run.recipe.eval.interval == 0:
            self.evaluate()
        if interrupted or late:
            self.reason, self.complete = self.why_left(late=bool(late)), not interrupted
        elif self.train.save_interval and self.step % self.train.save_interval == 0:
            with self.meter.apart("saving"):
                self.save()

    def next_batches(self, batches: Iterator[Any]) -> tuple[list[Batch], UserError | None]:
        """The micro-batches of a step; none, and why, if the data cannot give them."""
        try:
            taken = list(itertools.islice(batches, self.run.micro_batches))
            refuse_unknown_tokens(taken, self.run.config.padded_vocab_size or 0)
        except UserError as error:  # the other ranks may have theirs, and must hear of it before they compute
            return [], error
        return taken, None

    def late(self) -> bool:
        """Whether the time that the recipe allows has passed."""
        return self.train.max_time is not None and self.meter.seconds >= self.train.max_time

    def why_left(self, *, late: bool) -> str:
        """The reason for leaving before the last step."""
        if late and not self.interrupts.received:
            return f"train.max_time: {self.train.max_time:g} s have passed"
        received = self.interrupts.received
        return f"{received.name} received; set resume: auto to go on" if received else "another rank was asked to stop"

    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        if not self.reason and self.step >= self.run.steps:
            self.reason, self.complete = f"all {self.run.steps:,} steps are done", True
        return bool(self.reason)

    def count(self, result: StepResult) -> None:
        """Book a step with the guard and the meter."""
        run = self.run
        if result.taken:
            self.last_loss = result.loss
            run.train_state.scale.update(finite=True)
            if spike := self.guard.take(self.step, result.loss):
                self.spikes += 1
                self.console.print(spike)
        elif run.train_state.scale.update(finite=False):
            self.console.print(
                f"step {self.step} skipped: fp16 overflow; loss scale now {run.train_state.scale.factor:g}"
            )
        else:
            self.console.print(self.guard.skip(self.step, loss=result.loss, gradient_norm=result.gradient_norm))
        samples, tokens = self.train.global_batch_size // run.data_ranks, result.tokens // run.data_ranks
        length = result.tokens // self.train.global_batch_size
        self.meter.update(
            samples=samples,
            tokens=tokens,
            batches=run.micro_batches,
            flops=compute_training_flops(
                run.config, tokens=result.tokens // run.ranks, sequence_length=length, frozen=run.adapted
            ),
        )

    def log(self, result: StepResult, rate: float) -> None:
        """Send a step's figures to the loggers and the progress line."""
        rates = self.meter.rates()
        fraction = self.fraction()
        metrics: dict[str, float] = {
            "loss": result.loss,
            "iter": self.step * self.run.micro_batches,
            "step": self.step,
            "epoch": self.run.stream.epoch,
            "learning_rate": rate,
            "tokens": self.tokens // self.run.data_ranks,
            "total_tokens": self.tokens,
            "grad_norm": result.gradient_norm,
            "skipped_steps": self.guard.skipped,
            "memory_gb": memory_gb(self.run.train_state.device),
            **self.meter.totals(),
            **rates,
        }
        for name, loss in zip(self.run.channels, result.channels, strict=True):
            if not math.isnan(loss):
                metrics[f"loss_{name}"] = loss
        if per_second := rates.get("device/batches_per_sec"):
            metrics["iter_time"] = 1 / per_second
        if (left := self.meter.remaining(fraction)) is not None:
            metrics["remaining_time"] = left
        self.send(metrics)
        self.console.update(metrics, fraction)

    def send(self, metrics: dict[str, float]) -> None:
        """Hand a row of figures to every logger."""
        for logger in self.run.loggers:
            logger.log_metrics(metrics, step=self.step)

    def fraction(self) -> float | None:
        """The share of the run that is done, by steps or by time, whichever is further."""
        shares = [self.step / self.run.steps] if self.run.steps < 2**62 else []
        if self.train.max_time:
            shares.append(self.meter.seconds / self.train.max_time)
        return min(1.0, max(shares)) if shares else None

    def evaluate(self) -> None:
        """Measure the validation loss and let the model write."""
        run, settings = self.run, self.run.recipe.eval
        with self.meter.apart("evaluation"):
            if run.validation is not None:
                loss = validation_loss(run.train_state, run.validation, run.objective, max_iters=settings.max_iters)
                self.val_losses[self.step] = loss
                self.send({"val_loss": loss, "val_ppl": perplexity(loss), "step": self.step})
                self.console.print(f"step {self.step}: val loss {loss:.4f}, val ppl {perplexity(loss):.1f}")
                self.console.metrics["val_loss"] = loss
            if settings.sample_prompt is not None and run.tokenizer is not None:
                self.write_sample(run.tokenizer.encode(settings.sample_prompt).tolist(), settings.sample_tokens)
            if run.question and settings.max_new_tokens:
                self.write_sample(run.question, settings.max_new_tokens)

    def write_sample(self, prompt: list[int], tokens: int) -> None:
        """Let the model go on after a prompt, show the text and keep it in `samples.jsonl`."""
        run = self.run
        assert run.tokenizer is not None
        start = prompt or [run.tokenizer.bos_id or run.tokenizer.eos_id or 0]
        new = generate_sample(
            run.train_state,
            start,
            max_new_tokens=tokens,
            window=run.sequence_length,
            seed=run.recipe.seed,
            stop_tokens=run.tokenizer.stop_ids,
        )
        if is_rank_zero():
            text = run.tokenizer.decode(start + new)
            self.console.print(f"step {self.step}: {text}")
            line = {"step": self.step, "prompt": run.tokenizer.decode(prompt), "text": text}
            with (run.recipe.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
                print(json.dumps(line), file=file)

    def save(self) -> None:
        """Begin a checkpoint of this step."""
        run = self.run
        files: dict[str, str | Path] = {
            "recipe.yaml": dump_recipe(run.recipe),
            "model_config.yaml": yaml.safe_dump(run.config.to_dict()),
        }
        if run.tokenizer_dir:
            files |= find_tokenizer_files(run.tokenizer_dir)
        if (style := run.recipe.out_dir / STYLE).is_file():
            files[STYLE] = style
        files |= run.notes
        run.checkpoints.save(self.step, run.train_state.core, run.train_state.optimizers, self.state(), files)
        # of rows that are read on the way, if they are; every rank takes part
        report = run.stream.report()
        if report and is_rank_zero():
            write_json(run.recipe.out_dir / "data_report.json", report)

    def summary(self, final: Path | None) -> RunSummary:
        """The results of the run."""
        best = min(self.val_losses, key=lambda step: self.val_losses[step], default=None)
        last = max(self.val_losses, default=None)
        return RunSummary(
            reason=self.reason,
            steps=self.step,
            steps_run=self.step - self.first_step,
            tokens=self.tokens,
            tokens_run=self.tokens - self.first_tokens,
            training_seconds=self.meter.training_seconds,
            apart_seconds=self.meter.apart_seconds,
            last_loss=self.last_loss,
            last_val_loss=None if last is None else self.val_losses[last],
            best_val_loss=None if best is None else self.val_losses[best],
            best_val_step=best,
            skipped_steps=self.guard.skipped,
            spikes=self.spikes,
            memory_gb=memory_gb(self.run.train_state.device),
            checkpoints=self.run.recipe.out_dir / f"step-{self.step:08d}",
            final=final,
        )
