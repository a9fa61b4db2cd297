"""A model with its optimizer, for training loops of the user's own: gradients, steps, samples, checkpoints."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from litgpt.data.render.chat_template import read_template
from litgpt.data.stream.batch import Batch
from litgpt.data.stream.token_rows import Row, collate_token_rows, parse_token_row
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import check_unused, publish_folder
from litgpt.finetune_spec import find_spec
from litgpt.infer.engine import Engine
from litgpt.infer.load import find_format_folder
from litgpt.infer.prompt_files import WrittenText, generate_texts
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.prompts import PromptEncoder, find_prompt_style
from litgpt.infer.text_settings import prepare_texts
from litgpt.messages import print_message
from litgpt.parallel.apply import run_blocks_eagerly
from litgpt.parallel.fabric import Fabric
from litgpt.parallel.forward import run_split_model
from litgpt.parallel.precision import build_precision
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.parallel.strategy import MeshStrategy, is_rank_zero
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.from_yaml import read_yaml
from litgpt.recipe.paths import resolve_paths
from litgpt.recipe.training import Training
from litgpt.recipe.tuner import LoRA
from litgpt.store.checkpoint_load import find_checkpoint
from litgpt.store.collectives_io import raise_on_all_ranks
from litgpt.store.step_folders import get_step_folder
from litgpt.train.build_state import build_train_state
from litgpt.train.early_checks import check_trained_model
from litgpt.train.evaluate import eval_mode
from litgpt.train.gradient_addition import add_to_gradients
from litgpt.train.launch import launch
from litgpt.train.objective import Objective, next_token
from litgpt.train.objectives import LogProbLoss, build_objective, log_prob_loss
from litgpt.train.optimizer import set_learning_rate
from litgpt.train.run_checkpoints import list_checkpoint_files, open_checkpoints, restore
from litgpt.train.run_spec import RunSpec, admit_batch, build_pretrain_spec
from litgpt.train.setup import RunData, open_data
from litgpt.train.step import StepGradients, StepResult, add_gradients, apply_gradients
from litgpt.train.torch_backends import check_attention_kernel, select_backends

LOSS_TYPES = {"cross_entropy": "ce", "dft": "dft"}
"""The losses of next tokens that `forward_backward` has, and their names in a recipe."""


@dataclass(frozen=True)
class GradientResult:
    """Result of `forward_backward`; the same on every rank.

    Attributes:
        loss: the mean over the labels of this call in nats, or what the loss counts instead of labels.
        targets: labels that are not ignored.
        tokens: tokens read, without padding.
        metrics: means of the metrics of the loss.
    """

    loss: float
    targets: int
    tokens: int
    metrics: dict[str, float]


class TrainableModel:
    """A model as `litgpt finetune` and the other commands train it, whose steps the caller takes.

    Created by `TrainableModel.open`. With several processes, all ranks make the same calls.

    Attributes:
        recipe: the settings.
        step: the number of optimizer steps.
        tokens: the number of tokens read in these steps, without padding, over all data ranks.
    """

    def __init__(self, recipe: Training, spec: RunSpec) -> None:
        check_trainable(recipe, spec)
        self.recipe, self.spec = recipe, spec
        self.sequence_length = check_trained_model(recipe, spec.config, adapted=spec.adapted)
        self._fabric: Fabric = launch(recipe)
        self._mesh = cast(MeshStrategy, self._fabric.strategy).mesh
        device, precision = self._fabric.device, build_precision(recipe.precision, recipe.parallel.reduce_dtype)
        with self._backends():
            dtype = precision.compute or precision.storage
            check_attention_kernel(recipe.attention, spec.config, device, dtype)
            resumed_from = find_checkpoint(recipe.resume, recipe.out_dir)
            resumed, steps = resumed_from is not None, recipe.train.max_steps
            self._state = build_train_state(recipe, spec, self._mesh, device, resumed=resumed, steps=steps)
        self.step = self.tokens = 0
        self._data: RunData | None = None
        self._position: dict[str, Any] | None = None
        self._gradients: StepGradients | None = None
        self._objective: Objective | None = None
        if resumed_from is not None:
            self._restore(resumed_from)

    @classmethod
    def open(cls, command: str, *settings: Path | str | Mapping[str, Any]) -> "TrainableModel":
        """The model that a command would train, with its optimizer.

        Args:
            command: pretrain, finetune, finetune_full, align or another command that trains.
            settings: YAML files and mappings of their keys; later ones take precedence. `resume` loads a checkpoint.

        Raises:
            UserError: naming the first setting that is wrong or not supported.
        """
        if command not in COMMANDS or not issubclass(kind := COMMANDS[command].import_recipe(), Training):
            raise UserError(f"command: {command!r} does not train; use pretrain, finetune or align")
        tree: dict[str, Any] = {}
        for source in settings:
            values = dict(source) if isinstance(source, Mapping) else read_yaml(str(source))
            tree = merge_settings(kind, tree, values, trusted=True)
        recipe = resolve_paths(command, build_recipe(kind, tree))
        return cls(recipe, find_spec(recipe) if isinstance(recipe, Finetune) else build_pretrain_spec(recipe))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model.

        Raises:
            UserError: if there is none.
        """
        return self._encoder.tokenizer

    def batches(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of one optimizer step after the other, from the data of the recipe.

        They are those of the command, in its order, from where the model's state is.

        Raises:
            UserError: if the data is not found, or does not match the model.
        """
        data = self._open_data()
        stream = iter(data.train)
        try:
            while batches := list(itertools.islice(stream, data.micro_batches)):
                yield [admit_batch(batch, self.spec) for batch in batches]
        finally:
            data.train.close()

    def forward_backward(
        self, batches: Batch | Sequence[Batch] | Sequence[Row], loss: str | LogProbLoss | None = None
    ) -> GradientResult:
        """Add the gradients of a loss to those of earlier calls since the last `optim_step`.

        The gradient is that of the mean over all labels of these calls, on all data ranks, however they are divided.

        Args:
            batches: this rank's micro-batches; or rows of tokens, which are padded to micro-batches of
                `train.micro_batch_size`. A row is a sequence of token ids, all of which but the first are labels, or a
                mapping: `ids`; optionally `weights`, the factor of the loss of each token, 0 for one that is not
                trained; and values of each token under other names, which the loss has as `batch.token_values`.
            loss: `cross_entropy`, `dft`, or None for that of the recipe; or a function of the log-probabilities of the
                labels (B, T) in nats and the micro-batch, that returns the sum of a loss over the labels.

        Raises:
            UserError: if a row does not fit the model, or the loss cannot be added to that of earlier calls.
        """
        micro_batches = [admit_batch(batch, self.spec) for batch in self._list_batches(batches)]
        objective, state, earlier = self._build_objective(loss), self._state, self._gradients
        with self._backends():
            if earlier is None or self._objective is None:
                state.begin_step(self.step)
                self._gradients = new = add_gradients(state, micro_batches, objective)
            else:
                parts = (earlier, self._objective, micro_batches, objective)
                self._gradients, new = add_to_gradients(state, *parts)
        self._objective = objective
        loss_sum, *sums = all_reduce_sum([x * state.counts_loss for x in new.local_sums()], state.device)
        return GradientResult(loss_sum, new.targets, new.tokens, objective.compute_metrics(sums))

    def optim_step(self, lr: float | None = None) -> StepResult:
        """Update the weights by the gradients, clipped to `train.max_norm`, and drop these.

        A step with a loss or gradient that is not finite is skipped: weights and moments are then unchanged.

        Args:
            lr: the learning rate; None for that of the optimizer in the recipe. The schedule is the caller's.

        Raises:
            UserError: without gradients.
        """
        if self._gradients is None or self._objective is None:
            raise UserError("optim_step: there are no gradients; call forward_backward first")
        state, peak = self._state, self.recipe.optimizer.lr
        if lr is not None and (lr < 0 or not peak):
            raise UserError(f"lr: {lr} with optimizer.lr: {peak}; set lr to 0 or more, and optimizer.lr above 0")
        set_learning_rate(state.optimizers, 1.0 if lr is None else lr / peak)
        with self._backends():
            result = apply_gradients(state, self._gradients, self._objective, max_norm=self.recipe.train.max_norm)
        state.scale.update(finite=not result.skipped)
        self._gradients = None
        self.step, self.tokens = self.step + 1, self.tokens + result.tokens
        return result

    def sample(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 50,
        seed: int | None = None,
        chat_template: bool | None = None,
        **settings: Any,
    ) -> list[WrittenText]:
        """Generate a text after each prompt, with the weights as they are now.

        `tokens` of each text have their log-probabilities without temperature, computed as in training.

        Args:
            prompts: texts, in the format of the model as in `LLM.generate`, or token ids.
            seed: of the first text, seed + 1 of the second, ...; None for torch's generator.
            chat_template: as in `LLM.generate`.
            settings: `temperature`, `top_k`, `top_p`, `stop` and the others of `LLM.generate`.

        Raises:
            UserError: if a prompt does not fit, or ranks share the tokens of a row or the weights of data ranks.
        """
        state, encoder, forward = self._state, self._encoder, self._find_forward()
        rows = self.spec.config.padded_vocab_size or 0
        given: dict[str, Any] = {
            "chat_template": chat_template,
            "max_new_tokens": max_new_tokens,
            "logprobs": 0,
            **settings,
        }
        texts = prepare_texts(encoder, rows=rows, **given)
        requests = []
        for number, prompt in enumerate(prompts):
            encoded = encoder.encode(prompt, None, chat_template) if isinstance(prompt, str) else Prompt(tuple(prompt))
            requests.append(partial(texts.build_request, encoded, None if seed is None else seed + number))
        with self._backends(), eval_mode(state), run_blocks_eagerly(state.core):
            engine = Engine(state.core, reorder=False, forward=forward)  # the products of training
            written = generate_texts(engine, requests, encoder.tokenizer, texts.stops, continues=texts.continues)
            return list(written)

    def save_state(self, folder: Path | str) -> Path:
        """Save weights, optimizer, random generators and the position in the data; returns the folder.

        The folder appears whole, by a rename. `litgpt ... --resume FOLDER` and `load_state` continue from it, and
        `LLM.load` loads its weights.

        Args:
            folder: new or empty.

        Raises:
            UserError: if there are gradients that no step has applied, or writing fails.
        """
        if self._gradients is not None:
            raise UserError("save_state: gradients are not saved; call optim_step first")
        final = Path(folder)
        check_unused(final)
        staged = final.with_name(f"{final.name}.partial")
        with raise_on_all_ranks():
            if is_rank_zero():
                shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
                staged.mkdir(parents=True)
        state, data, recipe = self._state, self._data, self.recipe
        options: dict[str, Any] = {"resumed_step": None, "notify": print_message, "out_dir": staged}
        checkpoints = open_checkpoints(recipe, self.spec, state, **options)
        tokenizer_dir = data.tokenizer_dir if data else self.spec.tokenizer_dir
        files = list_checkpoint_files(recipe, self.spec, state, tokenizer_dir, data.prompt_files if data else None)
        checkpoints.save(self.step, state.core, state.optimizers, self._progress(), files)
        checkpoints.commit()
        with raise_on_all_ranks():
            if is_rank_zero():
                publish_folder(get_step_folder(staged, self.step), final)
                staged.rmdir()
        return final

    def load_state(self, folder: Path | str) -> None:
        """Continue from a checkpoint of `save_state` or of a command with the same recipe; gradients are dropped.

        Raises:
            UserError: if it is damaged, or of another model, precision or optimizer.
        """
        path = find_checkpoint(Path(folder), self.recipe.out_dir)
        assert path is not None
        self._restore(path)

    def _restore(self, folder: Path) -> None:
        self._state.zero_grad()
        self._gradients = None
        progress = restore(self.recipe, self.spec, self._state, folder, print_message)
        self.step, self.tokens = progress["step"], progress["tokens"]
        if "scale" in progress:
            self._state.scale.load_state_dict(progress["scale"])
        self._position = progress.get("stream")
        if self._data is not None and self._position is not None:
            self._data.train.load_state_dict(self._position)

    def _progress(self) -> dict[str, Any]:
        """The progress for a checkpoint: JSON values."""
        position = self._position if self._data is None else self._data.train.state_dict()
        stream = {} if position is None else {"stream": position}
        return {"tokens": self.tokens, "scale": self._state.scale.state_dict(), **stream}

    def _open_data(self) -> RunData:
        if self._data is None:
            spec, resumed = self.spec, self._position is not None
            spec.data.check_files(has_tokenizer=spec.tokenizer_dir is not None or spec.tokenizer is not None)
            length = self.sequence_length
            self._data = open_data(self.recipe, spec, self._fabric, self._mesh, length, resumed=resumed)
            if self._position is not None:
                self._data.train.load_state_dict(self._position)
        return self._data

    @cached_property
    def _encoder(self) -> PromptEncoder:
        folder = self._data.tokenizer_dir if self._data else self.spec.tokenizer_dir
        if folder is None:
            raise UserError("tokenizer_dir: null, but texts need a tokenizer; set one")
        format_folder = find_format_folder(folder)
        chat = read_template(format_folder)
        return PromptEncoder(Tokenizer(folder), chat, find_prompt_style(format_folder, chat))

    def _find_forward(self) -> Callable[..., torch.Tensor] | None:
        """The forward pass of the engine; None for that of the model.

        Raises:
            UserError: if other ranks would have to take part with prompts of their own.
        """
        if self._mesh is None or self._mesh.is_replicated_only:
            return None
        for name in ("data_shard", "data_replicate", "context"):
            if (value := getattr(self._mesh.dims, name)) > 1:
                raise UserError(f"sample: not supported with parallel.{name}: {value}; set parallel.{name}: 1")
        if self._mesh.dims.tensor > 1 and self.recipe.parallel.sequence:
            raise UserError("sample: not supported with parallel.sequence: true; set parallel.sequence: false")
        return partial(run_split_model, self._state.core)

    def _backends(self) -> AbstractContextManager[None]:
        return select_backends(deterministic=self.recipe.deterministic, attention=self.recipe.attention)

    def _list_batches(self, batches: Batch | Sequence[Batch] | Sequence[Row]) -> list[Batch]:
        given = [batches] if isinstance(batches, Batch) else list(batches)
        if not given:
            raise UserError("batches: there are none; give one or more")
        if all(isinstance(batch, Batch) for batch in given):
            return cast(list[Batch], given)
        limit, size = self.sequence_length, self.recipe.train.micro_batch_size
        rows = [parse_token_row(cast(Row, row), number, max_tokens=limit) for number, row in enumerate(given, 1)]
        return [collate_token_rows(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _build_objective(self, loss: str | LogProbLoss | None) -> Objective:
        channels = self._data.train.channels if self._data else ()
        if loss is None:
            return build_objective(self.recipe, self.spec, channels)
        if self.spec.config.output == "score":
            raise UserError("loss: a reward model has no probabilities of tokens; set None")
        if callable(loss):
            return log_prob_loss(loss, self.recipe.loss)
        if loss not in LOSS_TYPES:
            raise UserError(f"loss: {loss!r} is not known; set {', '.join(LOSS_TYPES)}, None or a function")
        settings = replace(self.recipe.loss, type=LOSS_TYPES[loss])  # type: ignore[arg-type]
        return next_token(settings, channels, prediction_layers=self.spec.count_trained_predictions())


def check_trainable(recipe: Training, spec: RunSpec) -> None:
    """Check that the settings of a run need nothing before the first step but the model.

    Raises:
        UserError: naming the first one that does.
    """
    if isinstance(spec.tuner, LoRA) and spec.tuner.init == "lora_ga" and spec.adapter is None:
        raise UserError("tuner.init: lora_ga needs the loop of litgpt finetune; set tuner.init: pissa")
    if spec.scores_ahead:
        raise UserError("preference.precompute_ref_log_probs: true needs the loop of litgpt align; set false")
    if recipe.add_version:
        raise UserError("add_version: true has no effect, because out_dir is not written; set false")
    for name in ("upload_to", "push_to_hub"):
        if value := getattr(recipe.checkpoint, name):
            raise UserError(f"checkpoint.{name}: {value} needs the loop of a command such as litgpt pretrain; set null")
