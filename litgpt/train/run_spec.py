"""The spec of a run: shape and weights of the model, data and tokenizer, for each task."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from litgpt import adapt
from litgpt.adapt.llama_pro import expand_config
from litgpt.adapt.parts import check_rates, limit_to_parts
from litgpt.data.media.codes import open_code_reader
from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.code_tokens import CodeTokens
from litgpt.model.config import Config, override_fields
from litgpt.model.flops import TrainedShares
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS, default_precision
from litgpt.recipe.choices import build_default_data
from litgpt.recipe.data import DataModule
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.part_rates import PartRates
from litgpt.recipe.plan import USUAL_MEDIA, RowMedia
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.pretrain import Pretrain, TokenizerArgs
from litgpt.recipe.train import MODALITIES
from litgpt.recipe.tuner import Tuner
from litgpt.store.adapters import folder as adapter_folder
from litgpt.store.adapters.saved_adapter import BaseSettings, SavedAdapter, check_further_training, list_changes
from litgpt.store.config_overrides import override_config
from litgpt.store.load_model import load_config
from litgpt.store.tokenizer_files import has_tokenizer
from litgpt.train.early_checks import check_initial_weights, check_modalities, get_vocabulary_cure, resolve_config


@dataclass(frozen=True)
class RunSpec:
    """The model, the data and the tokenizer of a run.

    Attributes:
        task: name of the task in the loggers.
        weights: model folder to load the initial weights from; None initializes them at random.
        tokenizer: settings of a tokenizer to train on the run's own text, instead of the one in `tokenizer_dir`.
        tuner: the finetuning method; None trains all weights.
        quantize: quantization of the frozen matrices of the blocks; None for none.
        noise: alpha of NEFTune's noise on the embeddings; None for none.
        dtype: dtype of the weights, as torch names it.
        base: name or path of the base model in an adapter's config.
        adapter: folder of an adapter to train further; None to initialize a new one.
        model_config: fields of the base model's config that differ in this run.
        base_changes: the fields of `config` that differ from the config in `weights` because that adapter changed them.
        preference: the settings of preference training; None for other objectives.
        disabled_dropout: the probabilities of dropout that these set to 0, by key, without a tuner's default.
        predicts: whether prediction layers are trained, if the tuner leaves any of their weights to train.
        modalities: which tokens are trained, of text and image.
        row_media: the media of each row of a plan, which reads no data.
        rates: the learning rates of parts of a model that sees or hears.
    """

    task: str
    config: Config
    data: DataModule
    weights: Path | None
    tokenizer_dir: Path | None
    tokenizer: TokenizerArgs | None = None
    tuner: Tuner | None = None
    quantize: str | None = None
    noise: float | None = None
    dtype: str | None = None
    base: str = ""
    adapter: Path | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    base_changes: Mapping[str, Any] = field(default_factory=dict)
    preference: PreferenceArgs | None = None
    disabled_dropout: Mapping[str, float] = field(default_factory=dict)
    predicts: bool = True
    modalities: Sequence[str] = MODALITIES
    row_media: RowMedia = USUAL_MEDIA
    rates: PartRates = field(default_factory=PartRates)

    @cached_property
    def code_tokens(self) -> CodeTokens | None:
        """The tokens of images, if only images or only text is trained.

        Raises:
            UserError: if the model writes no images.
        """
        if set(self.modalities) == set(MODALITIES):
            return None
        check_modalities(self.modalities, self.tokenizer_dir)
        reader = open_code_reader(Tokenizer(self.tokenizer_dir)) if self.tokenizer_dir else None
        return reader.tokens if reader else None

    def get_vocabulary_cure(self, tokens: int) -> str:
        """What to change for a model with rows for this number of tokens."""
        return get_vocabulary_cure(tokens, has_weights=self.weights is not None)

    @property
    def adapted(self) -> bool:
        """Whether the run trains an adapter, not the model's own weights."""
        return self.tuner is not None and self.tuner.adds

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares the model with a reference."""
        return self.preference is not None and self.preference.needs_reference

    @property
    def scores_ahead(self) -> bool:
        """Whether the reference computes log-probabilities before training, and is not needed then."""
        return self.preference is not None and self.needs_reference and self.preference.precompute_ref_log_probs

    @property
    def base_settings(self) -> BaseSettings:
        """How the base model is stored while an adapter is trained."""
        return BaseSettings(self.dtype, self.quantize, self.model_config)

    def measure_trained_shares(self) -> TrainedShares:
        """Measure which weights the run trains, for a count of its operations."""
        active = self.tuner.get_active_share(self.config.n_layer) if self.tuner else 1.0
        return TrainedShares.measure(self.whole_model, adapted=self.adapted, active=active)

    @cached_property
    def whole_model(self) -> GPT:
        """The whole model on the meta device, to look at and not to change."""
        return self.build_whole_model()

    def build_whole_model(self) -> GPT:
        """Build the whole model, with what the tuner adds to it, on the meta device."""
        model = GPT.on_meta(self.config)
        self.select_trained(model)
        return model

    def select_trained(self, model: GPT) -> None:
        """Prepare a whole model for the tuner, if any, and freeze prediction layers that the objective does not run."""
        if self.tuner:
            adapt.attach(model, self.tuner)
        for block in model.prediction_blocks if not self.predicts else ():
            block.requires_grad_(False)

    def count_trained_predictions(self) -> int:
        """Count the prediction layers that training runs: all of them, or none."""
        layers = self.config.n_prediction_layers
        return layers if layers and self.whole_model.trains_predictions else 0

    def adapter_files(self) -> dict[str, str]:
        """Text by name of the files that mark a training checkpoint as an adapter's; empty without an adapter."""
        if self.tuner is None or not self.adapted:
            return {}
        config = adapter_folder.build_own_config(self.tuner, self.base, self.base_settings, self.base_changes)
        return {adapter_folder.ADAPTER_CONFIG: json.dumps(config, indent=1)}


def check_token_range(batch: Batch, spec: RunSpec) -> Batch:
    """Check that every token has a row in the embedding, which may not hold for data of another tokenizer.

    Raises:
        UserError: with the largest token, or a negative one.
    """
    largest = int(max(batch.ids.max(), batch.labels.max()))
    rows = spec.config.padded_vocab_size or 0
    if largest >= rows:
        cure = spec.get_vocabulary_cure(largest + 1)
        raise UserError(f"data: holds token {largest}, but the model has {rows} rows; {cure}")
    smallest = int(min(batch.ids.min(), batch.labels.masked_fill(batch.labels == IGNORE, 0).min()))
    if smallest < 0:
        raise UserError(f"data: holds token {smallest}, which is negative; write the data with tokens from 0")
    return batch


def admit_batch(batch: Batch, spec: RunSpec) -> Batch:
    """Check the tokens of a batch of the data, and ignore the labels of a modality that is not trained.

    Raises:
        UserError: as `check_token_range`.
    """
    check_token_range(batch, spec)
    if spec.code_tokens is None:
        return batch
    ignored = spec.code_tokens.is_image(batch.labels) ^ ("image" in spec.modalities)
    return replace(batch, labels=batch.labels.masked_fill(ignored, IGNORE))


def build_pretrain_spec(recipe: Pretrain) -> RunSpec:
    """Build the spec of a named shape, from scratch or with the weights of `initial_checkpoint_dir`.

    Raises:
        UserError: if the shape is unknown or `initial_checkpoint_dir` is not a folder.
    """
    config, weights = resolve_config(recipe), recipe.initial_checkpoint_dir
    check_initial_weights(config, weights)
    return RunSpec(
        task="pretrain",
        config=config,
        data=recipe.data or build_default_data(recipe),
        weights=recipe.initial_checkpoint_dir,
        tokenizer_dir=recipe.tokenizer_dir,
        tokenizer=recipe.tokenizer,
        predicts=recipe.loss.prediction_weight > 0,
        modalities=recipe.loss.modalities,
    )


def build_finetune_spec(
    recipe: Finetune, folder: Path, base: str, adapter: Path | None = None, config: Config | None = None
) -> RunSpec:
    """Build the spec of the model in a folder, with its own tokenizer.

    Args:
        base: name or path of the model in an adapter's config.
        adapter: folder of an adapter of this model to train further.
        config: of the model; None to read it in the folder.

    Raises:
        UserError: if the folder holds only an adapter, the adapter does not match the model, a reward model is
            trained as a language model, or a part that is not trained has a learning rate.
    """
    if adapter_folder.is_adapter(folder):
        raise UserError(
            f"checkpoint_dir: {folder} is an adapter; merge it first (litgpt merge_lora), or train it further with "
            "litgpt finetune BASE --initial_adapter_dir ADAPTER"
        )
    base_config = config or load_config(folder)
    saved = load_initial_adapter(adapter, folder, base_config) if adapter else None
    trained_config = saved.config if saved else replace_output(folder, base_config, recipe.output)
    if trained_config.output != recipe.output:
        raise UserError(
            f"initial_adapter_dir: {adapter} was trained for the output {trained_config.output}, not {recipe.output}; "
            "merge it (litgpt merge_lora), and give the merged model as checkpoint_dir"
        )
    base_changes = list_changes(base_config, trained_config)
    tuner = saved.settings if saved else recipe.resolved_tuner
    if tuner and not saved and "output" in base_changes:
        tuner = tuner.train_module(recipe.output)
    if tuner and not saved and base_config.has_tower:
        tuner = limit_to_parts(tuner, base_config, recipe.freeze.parts)
    inherited = saved.base_settings.model_config if saved else {}
    changes = {**inherited, **override_fields(inherited, recipe.model_config or {})}
    config = override_config(trained_config, changes)
    spec = RunSpec(
        task=recipe.task,
        config=expand_config(config, tuner),
        data=recipe.data or build_default_data(recipe),
        weights=folder,
        tokenizer_dir=adapter if adapter and base_changes and has_tokenizer(adapter) else folder,
        tuner=tuner,
        quantize=recipe.quantization,
        dtype=str(PRECISIONS[recipe.precision or default_precision()].storage).removeprefix("torch."),
        base=base,
        noise=recipe.neftune_alpha,
        adapter=adapter,
        model_config=changes,
        base_changes=base_changes,
        predicts=recipe.loss.prediction_weight > 0,
        modalities=recipe.loss.modalities,
        rates=recipe.rates,
    )
    if recipe.rates.given:
        check_rates(recipe.rates, spec.build_whole_model())
    return spec


def add_preference(
    spec: RunSpec,
    preference: PreferenceArgs,
    reference: Path | None,
    tuner_dropout: Mapping[str, float] = MappingProxyType({}),
) -> RunSpec:
    """A spec with the settings of preference training, without dropout if they say so.

    Args:
        reference: folder of the reference model or adapter; None for the initial weights.
        tuner_dropout: the tuner's dropout by its key, unless it is the default.
    """
    spec = replace(spec, preference=replace(preference, reference=reference), predicts=False)
    if not preference.disable_dropout:
        return spec
    tuner, config = spec.tuner, spec.config
    disabled = {"model_config.dropout": config.dropout} if config.dropout else {}
    disabled |= tuner_dropout
    if tuner is not None and getattr(tuner, "dropout", False):
        tuner = replace(tuner, dropout=0.0)  # type: ignore[call-arg]
    return replace(spec, config=replace(config, dropout=0.0), tuner=tuner, disabled_dropout=disabled)


def replace_output(folder: Path, config: Config, output: Literal["logits", "score"]) -> Config:
    """The config of the model in a folder with the output that a run trains.

    Raises:
        UserError: if the model is a reward model, and the run trains a language model.
    """
    if config.output == "score" and output == "logits":
        raise UserError(
            f"checkpoint_dir: {folder} is a reward model; train it with litgpt rm, or give a language model"
        )
    return replace(config, output=output)


def load_initial_adapter(adapter: Path, base: Path, config: Config) -> SavedAdapter:
    """Load an adapter to train further, after checking that its tensors match its base.

    Raises:
        UserError: if they do not match, the folder holds no adapter, or training cannot continue as it began.
    """
    if not adapter_folder.has_adapter(adapter):
        name = adapter_folder.ADAPTER_CONFIG
        raise UserError(f"initial_adapter_dir: {adapter} holds no adapter; give a folder with {name}")
    try:
        saved = adapter_folder.load_adapter_folder(adapter, config)
        model = GPT.on_meta(saved.config)
        adapt.attach(model, saved.settings)
        adapt.check_adapter(model, saved.tensors)
        check_further_training(saved, base, config)
    except UserError as error:
        raise UserError(f"initial_adapter_dir: {str(error).removeprefix('tuner.')}") from None
    return saved
